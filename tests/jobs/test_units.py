"""Many processes compute each unit once, lose no more than a killed one holds, and all get what one process gets."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from bkdfast.errors import InvalidArgumentError, StoreError
from bkdfast.jobs import units
from bkdfast.jobs.store import Store
from bkdfast.jobs.units import LEASE, place, run_units
from tests.jobs.processes import compute, end_all, fork, same, wait

TOTAL = 12
MANIFEST = {"weights": {"hash": "aa"}, "seed": 0}


@pytest.fixture(autouse=True)
def _no_leftovers():
    yield
    end_all()


@pytest.fixture
def agent():
    """A c10d store in a process that no test kills, as torchrun's agent hosts it."""
    return dist.TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Rank:
    """One rank in a process of its own; its log has a line for each unit begun, its file the result.

    After its first unit it waits until other ranks have begun as many as `others` says: {rank: units}.
    """

    def __init__(
        self, rank, folder, port, *, world=2, hosts=False, die_at=None, die=None, lease=1.0, own=False, others=None
    ):
        self.rank, self.log, self.file = rank, folder / f"log{rank}", folder / f"rank{rank}.safetensors"
        self.path = folder / (f"out{rank}" if own else "out")
        self.world, self.port, self.hosts, self.lease, self.die_at = world, port, hosts, lease, die_at
        self.die = die or (lambda: os.kill(os.getpid(), signal.SIGKILL))
        self.others = {folder / f"log{other}": count for other, count in (others or {}).items()}
        for log in (self.log, *self.others):
            log.touch()
        self.log.write_text("")
        self.process = fork(self.run)

    def run(self):
        store = dist.TCPStore(
            "127.0.0.1", self.port, self.world, is_master=self.hosts, wait_for_workers=False,
            timeout=timedelta(seconds=20),
        )  # fmt: skip
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world)
        store.add("connected", 1)  # gloo hangs or fails where a rank dies before all are connected
        while store.add("connected", 0) < self.world:
            time.sleep(0.01)
        self.work()

    def work(self):
        begun = 0

        def logged(unit, advance=None):
            nonlocal begun
            begun += 1
            with open(self.log, "a") as file:
                file.write(f"{unit}\n")
            time.sleep(0.03)
            while begun > 1 and any(len(log.read_text().split()) < count for log, count in self.others.items()):
                time.sleep(0.01)
            if begun == self.die_at:
                self.die()
            return compute(unit)

        found = run_units(TOTAL, logged, Store.open(self.path, MANIFEST), progress=False, lease=self.lease)
        save_file({f"{unit}.{name}": t for unit, part in found for name, t in part.items()}, self.file)

    def begun(self):
        return [int(unit) for unit in self.log.read_text().split()]

    def right(self):
        parts = run_units(TOTAL, compute, progress=False)
        return same(load_file(self.file), {f"{unit}.{name}": t for unit, part in parts for name, t in part.items()})


def test_two_ranks_share_the_work(tmp_path, agent):
    ranks = [Rank(rank, tmp_path, agent.port, lease=60, others={1 - rank: 1}) for rank in range(2)]
    assert [wait(rank.process) for rank in ranks] == [0, 0]
    assert all(rank.right() for rank in ranks)
    first, second = (rank.begun() for rank in ranks)
    assert sorted(first + second) == list(range(TOTAL)) and first and second


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_costs_its_unit_only(tmp_path, agent, victim):
    ranks = [
        Rank(rank, tmp_path, agent.port, **({"die_at": 2} if rank == victim else {"others": {victim: 2}}))
        for rank in range(2)
    ]
    assert wait(ranks[victim].process) == -signal.SIGKILL
    assert wait(ranks[1 - victim].process) == 0 and ranks[1 - victim].right()
    lost, others = ranks[victim].begun()[-1], ranks[1 - victim].begun()
    assert sorted(ranks[0].begun() + ranks[1].begun()) == sorted([*range(TOTAL), lost]) and lost in others


def test_of_three_ranks_two_are_killed(tmp_path, agent):
    others = {1: 1, 2: 3}
    ranks = [Rank(0, tmp_path, agent.port, world=3, others=others)]
    ranks += [Rank(rank, tmp_path, agent.port, world=3, die_at=others[rank]) for rank in (1, 2)]
    assert [wait(rank.process) for rank in ranks] == [0, -signal.SIGKILL, -signal.SIGKILL]
    assert ranks[0].right()
    assert sum(len(rank.begun()) for rank in ranks) == TOTAL + 2


def test_the_rank_that_hosts_the_c10d_store_is_killed(tmp_path):
    port = free_port()
    ranks = [Rank(0, tmp_path, port, hosts=True, die_at=3), Rank(1, tmp_path, port, others={0: 3})]
    assert [wait(rank.process) for rank in ranks] == [-signal.SIGKILL, 0]
    assert ranks[1].right()
    assert len(ranks[1].begun()) == len(set(ranks[1].begun()))


