"""A sweep that is killed, and one of several processes: the same numbers, bit for bit, and nothing computed twice."""

from __future__ import annotations

import signal

import pytest
import torch

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError
from bkdfast.sweep import plan as planning
from bkdfast.sweep import run
from tests.hf import zoo
from tests.jobs import processes
from tests.jobs.processes import finished, wait_for_units

SCRIPT = """
    import sys, time, torch
    import bkdfast as bf
    from bkdfast.sweep import plan, run
    from tests.hf import zoo

    plan.AMORTISED = 0.0  # one unit for each batch of variants
    compute = run.Sweep.compute

    def slow(self, number, *more):
        with open(sys.argv[2], "a") as log:
            log.write(f"{number}\\n")
        time.sleep(0.05)
        return compute(self, number, *more)

    run.Sweep.compute = slow
    if len(sys.argv) > 3:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{sys.argv[3]}", rank=int(sys.argv[4]), world_size=2
        )
    torch.manual_seed(0)
    result = bf.sweep(
        zoo.build("llama"),
        [zoo.batch(), zoo.batch(rows=2, tokens=6, seed=9)],
        edit=bf.Patch(torch.randn(3, 4, 16)),
        at="last_prompt",
        metric=bf.metrics.target_prob([5, 6]),
        variants=1,
        out=sys.argv[1],
        progress=False,
    )
    print(result.effects.double().sum().item().hex(), (result.effects ** 2).double().sum().item().hex())
"""


def start(folder, *more):
    return processes.start(SCRIPT, folder, folder / "out", folder / f"log{len(more) and more[-1]}", *more)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> str:
    return finished(start(tmp_path_factory.mktemp("whole")))


def test_killed_and_continued(tmp_path, undisturbed):
    for units in (3, 11):
        process = start(tmp_path)
        wait_for_units(tmp_path, units, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert finished(start(tmp_path)) == undisturbed
    log = (tmp_path / "log0").read_text().split()
    assert len(set(log)) == 24, "12 heads, two batches"
    assert len(log) <= 24 + 2, "at most the unit in flight is computed again at each kill"


def test_two_processes_of_which_one_is_killed(tmp_path, undisturbed):
    ranks = [start(tmp_path, str(tmp_path / "rendezvous"), str(rank)) for rank in range(2)]
    wait_for_units(tmp_path, 4, ranks[0])
    ranks[1].send_signal(signal.SIGKILL)
    assert finished(ranks[0]) == undisturbed
    assert (tmp_path / "log1").read_text(), "the killed one had taken part"
    ranks[1].communicate()


def options(**more):
    return {"edit": bf.Zero(), "metric": bf.metrics.target_prob([5]), "progress": False, **more}


def test_a_store_made_for_other_weights(tmp_path):
    bf.sweep(zoo.build("llama"), zoo.batch(), out=tmp_path, **options())
    with pytest.raises(InvalidArgumentError, match="other weights.*pass another out="):
        bf.sweep(zoo.build("llama", seed=1), zoo.batch(), out=tmp_path, **options())
    with pytest.raises(InvalidArgumentError, match="other prompts"):
        bf.sweep(zoo.build("llama"), zoo.batch(seed=4), out=tmp_path, **options())
    with pytest.raises(InvalidArgumentError, match="another edit"):
        bf.sweep(zoo.build("llama"), zoo.batch(), out=tmp_path, **options(edit=bf.Scale(0.5)))
    with pytest.raises(InvalidArgumentError, match="finished units of this run already"):
        bf.sweep(zoo.build("llama"), zoo.batch(), out=tmp_path, resume=False, **options())


def test_the_division_of_a_store_is_kept(tmp_path, monkeypatch):
    """A machine with other memory would divide the work otherwise; the store's division goes on."""
    first = bf.sweep(zoo.build("llama"), zoo.batch(), out=tmp_path, **options())
    monkeypatch.setitem(planning.TOKENS, "cpu", 1)
    monkeypatch.setattr(run.Sweep, "compute", lambda *_: pytest.fail("everything is there"))
    again = bf.sweep(zoo.build("llama"), zoo.batch(), out=tmp_path, **options())
    assert torch.equal(first.effects, again.effects) and again.facts["variants"] == first.facts["variants"]
