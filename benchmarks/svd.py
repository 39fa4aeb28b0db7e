"""Leading singular triplets of a weight delta, next to what else computes them: `python -m benchmarks.svd`.

Each case is a pair of bf16 matrices whose difference has a known kind of spectrum. Truth is an eigendecomposition of
the delta's Gram matrix in float64. Every version gets the pair, so that forming the delta is a part of its time, as it
is of a user's. Versions take turns; a ratio is the median over rounds of the ratio within a round. Next to the times
stand the true angle between the computed vectors and the leading subspaces, for all versions, and the bound on it that
ours reports. A full SVD (mergekit's LoRA extraction computes one of every weight) takes long and runs once. One pass
of `delta_sketch` is timed alone, as a share of what this machine's memory and its float32 matrix product reach, and
the whole with two threads next to one.

Writes `benchmarks/results/svd-<machine>.json`; `python -m benchmarks.tables` puts it into README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.run import RESULTS, ceilings, compare, machine, slug
from bkdfast.ops.delta_sketch import delta_sketch
from bkdfast.svd.certificate import Angles
from bkdfast.svd.krylov import block_width, leading_triplets

OURS, FULL, LOWRANK = "bkdfast", "torch.linalg.svd", "torch.svd_lowrank"
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Shape:
    """A pair of `[m, n]` bf16 matrices; `spectrum`: of what was added to the base before it was rounded."""

    m: int
    n: int
    k: int
    spectrum: str

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.m}x{self.n}, k={self.k}, {self.spectrum}"


@dataclass(frozen=True)
class Pair:
    """The weights, and the true singular vectors of their difference, `[m, k]` and `[n, k]` float64."""

    w0: Tensor
    w1: Tensor
    u: Tensor
    v: Tensor


Found = tuple[Tensor, Tensor]
"""u `[m, k]` and v `[n, k]`."""


def shapes() -> Iterator[Shape]:
    """k = 8; 20, what the published monitor takes; 64, for a LoRA."""
    yield Shape(4096, 4096, 8, "geometric")
    yield Shape(4096, 11008, 8, "geometric")
    yield Shape(4096, 4096, 8, "i^-1/2")
    yield Shape(4096, 4096, 20, "geometric")
    yield Shape(4096, 4096, 64, "geometric")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("--no-full", action="store_true", help="leave out the full SVD, which takes most of the time")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/svd-<machine>.json)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    facts = machine(torch.device("cpu"))
    limits = ceilings(torch.device("cpu"))
    out = options.out or RESULTS / f"svd-{slug(facts['name'])}.json"
    rows: list[dict] = []
    for shape in tqdm([s for s in shapes() if options.only is None or options.only in s.name], desc="cases"):
        rows.append(measure(shape, options.rounds, limits, full=not options.no_full))
        tqdm.write(summary(rows[-1]))
        out.write_text(
            json.dumps({"machine": facts, "ceilings": limits, "deltas": rows}, indent=1) + "\n", encoding="utf-8"
        )
    print(f"wrote {out}")


def measure(shape: Shape, rounds: int, limits: dict[str, float], *, full: bool) -> dict:
    """Times, CPU times and angles of one case."""
    pair = build(shape)
    versions = competitors(pair, shape.k)
    found = {name: run() for name, run in versions.items()}  # warm
    bounds = certified(pair, shape.k)
    samples: dict[str, list[float]] = {name: [] for name in versions}
    spent: dict[str, list[float]] = {name: [] for name in versions}
    for _ in range(rounds):
        for name, run in versions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            samples[name].append(time.perf_counter() - wall)
            spent[name].append(time.process_time() - cpu)
    _, figures = compare(samples, [OURS])
    rows = {
        name: {**figures[name], "cpu_s": statistics.median(spent[name]), "angle": angle(pair, found[name])}
        for name in versions
    }
    if full:
        wall, cpu = time.perf_counter(), time.process_time()
        u, _, vt = torch.linalg.svd(delta(pair), full_matrices=False)
        taken = time.perf_counter() - wall
        rows[FULL] = {
            "median_us": taken * 1e6,
            "speedup": figures[OURS]["median_us"] / 1e6 / taken,
            "cpu_s": time.process_time() - cpu,
            "angle": angle(pair, (u[:, : shape.k], vt[: shape.k].T)),
        }
    alone = {"pass": one_pass(pair, shape.k, limits, 3 * rounds), "two_threads": two_threads(versions[OURS], rounds)}
    return {"name": shape.name, "shape": asdict(shape), "rounds": rounds, "versions": rows, **bounds, **alone}


def one_pass(pair: Pair, k: int, limits: dict[str, float], rounds: int) -> dict[str, float]:
    """Time of one `delta_sketch` of the width that k needs, and its share of what the machine can do."""
    (m, n), width = pair.w0.shape, block_width(k)
    x = torch.randn(n, width)
    took = []
    for _ in range(rounds):
        begin = time.perf_counter()
        delta_sketch(pair.w0, pair.w1, x)
        took.append(time.perf_counter() - begin)
    taken = statistics.median(took)
    gflop_s, gb_s = 4e-9 * m * n * width / taken, 1e-9 * (pair.w0.nbytes + pair.w1.nbytes) / taken
    shares = {"of_gemm": gflop_s / limits["gemm_gflop_s"], "of_copy": gb_s / limits["copy_gb_s"]}
    return {"width": width, "median_us": 1e6 * taken, "gflop_s": gflop_s, "gb_s": gb_s, **shares}


def two_threads(run: Callable[[], object], rounds: int) -> float:
    """How much faster it is with two threads than with one; turn by turn."""
    before = torch.get_num_threads()
    took: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for count, times in took.items():
            torch.set_num_threads(count)
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    torch.set_num_threads(before)
    return statistics.median(one / two for one, two in zip(took[1], took[2], strict=True))


def build(shape: Shape) -> Pair:
    """A base, a tuned matrix, and the truth about their rounded difference."""
    torch.manual_seed(0)
    m, n = shape.m, shape.n
    if shape.spectrum == "geometric":  # s_k is a tenth of s_1
        s = 2.0 * 10.0 ** (-torch.arange(3.0 * shape.k) / shape.k)
    else:
        s = 2.0 * torch.arange(1, min(m, n) + 1) ** -0.5
    u, v = (torch.linalg.qr(torch.randn(size, len(s)))[0] for size in (m, n))
    base = 0.02 * torch.randn(m, n)
    w0 = base.bfloat16()
    w1 = (w0.float() + (u * s) @ v.T).bfloat16()
    d = w1.double() - w0.double()
    values, vectors = torch.linalg.eigh(d @ d.T)
    left = vectors[:, -shape.k :].flip(1)
    right = d.T @ left / values[-shape.k :].flip(0).sqrt()
    return Pair(w0, w1, left, right)


def delta(pair: Pair) -> Tensor:
    """As people write it."""
    return pair.w1.float() - pair.w0.float()


def competitors(pair: Pair, k: int) -> dict[str, Callable[[], Found]]:
    """Functions that return u and v of the pair's delta."""

    def lowrank() -> Found:
        u, _, v = torch.svd_lowrank(delta(pair), q=2 * k, niter=2)
        return u[:, :k], v[:, :k]

    def ours() -> Found:
        found = leading_triplets(pair.w0, pair.w1, rank=k, tolerance=TOLERANCE)
        return found.u, found.v

    made: dict[str, Callable[[], Found]] = {OURS: ours, LOWRANK: lowrank}
    if importlib.util.find_spec("sklearn"):
        from sklearn.utils.extmath import randomized_svd

        def sklearn() -> Found:
            u, _, vt = randomized_svd(delta(pair).numpy(), k, random_state=0)
            return torch.from_numpy(u.copy()), torch.from_numpy(vt.T.copy())

        made["sklearn randomized_svd"] = sklearn
    if importlib.util.find_spec("scipy"):
        from scipy.sparse.linalg import svds

        def scipy(solver: str) -> Callable[[], Found]:
            def run() -> Found:
                u, s, vt = svds(delta(pair).numpy(), k, solver=solver, random_state=0)
                order = s.argsort()[::-1].copy()
                return torch.from_numpy(u[:, order].copy()), torch.from_numpy(vt[order].T.copy())

            return run

        made |= {"scipy svds, PROPACK": scipy("propack"), "scipy svds, ARPACK": scipy("arpack")}
    return made