def test_a_rank_killed_while_it_draws_its_bar_is_not_waited_for(tmp_path):
    """Forked processes share tqdm's own lock, and nobody lets go of it for a dead one."""

    def hold():
        bar = units._Bar(disable=True)
        bar.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    units._Bar(disable=True).close()
    assert wait(fork(hold)) == -signal.SIGKILL
    assert wait(fork(lambda: list(run_units(2, compute, progress=False))), seconds=10) == 0


def test_a_rank_that_raises_lets_the_others_go_on(tmp_path, agent):
    def fail():
        raise MemoryError

    ranks = [
        Rank(0, tmp_path, agent.port, lease=60, others={1: 2}),
        Rank(1, tmp_path, agent.port, lease=60, die_at=2, die=fail),
    ]
    assert [wait(rank.process) for rank in ranks] == [0, 1], "and without waiting for the lease"
    assert ranks[0].right()


def test_a_frozen_rank_is_not_waited_for(tmp_path, agent):
    def freeze():
        os.kill(os.getpid(), signal.SIGSTOP)

    ranks = [
        Rank(0, tmp_path, agent.port, others={1: 2}),
        Rank(1, tmp_path, agent.port, die_at=2, die=freeze),
    ]
    assert wait(ranks[0].process) == 0 and ranks[0].right()
    os.kill(ranks[1].process, signal.SIGCONT)
    assert wait(ranks[1].process) == 0 and ranks[1].right(), "it gets the same result when it wakes up"


def test_a_slow_rank_is_waited_for(tmp_path, agent):
    # Longer than the lease; its heart goes on beating.
    ranks = [
        Rank(0, tmp_path, agent.port, lease=3, others={1: 1}),
        Rank(1, tmp_path, agent.port, lease=3, die_at=1, die=lambda: time.sleep(4)),
    ]
    assert [wait(rank.process) for rank in ranks] == [0, 0]
    assert sorted(ranks[0].begun() + ranks[1].begun()) == list(range(TOTAL)) and len(ranks[1].begun()) == 1


def test_a_rank_asked_to_end_finishes_its_unit(tmp_path, agent):
    ranks = [
        Rank(0, tmp_path, agent.port, lease=60, others={1: 2}),
        Rank(1, tmp_path, agent.port, lease=60, die_at=2, die=lambda: os.kill(os.getpid(), signal.SIGTERM)),
    ]
    assert [wait(rank.process) for rank in ranks] == [0, -signal.SIGTERM]
    assert sorted(ranks[0].begun() + ranks[1].begun()) == list(range(TOTAL))


def test_one_process_goes_on_where_many_were_killed_and_the_other_way_round(tmp_path, agent):
    ranks = [Rank(rank, tmp_path, agent.port, die_at=3) for rank in range(2)]
    assert [wait(rank.process) for rank in ranks] == [-signal.SIGKILL] * 2
    store = Store.open(tmp_path / "out", MANIFEST)
    done = store.done()
    assert len(done) == 4
    again = []
    found = run_units(TOTAL, lambda unit, advance: again.append(unit) or compute(unit), store, progress=False)
    for unit, tensors in found:
        assert same(tensors, compute(unit))
        if len(again) == 3:
            break
    found.close()
    assert not done & set(again)
    port = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    ranks = [Rank(rank, tmp_path, port.port, lease=60) for rank in range(2)]
    assert [wait(rank.process) for rank in ranks] == [0, 0] and all(rank.right() for rank in ranks)
    assert sorted(ranks[0].begun() + ranks[1].begun() + again) == sorted(set(range(TOTAL)) - done)


class Twice(Rank):
    """The first run of the process group fails on every rank; the same run again then has to do the rest."""

    def run(self):
        def fail():
            raise MemoryError

        self.die, work = fail, self.work
        self.work = lambda: None
        super().run()
        with pytest.raises(MemoryError):
            work()
        dist.barrier()
        self.die_at = None
        work()


