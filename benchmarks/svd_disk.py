"""`delta_svd` from disk to result, next to reading the same files alone: `python -m benchmarks.svd_disk`.

Two checkpoints in the shapes of TinyLlama (6 of its layers, 1.6 GB of bfloat16 in all, sharded differently) are made
and removed again. The tuned one is the base plus a change of low rank (s_i ~ 1 / i), rounded; where that rank is above
the 20 triplets that are asked for, those are harder to tell apart and need more passes (`--change`).

Cold: before every run the files are read once, so that what a hypervisor or a disk keeps is the same for all, and their
pages are dropped from the page cache, as a look at it confirms. The yardstick is reading alone: files in turn, by one
thread, into one buffer that is used again, of the size that is faster in that round. Between it and `delta_svd` stand
its first stages: pairs of tensors read into memory of their own, and those hashed. Versions take turns; a ratio is the
median over rounds of the ratio within a round. One thread computes in "1 thread"; those that read and hash ahead come
on top.

Writes `benchmarks/results/svd-disk-<machine>.json`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import mmap
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import bkdfast as bf
from benchmarks.run import RESULTS, machine, slug, spread
from bkdfast.svd.plan import make_plan
from bkdfast.svd.source import open_source
from bkdfast.svd.stream import Stream

PAIRS, HASHED, OURS = "pairs", "pairs, hashed", "delta_svd"
READ = {f"reading alone, {size} MB at a time": size << 20 for size in (8, 64)}
RANK = 20
WIDTH, MLP, KEYS, VOCABULARY = 2048, 5632, 256, 32000
_KEPT = 0.95  # share of the files that counts as in the page cache: some systems take idle pages back at once


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="of each checkpoint (default: %(default)s)")
    parser.add_argument("--change", type=int, default=16, help="rank of the change (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="that compute (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=3, help="turns (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made (default: the temporary folder)")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/svd-disk-<machine>.json)")
    options = parser.parse_args(argv)
    torch.set_num_threads(max(options.threads))
    facts = machine(torch.device("cpu"))
    out = options.out or RESULTS / f"svd-disk-{slug(facts['cpu'])}.json"
    with tempfile.TemporaryDirectory(prefix="svd-disk-", dir=options.folder) as folder:
        base, tuned = Path(folder) / "base", Path(folder) / "tuned"
        build(base, tuned, options.layers, options.change)
        files = sorted([*base.glob("*.safetensors"), *tuned.glob("*.safetensors")])
        result = {
            "machine": facts,
            "bytes": sum(file.stat().st_size for file in files),
            "rank": RANK,
            "change": options.change,
            "passes": passes(base, tuned),
            "rounds": options.rounds,
            "cold": measure(base, tuned, files, options.threads, options.rounds, cold=True),
            "warm": measure(base, tuned, files, options.threads, options.rounds, cold=False),
        }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out}")


def passes(base: Path, tuned: Path) -> float:
    """How often `delta_svd` multiplies by a delta, on average over their bytes; warms up."""
    deltas = bf.delta_svd(base, tuned, rank=RANK, progress=False).values()
    sizes = [delta.shape[0] * delta.shape[1] for delta in deltas]
    return sum(delta.passes * size for delta, size in zip(deltas, sizes, strict=True)) / sum(sizes)


def build(base: Path, tuned: Path, layers: int, change: int) -> None:
    """Write both checkpoints: the base in 2 shards, the tuned one in 5."""
    generator = torch.Generator().manual_seed(0)
    sides: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for name, (m, n) in tqdm(shapes(layers).items(), desc="making the checkpoints", unit="tensor"):
        w = (0.02 * torch.randn(m, n, generator=generator)).bfloat16()
        u, v = (torch.linalg.qr(torch.randn(size, change, generator=generator))[0] for size in (m, n))
        sides[0][name] = w
        s = math.sqrt(m * n) / WIDTH / torch.arange(1, change + 1)  # 3% of every weight's norm
        sides[1][name] = (w + (u * s) @ v.T).bfloat16()
    for path, tensors, shards in ((base, sides[0], 2), (tuned, sides[1], 5)):
        path.mkdir()
        names, index = list(tensors), {}
        for shard in range(shards):
            file = path / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
            save_file({name: tensors[name] for name in part}, file)
            index |= dict.fromkeys(part, file.name)
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)  # only clean pages can be dropped
            os.close(descriptor)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")


def shapes(layers: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of the weights, in the order of the files."""
    found = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(layers):
        for name, shape in (
            ("self_attn.q_proj", (WIDTH, WIDTH)),
            ("self_attn.k_proj", (KEYS, WIDTH)),
            ("self_attn.v_proj", (KEYS, WIDTH)),
            ("self_attn.o_proj", (WIDTH, WIDTH)),
            ("mlp.gate_proj", (MLP, WIDTH)),
            ("mlp.up_proj", (MLP, WIDTH)),
            ("mlp.down_proj", (WIDTH, MLP)),
        ):
            found[f"model.layers.{layer}.{name}.weight"] = shape
    return found | {"lm_head.weight": (VOCABULARY, WIDTH)}


