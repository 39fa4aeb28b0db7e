"""The sweep benchmark in other libraries (`make bench-peers`):

    python -m benchmarks.peers install     an environment for each peer under benchmarks/peers/.envs
    python -m benchmarks.peers             compare and time; writes benchmarks/results/peers-<machine>.json

Fails where fewer than two other libraries can be installed and run, or where one computes other effects.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.peers.drive import LEAST, LOOP, PeerError, measure
from benchmarks.peers.envs import PEERS, install, why_not
from benchmarks.run import RESULTS, machine, slug
from benchmarks.sweep_task import Shape


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["run", "install"], default="run")
    parser.add_argument("--tokens", type=int, nargs="*", default=[128], help="prompt lengths (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="prompts in a batch (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each, at least 2 (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/peers-<machine>.json)")
    options = parser.parse_args(argv)
    if options.action == "install":
        install_all()
        return
    torch.set_num_threads(options.threads)
    facts = machine(torch.device("cpu"))
    sizes: list[dict] = []
    for tokens in options.tokens:
        try:
            sizes.append(measure(Shape(tokens=tokens, batch=options.batch), options.rounds, options.threads))
        except PeerError as error:
            sys.exit(f"no comparison: {error}")
        print(summary(sizes[-1]))
    out = options.out or RESULTS / f"peers-{slug(facts['name'])}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": facts, "peers": sizes}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out}")


def install_all() -> None:
    """Install every peer; exit with 1 where fewer than two projects could be."""
    for peer in PEERS:
        print(f"{peer.name} ...", flush=True)
        reason = install(peer)
        print(f"{peer.name}: {reason or 'ready'}")
    projects = {peer.project for peer in PEERS if why_not(peer) is None}
    if len(projects) < LEAST:
        sys.exit(f"a comparison needs {LEAST} other libraries; installed: {sorted(projects) or 'none'}")


def summary(size: dict) -> str:
    """One size for the terminal."""
    lines = [size["shape"]["name"]]
    for row in size["rows"]:
        cost = "" if row["name"] == LOOP else f", {1 / row['speedup']:.2f} of plain hooks"
        lines.append(
            f"  {row['name']}, {row['how']}: {row['median_us'] / 1e6:.2f} s{cost}, "
            f"+{row['growth'] / 1e6:.0f} MB, effects within {row['difference']:.0e}"
        )
    return "\n".join(lines + [f"  {name}: missing, {reason}" for name, reason in size["missing"].items()])


if __name__ == "__main__":
    main()