class Joined(Rank):
    """A rank without a process group, as torchrun starts it."""

    def run(self):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "RANK": str(self.rank)}
        os.environ |= {"WORLD_SIZE": str(self.world), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        assert units.join() == place() == (self.rank, self.world) and not dist.is_initialized()
        self.work()


def test_a_rank_started_again_is_not_waited_for(tmp_path, agent):
    ranks = [
        Joined(0, tmp_path, agent.port, lease=600, others={1: 2}),
        Joined(1, tmp_path, agent.port, lease=600, die_at=2),
    ]
    assert wait(ranks[1].process) == -signal.SIGKILL
    again = Joined(1, tmp_path, agent.port, lease=600)
    assert [wait(rank.process) for rank in (ranks[0], again)] == [0, 0] and ranks[0].right() and again.right()


def test_the_same_run_again_in_one_process_group(tmp_path, agent):
    ranks = [Twice(rank, tmp_path, agent.port, die_at=2, lease=60) for rank in range(2)]
    assert [wait(rank.process) for rank in ranks] == [0, 0] and all(rank.right() for rank in ranks)


def test_folders_that_are_not_shared_are_told(tmp_path, agent, capfd):
    ranks = [Rank(rank, tmp_path, agent.port, own=True) for rank in range(2)]
    assert 1 in [wait(rank.process) for rank in ranks], "the other one may then do all the work itself"
    assert "on storage that all ranks share" in capfd.readouterr().err


def test_many_processes_need_a_store(monkeypatch):
    monkeypatch.setattr(units, "place", lambda: (0, 2))
    with pytest.raises(InvalidArgumentError, match="2 processes share this run.*pass out="):
        next(run_units(3, compute))


def test_ranks_that_did_not_join_are_told_to(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    store = Store.open(tmp_path, MANIFEST)
    with store.lock(), pytest.raises(StoreError, match=r"call join\(\) \(from bkdfast.jobs.units import join\)"):
        list(run_units(3, compute, Store.open(tmp_path, MANIFEST), progress=False))


def test_one_process_without_a_store():
    assert place() == (0, 1) and LEASE > 10
    found = list(
        run_units(3, lambda unit, advance: {"x": torch.tensor(float(unit), requires_grad=True)}, progress=False)
    )
    assert [unit for unit, _ in found] == [0, 1, 2] and not found[2][1]["x"].requires_grad
    assert list(run_units(0, compute, progress=False)) == []


def test_the_bar_counts_what_was_there_as_done(tmp_path, capsys):
    store = Store.open(tmp_path, MANIFEST)
    costs = [0.1, 0.2, 0.7]
    store.put(2, compute(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bars = []
        for _ in run_units(3, compute, store, costs=costs, description="heads"):
            bars.append(capsys.readouterr().err)
    shown = "".join(bars) + capsys.readouterr().err
    assert "heads:  70%" in shown and "1/3 units" in shown
    assert "heads: 100%" in shown and "3/3 units" in shown


def test_a_bar_in_bytes_names_what_is_in_hand(capsys):
    names = ["a.weight", "b.weight"]
    shown = []
    for _ in run_units(2, compute, costs=[3e6, 1e6], labels=names, description="delta"):
        shown.append(capsys.readouterr().err)
    shown[1] += capsys.readouterr().err
    assert "delta:  75%" in shown[1] and "4.00M/4.00M" in shown[1]
    assert "a.weight" in shown[0] and "b.weight" not in shown[0] and "b.weight" in shown[1] and "units" not in shown[1]


def test_the_bar_never_runs_beyond_its_end(tmp_path, capsys):
    """Costs are added up in another order than they are summed."""

    def stepwise(unit, advance):
        for _ in range(3):
            advance(costs[unit] / 3)
        return compute(unit)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(20):
            draw = random.Random(seed)
            costs = [1e9 * draw.random() for _ in range(30)]
            list(run_units(30, stepwise, costs=costs))
        store = Store.open(tmp_path, MANIFEST)
        for _ in range(2):
            list(run_units(30, stepwise, store, costs=costs))
    assert "100%" in capsys.readouterr().err


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch.distributed as dist
from bkdfast.jobs.store import Store
from bkdfast.jobs.units import join, run_units
from tests.jobs.processes import compute, same
rank, world = join()
assert world == 2 and not dist.is_initialized()
folder = Path(sys.argv[1])
def logged(unit, advance=None):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    with open(folder / "log", "a") as file:
        file.write(f"{unit}\\n")
    while first and rank == 1 and unit > 5 and not (folder / "began0").exists():
        time.sleep(0.05)
    (folder / f"began{rank}").touch()
    if first and rank == 0 and unit > 5:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1.5 if first and unit > 5 else 0.05)
    return compute(unit)
found = dict(run_units(12, logged, Store.open(folder / "out", {"seed": 0})))
assert all(same(found[unit], compute(unit)) for unit in range(12))
(folder / f"right{rank}").touch()
"""


@pytest.mark.slow
def test_torchrun_restarts_and_goes_on(tmp_path):
    """The agent ends the other rank too, which finishes its unit first: nothing is lost but the killed rank's."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, tmp_path / "script.py", tmp_path], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "right0").exists() and (tmp_path / "right1").exists()
    begun = [int(unit) for unit in (tmp_path / "log").read_text().split()]
    assert len(begun) == 13 and set(begun) == set(range(12))