def measure(
    base: Path, tuned: Path, files: Sequence[Path], threads: Sequence[int], rounds: int, *, cold: bool
) -> dict[str, dict]:
    """Throughput of every version and its ratio to reading alone."""
    nbytes = sum(file.stat().st_size for file in files)
    versions: dict[str, Callable[[], object]] = {
        name: partial(read, files, memoryview(bytearray(size))) for name, size in READ.items()
    }
    versions[PAIRS] = partial(stream, base, tuned, digest=False)
    versions[HASHED] = partial(stream, base, tuned, digest=True)
    for count in threads:
        versions[f"{OURS}, {count} thread{'s' * (count != 1)}"] = partial(ours, base, tuned, count)
    wall: dict[str, list[float]] = {name: [] for name in versions}
    cpu: dict[str, list[float]] = {name: [] for name in versions}
    what = "cold" if cold else "warm"
    for _ in tqdm(range(rounds), desc=what, unit="round"):
        for name, run in versions.items():
            keep(files)
            if cold:
                drop(files)
            begin, spent = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - spent)
    found, reading = {}, [min(taken) for taken in zip(*(wall[name] for name in READ), strict=True)]
    for name, taken in wall.items():
        found[name] = {
            "seconds": statistics.median(taken),
            "spread": spread(taken),
            "gb_s": nbytes / statistics.median(taken) / 1e9,
            "of_reading": statistics.median(r / t for r, t in zip(reading, taken, strict=True)),
            "cpu_s": statistics.median(cpu[name]),
        }
        print(
            f"{what}, {name}: {found[name]['seconds']:.2f} s (spread {found[name]['spread']:.0%}), "
            f"{found[name]['gb_s']:.2f} GB/s, {found[name]['of_reading']:.0%} of reading alone, CPU "
            f"{found[name]['cpu_s']:.2f} s"
        )
    return found


def read(files: Sequence[Path], buffer: memoryview) -> None:
    """Read the files in turn."""
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def stream(base: Path, tuned: Path, *, digest: bool) -> None:
    """What `delta_svd` reads, in its order, without a computation."""
    sources = open_source(base), open_source(tuned)
    plan = make_plan(*sources)
    order = plan.order()
    with Stream(*sources, plan, order, digest=digest) as pairs:
        for position in order:
            _ = pairs.take(position).digests


def ours(base: Path, tuned: Path, threads: int) -> None:
    """The whole of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bf.delta_svd(base, tuned, rank=RANK, progress=False)
    finally:
        torch.set_num_threads(before)


def drop(files: Sequence[Path]) -> None:
    """Drop the files' pages from the page cache.

    Raises:
        RuntimeError: the system keeps some of them.
    """
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    if (left := cached(files)) > 1 - _KEPT:
        raise RuntimeError(f"{left:.1%} of the files stay in the page cache; pass --folder= on a disk")


def keep(files: Sequence[Path]) -> None:
    """Bring the files into the page cache.

    Raises:
        RuntimeError: it does not hold them.
    """
    read(files, memoryview(bytearray(min(READ.values()))))
    if (found := cached(files)) < _KEPT:
        raise RuntimeError(f"only {found:.1%} of the files stay in the page cache; pass fewer --layers=")


def cached(files: Sequence[Path]) -> float:
    """Share of the files' pages that are in the page cache."""
    size, pages, present = resource.getpagesize(), 0, 0
    libc = ctypes.CDLL(None, use_errno=True)
    for file in files:
        with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, flags=mmap.MAP_PRIVATE) as view:
            count = -(-len(view) // size)
            flags = (ctypes.c_ubyte * count)()
            start = ctypes.c_char.from_buffer(view)
            if libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(view)), flags):
                raise OSError(ctypes.get_errno(), "mincore")
            del start
            pages, present = pages + count, present + sum(flag & 1 for flag in flags)
    return present / pages


if __name__ == "__main__":
    main()
