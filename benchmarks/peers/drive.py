"""Run all libraries on one task, in turns: compare the effects first, then time.

Each library is a process of its own (`benchmarks/peers/worker.py`) that waits while the others run. A library whose
effects differ from those of plain hooks ends the run: its time would be that of another computation.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks.peers.envs import PEERS, Peer, why_not
from benchmarks.run import ROOT, compare
from benchmarks.sweep_task import Shape, build

LOOP = "plain hooks"
LOCAL = {
    LOOP: ("hook_loop", "one forward a head"),
    "plain hooks, cached": ("cached_loop", "prompt in transformers' cache"),
    "bkdfast": ("ours", "sweep"),
}
TOLERANCE = 1e-3
"""Largest admitted difference of an effect, in units of the largest effect; in float32 they differ by some 2e-5."""
LEAST = 2  # projects
PATIENCE = 1800.0  # seconds that a worker has for an answer


class PeerError(RuntimeError):
    """A library does not run, or computes something else."""


@dataclass
class Entry:
    """One way to compute the task."""

    name: str
    how: str
    python: str
    runner: str
    project: str | None = None
    found: dict[str, Any] = field(default_factory=dict)
    effects: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def title(self) -> str:
        return f"{self.name}: {self.how}"


class Worker:
    """A library's process.

    With `lean`, malloc gives freed memory back at once (1 MB and up), so that a peak is what was needed at one time and
    repeats from process to process; that costs time, so such a process is not timed.
    """

    def __init__(self, entry: Entry, folder: Path, threads: int, *, lean: bool = False) -> None:
        self.entry, self.log = entry, folder / f"{entry.runner}.log"
        command = [entry.python, "-m", "benchmarks.peers.worker", entry.runner, str(folder), "--threads", str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
        environment.pop("PYTHONPATH", None)
        if lean:
            environment |= {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "65536"}
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        try:
            self.ready = self._answer()
        except PeerError:
            self.close()
            raise

    def ask(self, command: str) -> dict:
        """The answer to "first" or "run"."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            if not ready.select(PATIENCE):
                raise PeerError(f"{self.entry.title}: no answer within {PATIENCE:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise self._failure()
        return json.loads(line)

    def _failure(self) -> PeerError:
        self.process.wait()
        lines = [line for line in self.log.read_text(encoding="utf-8").splitlines() if line.strip()]
        return PeerError(f"{self.entry.title}: {lines[-1].strip() if lines else 'ended without a word'}")


def entries(peers: Sequence[Peer] = PEERS) -> tuple[list[Entry], dict[str, str]]:
    """(what can run, why each other peer cannot)."""
    found = [Entry(name, how, sys.executable, runner) for name, (runner, how) in LOCAL.items()]
    missing = {}
    for peer in peers:
        if (reason := why_not(peer)) is not None:
            missing[peer.name] = reason
            continue
        for runner, how in peer.runners.items():
            found.append(Entry(peer.name, how, str(peer.python), runner, peer.project))
    return found, missing


def refuse_too_few(ready: Sequence[Entry], missing: dict[str, str]) -> None:
    """Raise where fewer than two projects take part."""
    projects = sorted({entry.project for entry in ready if entry.project is not None})
    if len(projects) < LEAST:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in missing.items())
        have = f"only {projects[0]}" if projects else "none"
        raise PeerError(f"a comparison needs {LEAST} other libraries that run, and there is {have}:{reasons}")


def refuse_disagreement(ready: Sequence[Entry]) -> None:
    """Note each entry's largest difference from plain hooks; raise where one is more than rounding.

    Differences are in units of the largest effect.
    """
    truth = next(entry.effects for entry in ready if entry.name == LOOP)
    largest = truth.abs().max().item()
    if not largest > 0:
        raise PeerError("plain hooks find no effect at all; nothing would be compared")
    wrong = []
    for entry in ready:
        if entry.effects.shape != truth.shape:
            wrong.append(f"{entry.title}: effects {list(entry.effects.shape)}, not {list(truth.shape)}")
            continue
        entry.found["difference"] = difference = (entry.effects - truth).abs().max().item() / largest
        if not difference <= TOLERANCE:
            wrong.append(f"{entry.title}: {difference:.1e} of the largest effect away, more than {TOLERANCE:.0e}")
    if wrong:
        raise PeerError("not the same results as plain hooks; times would not compare:\n  " + "\n  ".join(wrong))


def measure(shape: Shape, rounds: int, threads: int, peers: Sequence[Peer] = PEERS) -> dict:
    """All libraries on one task: a row for each that agrees, and why the others are missing.

    Raises:
        PeerError: fewer than two peers run, or a library's effects are not those of plain hooks.
    """
    able, missing = entries(peers)
    refuse_too_few(able, missing)
    with tempfile.TemporaryDirectory() as folder:
        build(shape).save(Path(folder))
        ready = []
        for entry in tqdm(able, desc="effects and memory", unit="library"):
            try:
                entry.found, entry.effects = first_run(entry, Path(folder), threads)
            except PeerError as error:
                if entry.project is None:
                    raise
                missing[entry.title] = str(error).removeprefix(f"{entry.title}: ")
                continue
            ready.append(entry)
        refuse_too_few(ready, missing)
        refuse_disagreement(ready)
        samples = _rounds(ready, Path(folder), rounds, threads)
    _, figures = compare(samples, [next(entry.title for entry in ready if entry.name == LOOP)])
    return {
        "shape": {"name": shape.name, **vars(shape)},
        "rounds": rounds,
        "tolerance": TOLERANCE,
        "missing": missing,
        "rows": [
            {"name": e.name, "how": e.how, "project": e.project, **e.found, **figures[e.title]} for e in ready
        ],
    }  # fmt: skip


def first_run(entry: Entry, folder: Path, threads: int) -> tuple[dict, torch.Tensor]:
    """(versions and memory in bytes, effects) of one sweep in a fresh process."""
    worker = Worker(entry, folder, threads, lean=True)
    try:
        found = {**worker.ready, **worker.ask("first")}
    finally:
        worker.close()
    return found, load_file(folder / f"{entry.runner}.safetensors")["effects"]


def _rounds(ready: Sequence[Entry], folder: Path, rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of each, round by round, after a round that is not counted."""
    samples: dict[str, list[float]] = {entry.title: [] for entry in ready}
    with contextlib.ExitStack() as stack:
        workers = []
        for entry in ready:
            workers.append(Worker(entry, folder, threads))
            stack.callback(workers[-1].close)
        for number in tqdm(range(rounds + 1), desc="rounds", unit="round"):
            for worker in workers:
                answer, entry = worker.ask("run"), worker.entry
                if not answer["drift"] <= TOLERANCE * entry.effects.abs().max().item():
                    raise PeerError(f"{entry.title}: a later run found other effects than the first")
                if number:
                    samples[entry.title].append(answer["seconds"])
    return samples