def certified(pair: Pair, k: int) -> dict:
    """What ours says of its own result."""
    found = leading_triplets(pair.w0, pair.w1, rank=k, tolerance=TOLERANCE)
    bounds: Angles = found.angles
    last = k - 1
    return {
        "passes": found.passes,
        "bound": float(bounds.subspace.max()),
        "dimension": int(bounds.dimension[last]),
        "residual": float((found.residual / found.s).max()),
    }


def angle(pair: Pair, found: Found) -> float:
    """Largest sine of an angle between a computed vector and the span of the leading k true ones, left and right."""
    worst = 0.0
    for true, made in ((pair.u, found[0]), (pair.v, found[1])):
        made = torch.nn.functional.normalize(made.double(), dim=0)
        worst = max(worst, float(torch.linalg.vector_norm(made - true @ (true.T @ made), dim=0).max()))
    return worst


def summary(row: dict) -> str:
    """One case for the terminal."""
    once = row["pass"]
    lines = [
        f"{row['name']}: {row['passes']} passes, bound {row['bound']:.1e}; a pass {once['median_us'] / 1e3:.1f} ms, "
        f"{once['of_gemm']:.0%} of the matrix product, {once['of_copy']:.0%} of copying; two threads "
        f"{row['two_threads']:.2f}x"
    ]
    for name, version in row["versions"].items():
        lines.append(
            f"  {name}: {version['median_us'] / 1e3:.1f} ms, {1 / version['speedup']:.2f}x ours, CPU "
            f"{version['cpu_s']:.3f} s, true angle {version['angle']:.1e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
