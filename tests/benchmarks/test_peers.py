"""The driver of the peer benchmark: what it refuses, and that its workers do what they are asked."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import sweep_tables, tables
from benchmarks.peers import __main__ as command
from benchmarks.peers import drive, envs
from benchmarks.peers.drive import LOOP, Entry, PeerError
from benchmarks.sweep_task import Shape

TINY = Shape(layers=2, heads=2, width=16, mlp=24, vocab=31, batch=2, tokens=5, targets=2)
PEERS = (
    envs.Peer("One 1", "One", "one==1", {"cached_loop": "cached"}),
    envs.Peer("One 2", "One", "one==2", {"hook_loop": "again"}),
    envs.Peer("Two 1", "Two", "two==1", {"hook_loop": "also"}),
)


def entry(name: str, project: str | None, effects: torch.Tensor) -> Entry:
    return Entry(name, "somehow", sys.executable, "hook_loop", project, effects=effects)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(envs, "ENVS", tmp_path / "envs")


def installed(peer: envs.Peer) -> None:
    peer.folder.mkdir(parents=True)
    (peer.folder / "installed").write_text(" ".join(peer.wanted))


@pytest.mark.parametrize("projects", [[], ["One"], ["One", "One"]])
def test_fewer_than_two_projects_are_refused_with_reasons(projects):
    ready = [entry(f"{name} {i}", name, torch.ones(1)) for i, name in enumerate(projects)]
    with pytest.raises(PeerError, match=r"(?s)needs 2 other libraries.*Two 1: no such version"):
        drive.refuse_too_few([entry(LOOP, None, torch.ones(1)), *ready], {"Two 1": "no such version"})


def test_two_projects_are_enough():
    drive.refuse_too_few([entry("One 1", "One", torch.ones(1)), entry("Two 1", "Two", torch.ones(1))], {})


@pytest.mark.parametrize("present", [0, 1, 2])
def test_the_command_fails_without_two_projects(present, monkeypatch, capsys):
    monkeypatch.setattr(drive, "PEERS", PEERS)
    monkeypatch.setattr(drive, "build", lambda shape: pytest.fail("nothing may run"))
    monkeypatch.setattr(drive.measure, "__defaults__", (PEERS,))
    monkeypatch.setattr(drive.entries, "__defaults__", (PEERS,))
    for peer in PEERS[:present]:  # both are versions of One
        installed(peer)
    with pytest.raises(SystemExit) as stopped:
        command.main(["--threads", "1"])
    assert "no comparison" in stopped.value.code and "Two 1: not installed" in stopped.value.code


def test_a_failed_install_is_remembered_and_counts(monkeypatch, capsys):
    def run(*words):
        return "ERROR: No matching distribution found" if any("==1" in word for word in words) else None

    monkeypatch.setattr(envs, "_run", run)
    monkeypatch.setattr(command, "PEERS", PEERS)
    with pytest.raises(SystemExit, match="needs 2 other libraries; installed: ..One.."):
        command.main(["install"])
    assert "Two 1: ERROR: No matching" in capsys.readouterr().out
    assert envs.why_not(PEERS[1]) is None
    assert envs.why_not(PEERS[2]) == "ERROR: No matching distribution found"
    newer = envs.Peer("One 2", "One", "one==2.1", {})
    assert "not installed" in (envs.why_not(newer) or "")


def test_pip_keeps_torch_and_lets_transformers_go(monkeypatch):
    commands = []

    def run(*words):
        commands.append(words)
        return "conflict" if any(word.startswith("transformers==") for word in words) else None

    monkeypatch.setattr(envs, "_run", run)
    assert envs.install(PEERS[0]) is None
    pips = [words for words in commands if "pip" in words]
    assert len(pips) == 2
    assert all(f"torch=={torch.__version__}" in words and "one==1" in words for words in pips)


def test_disagreement_is_refused_by_name():
    truth = torch.tensor([[1.0, -2.0], [0.1, 0.2]])
    loop, close = entry(LOOP, None, truth), entry("One 1", "One", truth + 1e-4)
    drive.refuse_disagreement([loop, close])
    assert close.found["difference"] == pytest.approx(5e-5, rel=1e-2)
    for other in (truth + 0.01, truth.flip(0), truth * torch.nan, truth[:1]):
        with pytest.raises(PeerError, match="(?s)not the same results.*Two 1"):
            drive.refuse_disagreement([loop, close, entry("Two 1", "Two", other)])
    with pytest.raises(PeerError, match="no effect at all"):
        drive.refuse_disagreement([entry(LOOP, None, truth * 0), close])


class FakeWorker:
    """Answers at once; `Broken` does not start, `Crashing` ends in the first run, `Drifting` changes its results."""

    def __init__(self, entry: Entry, folder, threads: int, *, lean: bool = False) -> None:
        if entry.runner == "Broken":
            raise PeerError(f"{entry.title}: ImportError: no module")
        self.entry, self.folder = entry, folder
        self.ready = {"versions": {}}

    def ask(self, words: str) -> dict:
        if words == "run":
            return {"seconds": 1.0, "drift": 0.1 if self.entry.runner == "Drifting" else 0.0}
        if self.entry.runner == "Crashing":
            raise PeerError(f"{self.entry.title}: killed")
        save_file({"effects": torch.ones(2, 2, 2)}, self.folder / f"{self.entry.runner}.safetensors")
        return {"growth": 1.0, "peak": 2.0}

    def close(self) -> None:
        pass


def driven(monkeypatch, *runners: str) -> dict:
    made = [Entry(LOOP, "loop", sys.executable, "hook_loop")]
    made += [Entry(f"{runner} 1", "somehow", sys.executable, runner, runner) for runner in runners]
    monkeypatch.setattr(drive, "Worker", FakeWorker)
    monkeypatch.setattr(drive, "entries", lambda peers: (made, {"Four 1": "not installed"}))
    return drive.measure(TINY, rounds=2, threads=1)


def test_who_does_not_start_or_crashes_is_missing(monkeypatch):
    size = driven(monkeypatch, "One", "Broken", "Two", "Crashing")
    assert [row["name"] for row in size["rows"]] == [LOOP, "One 1", "Two 1"]
    assert size["missing"] == {
        "Four 1": "not installed",
        "Broken 1: somehow": "ImportError: no module",
        "Crashing 1: somehow": "killed",
    }


def test_too_few_that_run_are_refused_though_enough_are_installed(monkeypatch):
    with pytest.raises(PeerError, match=r"(?s)only One:.*Four 1: not installed.*Broken 1: somehow: ImportError"):
        driven(monkeypatch, "One", "Broken", "Crashing")


def test_results_that_change_between_runs_are_refused(monkeypatch):
    with pytest.raises(PeerError, match="Drifting 1: somehow: a later run found other effects"):
        driven(monkeypatch, "One", "Two", "Drifting")


@pytest.mark.slow
def test_workers_are_processes_that_answer(monkeypatch):
    made = [
        Entry(LOOP, "one forward a head", sys.executable, "hook_loop"),
        Entry("One 1", "cached", sys.executable, "cached_loop", "One"),
        Entry("Two 1", "also", sys.executable, "hook_loop", "Two"),
        Entry("Three 1", "broken", sys.executable, "no_such_runner", "Three"),
    ]
    monkeypatch.setattr(drive, "entries", lambda peers: (made, {}))
    size = drive.measure(TINY, rounds=2, threads=1)
    assert "no_such_runner" in size["missing"]["Three 1: broken"]
    assert [row["name"] for row in size["rows"]] == [LOOP, "One 1", "Two 1"]
    for row in size["rows"]:
        assert row["median_us"] > 0 and row["peak"] > row["growth"] >= 0
        assert row["difference"] < 1e-3
        assert row["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(size)) == size
    assert "Three 1: broken: missing" in command.summary(size)


def test_tables_name_every_library():
    row = {"how": "somehow", "project": "One", "growth": 1e7, "peak": 1e9, "difference": 0.0, "spread": 0.1}
    row |= {"versions": {"torch": "2", "transformers": "5"}}
    rows = [
        {**row, "name": LOOP, "median_us": 8e6, "speedup": 1.0},
        {**row, "name": "bkdfast", "median_us": 1e6, "speedup": 8.0},
        {**row, "name": "One 1", "median_us": 10e6, "speedup": 0.8},
    ]
    size = {"shape": {"name": "a size"}, "rounds": 3, "rows": rows, "missing": {"Two 1": "no such version"}}
    text = sweep_tables.peer_table({"machine": {"name": "a machine"}, "peers": [size]})
    assert "| One 1 | somehow | 10 s | 1.25 | 10x | 10 MB | identical |" in text
    assert "Missing: Two 1, no such version." in text


def test_figures_go_between_their_markers():
    readme = "a\n<!-- sweep figures: made by `make bench-sweep`, do not edit -->\nold\n<!-- end of sweep figures -->\nb"
    assert tables.placed(readme, "sweep", "bench-sweep", "new") == readme.replace("old", "new")
    with pytest.raises(SystemExit, match="lost its markers for the peer figures"):
        tables.placed(readme, "peer", "bench-peers", "new")
