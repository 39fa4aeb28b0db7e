"""A store keeps finished units whatever happens, and serves no other run."""

import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings

import pytest
import torch

from bkdfast.errors import BkdfastError, InvalidArgumentError, StoreError
from bkdfast.jobs import store as store_module
from bkdfast.jobs import units as units_module
from bkdfast.jobs.store import Store
from bkdfast.jobs.units import run_units
from tests.jobs.processes import SHAPE, compute, end_all, fork, kill_at_line, same, trace_lines, wait

FILES = {store_module.__file__, units_module.__file__}
TOTAL = 5


@pytest.fixture(autouse=True)
def _no_leftovers():
    yield
    end_all()


def manifest(**changes):
    return {
        "weights": {"hash": "aa", "how": "all"},
        "config": {"model_type": "llama", "rope": {"theta": 1.0}},
        "data": {"hash": "bb"},
        "edit": {"type": "Zero", "source": None},
        "metrics": {"target probability": {"targets": [[1, 2]]}},
        "dtype": "float32",
        "seed": 0,
        "units": [[0, 1], [1, 2]],
        "versions": {"torch": "2.13"},
        "machine": {"devices": ["cpu"], "cores": 2},
        "command": "a.py",
        **changes,
    }


def engine(path, log, total=TOTAL):
    """What a run does with its store; the log has a line for each unit computed."""

    def logged(unit, advance=None):
        with open(log, "a") as file:
            file.write(f"{unit}\n")
        return compute(unit)

    return dict(run_units(total, logged, Store.open(path, manifest()), progress=False))


def test_round_trip_of_every_kind_of_tensor(tmp_path):
    store = Store.open(tmp_path / "deep" / "out", manifest())
    base = torch.randn(4, 6)
    tensors = {
        "a": base, "shared": base[0], "strided": base.T, "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3), "bf16": base.bfloat16(), "int": torch.arange(5), "bool": base > 0,
        "nan": torch.tensor([torch.nan, -torch.inf]),
    }  # fmt: skip
    store.put(3, tensors)
    found = store.get(3)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert store.done() == {3}
    assert Store.open(tmp_path / "deep" / "out", manifest()).done() == {3}
    with pytest.raises(StoreError, match="unit 4 cannot be read.*No such file"):
        store.get(4)


def test_killed_at_any_line_it_goes_on_with_the_same_result(tmp_path):
    """SIGKILL before each of many lines of the store and the queue, then again somewhere else, then to the end."""
    lines = 0

    def count():
        nonlocal lines
        lines += 1

    def killed(number, path, log):
        kill_at_line(FILES, number)
        engine(path, log)

    try:
        trace_lines(FILES, count)
        expected = engine(tmp_path / "whole", tmp_path / "log")
    finally:
        sys.settrace(None)
    warnings.simplefilter("error")  # no kill leaves a damaged file
    assert lines > 300
    draw, kept = random.Random(0), []
    for number in range(1, lines, max(1, lines // 24)):
        path, log = tmp_path / "out", tmp_path / "log"
        for at in (number, draw.randrange(1, lines)):
            before = Store.open(path, manifest()).done() if path.exists() else set()
            log.write_text("")
            status = wait(fork(killed, at, path, log))
            assert status in (0, -signal.SIGKILL)
            assert not before & {int(unit) for unit in log.read_text().split()}, "a finished unit was computed again"
        done = Store.open(path, manifest()).done()
        kept.append(len(done))
        log.write_text("")
        found = engine(path, log)
        assert {int(unit) for unit in log.read_text().split()} == set(range(TOTAL)) - done
        assert list(found) == list(expected) and all(same(found[unit], expected[unit]) for unit in expected)
        names = {f"unit-{unit:05d}.safetensors" for unit in range(TOTAL)} | {"manifest.json", "lock"}
        assert set(os.listdir(path)) == names, "temporary files of killed processes are gone"
        shutil.rmtree(path)
    assert len(set(kept)) > 3, "kills at all stages"


def test_killed_at_any_time(tmp_path):
    path, log, draw = tmp_path / "out", tmp_path / "log", random.Random(0)

    def logged(unit, advance=None):
        with open(log, "a") as file:
            file.write(f"{unit}\n")
        time.sleep(0.002)
        return compute(unit)

    def run():
        list(run_units(100, logged, Store.open(path, manifest()), progress=False))

    warnings.simplefilter("error")
    for _ in range(25):
        before = Store.open(path, manifest()).done() if path.exists() else set()
        log.write_text("")
        process = fork(run)
        time.sleep(draw.uniform(0.0, 0.05))
        os.kill(process, signal.SIGKILL)
        wait(process)
        assert not before & {int(unit) for unit in log.read_text().split()}, "a finished unit was computed again"
    run()
    found = dict(run_units(100, pytest.fail, Store.open(path, manifest()), progress=False))
    assert all(same(found[unit], compute(unit)) for unit in range(100))


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "empty":
        data = b""
    elif kind == "zeros":  # what a crash of the machine leaves on some file systems
        data = bytes(len(data))
    elif kind == "flipped bit":
        data[-3] ^= 1
    elif kind == "flipped bit in the header":
        data[20] ^= 1
    elif kind == "longer":
        data += b"\0"
    elif kind == "list":
        data = b"\x02" + bytes(7) + b"[]"
    else:
        data = data[: int(len(data) * kind)]
    path.write_bytes(data)


@pytest.mark.parametrize(
    "kind", ["empty", "zeros", "flipped bit", "flipped bit in the header", "longer", "list", 0.01, 0.5, 0.99]
)
def test_a_damaged_file_is_told_and_computed_again(tmp_path, kind):
    path, log = tmp_path / "out", tmp_path / "log"
    expected = engine(path, log)
    damage(path / "unit-00002.safetensors", kind)
    log.write_text("")
    store = Store.open(path, manifest())
    with pytest.warns(UserWarning, match="unit-00002.safetensors is damaged.*computed again"):
        assert store.done() == {0, 1, 3, 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.done() == {0, 1, 3, 4}, "warned once"
    with pytest.raises(StoreError, match="unit 2 cannot be read.*damaged"):
        store.get(2)
    with pytest.warns(UserWarning, match="damaged"):
        found = engine(path, log)
    assert log.read_text() == "2\n"
    assert all(same(found[unit], expected[unit]) for unit in expected)
    assert Store.open(path, manifest()).done() == {0, 1, 2, 3, 4}


def test_a_file_of_another_unit_or_run_is_not_taken(tmp_path):
    mine, other = Store.open(tmp_path / "a", manifest()), Store.open(tmp_path / "b", manifest(seed=1))
    mine.put(0, compute(0))
    other.put(1, compute(1))
    shutil.copy(tmp_path / "a" / "unit-00000.safetensors", tmp_path / "a" / "unit-00002.safetensors")
    shutil.copy(tmp_path / "b" / "unit-00001.safetensors", tmp_path / "a")
    with pytest.warns(UserWarning, match="belongs to another run or unit"):
        assert mine.done() == {0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(weights={"hash": "xx", "how": "all"}), "results of other weights: weights.hash was aa and is xx now"),
        (dict(config={"model_type": "llama", "rope": {"theta": 2.0}}), "config.rope.theta was 1.0 and is 2.0"),
        (dict(config={"model_type": "llama"}), 'config.rope was {"theta": 1.0} and is nothing'),
        (dict(data={"hash": "cc"}), "results of other prompts: data.hash"),
        (dict(edit={"type": "Patch", "source": {"hash": "d"}}), "results of another edit: edit.type was Zero and is P"),
        (dict(metrics={"rank": {}}), "results of other metrics: metrics.rank was nothing"),
        (dict(metrics={"target probability": {"targets": [[1, 3]]}}), "metrics.target probability.targets was"),
        (dict(dtype="bfloat16"), "another dtype: dtype was float32"),
        (dict(seed=3), "another seed"),
        (dict(units=[[0, 1]]), "another division of the work"),
        (dict(site="mlp"), "another site: site was nothing and is mlp"),
    ],
)
def test_a_store_of_another_run_is_refused(tmp_path, changes, message):
    Store.open(tmp_path / "out", manifest()).put(0, compute(0))
    with pytest.raises(InvalidArgumentError, match="pass another out=, or delete the folder") as caught:
        Store.open(tmp_path / "out", manifest(**changes))
    assert message in str(caught.value)
    assert Store.open(tmp_path / "out", manifest()).done() == {0}


def test_what_only_informs_warns_or_passes(tmp_path):
    Store.open(tmp_path, manifest()).put(0, compute(0))
    with pytest.warns(UserWarning, match="begun with versions.torch 2.13, and goes on with 2.14"):
        store = Store.open(tmp_path, manifest(versions={"torch": "2.14"}))
    assert store.done() == {0} and store.manifest["versions"] == {"torch": "2.13"}
    with pytest.warns(UserWarning, match=r"machine.devices \[\"cpu\"\]"):
        Store.open(tmp_path, manifest(machine={"devices": ["cuda:0"], "cores": 2}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Store.open(tmp_path, manifest(command="b.py", machine={"devices": ["cpu"], "cores": 64}))


def test_a_stored_division_of_the_work_can_be_adopted(tmp_path):
    Store.open(tmp_path, manifest()).put(0, compute(0))
    store = Store.open(tmp_path, manifest(units=[[0, 1, 2]]), adopt=["units"])
    assert store.manifest["units"] == [[0, 1], [1, 2]] and store.done() == {0}


def test_without_resume_finished_units_are_refused(tmp_path):
    Store.open(tmp_path, manifest(), resume=False)
    Store.open(tmp_path, manifest(), resume=False).put(0, compute(0))
    with pytest.raises(InvalidArgumentError, match="1 finished units of this run already; resume it"):
        Store.open(tmp_path, manifest(), resume=False)


def test_folders_that_are_something_else(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("do not lose")
    with pytest.raises(InvalidArgumentError, match=r"no manifest.json, but 1 other files, among them thesis.tex"):
        Store.open(tmp_path / "notes", manifest())
    assert os.listdir(tmp_path / "notes") == ["thesis.tex"]
    with pytest.raises(StoreError, match="cannot hold results: Not a directory"):
        Store.open(tmp_path / "notes" / "thesis.tex" / "out", manifest())
    with pytest.raises(StoreError, match="cannot hold results: File exists"):
        Store.open(tmp_path / "notes" / "thesis.tex", manifest())
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "manifest.json").write_text('{"weights": ')
    with pytest.raises(InvalidArgumentError, match="is not a manifest"):
        Store.open(tmp_path / "torn", manifest())


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_folder_shows_before_the_first_unit(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied; nothing was computed yet"):
        Store.open(tmp_path, manifest())


def test_a_full_disk_loses_nothing(tmp_path):
    store = Store.open(tmp_path, manifest())
    store.put(0, compute(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(StoreError, match=r"cannot write unit 1 to .*: File too large; finished units are kept"):
            store.put(1, compute(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(os.listdir(tmp_path)) == {"manifest.json", "unit-00000.safetensors"}
    store.put(1, compute(1))
    assert store.done() == {0, 1}


def test_a_folder_that_vanishes_is_told(tmp_path):
    store = Store.open(tmp_path / "out", manifest())
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(StoreError, match="cannot write unit 0"):
        store.put(0, compute(0))
    with pytest.raises(StoreError, match="cannot read"):
        store.done()


def test_many_writers_at_once(tmp_path):
    """Also of the same units, and of the manifest; readers never see half a file."""

    def write(seed):
        warnings.simplefilter("error")
        store = Store.open(tmp_path / "out", manifest())
        order = list(range(30))
        random.Random(seed).shuffle(order)
        for unit in order:
            store.put(unit, compute(unit))
            store.done()

    processes = [fork(write, seed) for seed in range(4)]
    assert [wait(process) for process in processes] == [0] * 4
    store = Store.open(tmp_path / "out", manifest())
    assert store.done() == set(range(30)) and len(os.listdir(store.path)) == 31
    assert all(same(store.get(unit), compute(unit)) for unit in range(30))


def test_of_two_results_of_a_unit_the_first_stays(tmp_path):
    store = Store.open(tmp_path, manifest())
    store.put(0, {"scores": torch.zeros(SHAPE)})
    store.put(0, {"scores": torch.ones(SHAPE)})
    assert not store.get(0)["scores"].any()


def test_two_runs_do_not_share_a_store_by_accident(tmp_path):
    store, other = Store.open(tmp_path, manifest()), Store.open(tmp_path, manifest())
    with store.lock(), pytest.raises(StoreError, match=rf"in use by another run \(process {os.getpid()} on"):
        list(run_units(2, compute, other, progress=False))
    with store.lock(shared=True), other.lock(shared=True), pytest.raises(StoreError, match="in use"):
        list(run_units(2, compute, store, progress=False))
    units = run_units(2, compute, store, progress=False)
    next(units)
    del units
    assert len(list(run_units(2, compute, other, progress=False))) == 2


def test_a_killed_run_leaves_no_lock(tmp_path):
    def hold():
        for _ in run_units(2, compute, Store.open(tmp_path, manifest()), progress=False):
            os.kill(os.getpid(), signal.SIGKILL)

    assert wait(fork(hold)) == -signal.SIGKILL
    assert len(list(run_units(2, compute, Store.open(tmp_path, manifest()), progress=False))) == 2


def test_errors_are_ours():
    assert issubclass(StoreError, BkdfastError)
