"""A delta SVD that is killed, and one of several processes: the same bits, and nothing computed twice."""

import copy
import os
import shutil
import signal
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from bkdfast.errors import CheckpointError, InvalidArgumentError, StoreError
from bkdfast.jobs import store as store_module
from bkdfast.svd import DeltaSVD, artifact, delta_svd
from bkdfast.svd.settings import Settings
from tests.jobs import processes
from tests.jobs.processes import finished, wait_for_units
from tests.svd.matrices import llama, tune

TENSORS = 16  # two layers of seven, embedding and head

SCRIPT = """
    import sys, time, torch
    import bkdfast as bf
    from bkdfast.svd.settings import Settings

    torch.set_num_threads(1)
    folder, factor = sys.argv[1], Settings.factor_all

    def slow(self, pairs):
        with open(sys.argv[2], "a") as log:
            log.write("".join(f"{pair.name}\\n" for pair in pairs))
        time.sleep(0.05)
        return factor(self, pairs)

    Settings.factor_all = slow
    if len(sys.argv) > 3:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{sys.argv[3]}", rank=int(sys.argv[4]), world_size=2
        )
    result = bf.delta_svd(f"{folder}/base", f"{folder}/tuned", rank=4, out=f"{folder}/out", progress=False)
    parts = [part for d in result.values() for part in (d.u, d.s, d.v, d.residual)]
    print(result.metadata["tuned_hash"], *(float(part.double().sum()).hex() for part in parts))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder, base = tmp_path_factory.mktemp("pair"), llama()
    base.save_pretrained(folder / "base", max_shard_size="40KB")
    tune(base).save_pretrained(folder / "tuned", max_shard_size="70KB")
    return folder


@pytest.fixture
def folder(checkpoints, tmp_path):
    for side in ("base", "tuned"):
        (tmp_path / side).symlink_to(checkpoints / side)
    return tmp_path


def start(folder, *more):
    return processes.start(SCRIPT, folder, folder, folder / f"log{len(more) and more[-1]}", *more)


def run(folder, **more):
    return delta_svd(folder / "base", folder / "tuned", **{"rank": 4, "progress": False, **more})


def same(a: DeltaSVD, b: DeltaSVD) -> bool:
    parts = ("u", "s", "v", "residual", "angle", "subspace", "dimension")
    scalars = ("shape", "frobenius", "changed", "passes", "converged", "note")
    return (
        list(a) == list(b)
        and all(torch.equal(getattr(a[n], p), getattr(b[n], p)) for n in a for p in parts)
        and all(getattr(a[n], p) == getattr(b[n], p) for n in a for p in scalars)
        and (a.skipped, a.tied, a.metadata) == (b.skipped, b.tied, b.metadata)
    )


@pytest.fixture(scope="module")
def undisturbed(checkpoints) -> str:
    return finished(start(checkpoints))


def test_killed_and_continued(folder, undisturbed):
    for units in (3, 9):
        process = start(folder)
        wait_for_units(folder, units, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (folder / "out" / "delta_svd.safetensors").exists()
    assert finished(start(folder)) == undisturbed
    log = (folder / "log0").read_text().split()
    assert len(set(log)) == TENSORS
    assert len(log) <= TENSORS + 2, "at most the tensor in flight is computed again at each kill"


def test_two_processes_of_which_one_is_killed(folder, undisturbed):
    ranks = [start(folder, str(folder / "rendezvous"), str(rank)) for rank in range(2)]
    wait_for_units(folder, 4, ranks[0])
    ranks[1].send_signal(signal.SIGKILL)
    assert finished(ranks[0]) == undisturbed
    assert (folder / "log1").read_text(), "the killed one had taken part"
    ranks[1].communicate()


def test_two_processes_share_the_tensors(folder, undisturbed):
    ranks = [start(folder, str(folder / "rendezvous"), str(rank)) for rank in range(2)]
    assert [finished(rank) for rank in ranks] == [undisturbed] * 2
    logs = [(folder / f"log{rank}").read_text().split() for rank in range(2)]
    assert sorted(logs[0] + logs[1]) == sorted(set(logs[0] + logs[1])) and min(map(len, logs)) > 0
    assert set(os.listdir(folder / "out")) == {
        "manifest.json", "lock", "delta_svd.safetensors", *(f"unit-{i:05d}.safetensors" for i in range(TENSORS)),
    }  # fmt: skip


def test_a_folder_changes_nothing(folder):
    got = run(folder, out=folder / "out")
    assert same(got, run(folder)) and same(got, DeltaSVD.load(folder / "out" / "delta_svd.safetensors"))


def test_finished_tensors_are_not_read_again(folder, monkeypatch):
    from bkdfast.svd.reader import TensorFile

    first = run(folder, out=folder / "out")
    (folder / "out" / "delta_svd.safetensors").unlink()
    monkeypatch.setattr(Settings, "factor_all", lambda *_, **__: pytest.fail("everything is there"))
    monkeypatch.setattr(TensorFile, "read", lambda *_, **__: pytest.fail("nothing is to be read"))
    assert same(run(folder, out=folder / "out"), first)
    assert same(first, DeltaSVD.load(folder / "out" / "delta_svd.safetensors"))


def test_the_largest_tensors_come_first(folder, monkeypatch):
    seen, factor = [], Settings.factor_all

    def logged(self, pairs):
        seen.extend(pair.w0.nbytes + pair.w1.nbytes for pair in pairs)
        return factor(self, pairs)

    monkeypatch.setattr(Settings, "factor_all", logged)
    got = run(folder, out=folder / "out")
    assert seen == sorted(seen, reverse=True) and len(set(seen)) > 2
    assert list(got) == sorted(got), "the result has the model's order"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank=5), "other settings: settings.rank was 4 and is 5 now"),
        (dict(rank=None, energy=0.9), "other settings: settings.rank was 4 and is null now"),
        (dict(seed=1), "other settings: settings.seed was 0 and is 1 now"),
        (dict(tolerance=1e-3), "other settings: settings.tolerance was 0.0001 and is 0.001 now"),
        (dict(include="*.mlp.*"), "another base model: base.tensors was 16 and is 6 now"),
    ],
)
def test_a_folder_of_other_settings_is_refused(folder, changes, message):
    first = run(folder, out=folder / "out")
    with pytest.raises(InvalidArgumentError, match="pass another out=, or delete the folder") as caught:
        run(folder, out=folder / "out", **changes)
    assert message in str(caught.value)
    assert same(run(folder, out=folder / "out"), first)


def test_a_rule_is_a_setting_too(folder, monkeypatch):
    first = run(folder, out=folder / "out", rank=None, energy=0.8)
    assert len({delta.rank for delta in first.values()}) > 1
    told = {"rank": None, "energy": 0.8, "tol": None, "max_rank": 128}
    assert told.items() <= DeltaSVD.load(folder / "out" / "delta_svd.safetensors").metadata.items()
    monkeypatch.setattr(Settings, "factor_all", lambda *_, **__: pytest.fail("everything is there"))
    for rule in ({}, {"max_rank": 128}):
        assert same(run(folder, out=folder / "out", rank=None, energy=0.8, **rule), first)
    for rule, message in (
        ({"energy": 0.5}, "settings.energy was 0.8 and is 0.5 now"),
        ({"tol": 0.5}, "settings.energy was 0.8 and is null now"),
        ({"energy": 0.8, "max_rank": 100}, "settings.max_rank was 128 and is 100 now"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            run(folder, out=folder / "out", rank=None, **rule)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_folder_of_other_weights_is_refused(folder, checkpoints, side):
    """Of one entry, with the sizes of all files and the headers as they were."""
    first = run(folder, out=folder / "out")
    (folder / side).unlink()
    shutil.copytree(checkpoints / side, folder / side)
    assert same(run(folder, out=folder / "out"), first), "a copy of the same files is taken"
    name = "model.layers.1.self_attn.o_proj.weight"
    for file in sorted((folder / side).glob("*.safetensors")):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][3, 4] += 1
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InvalidArgumentError, match=f"results of another {side} model: the values of {name}"):
        run(folder, out=folder / "out")
    assert DeltaSVD.load(folder / "out" / "delta_svd.safetensors").metadata == first.metadata


def test_models_in_memory_go_on_and_are_told_apart(tmp_path):
    base = llama()
    tuned = tune(base)
    first = delta_svd(base, tuned, rank=4, out=tmp_path, progress=False)
    assert same(delta_svd(base, tuned, rank=4, out=tmp_path, progress=False), first)
    other = copy.deepcopy(tuned)
    with torch.no_grad():
        other.lm_head.weight[1, 1] += 1
    with pytest.raises(InvalidArgumentError, match="another tuned model: the values of lm_head.weight"):
        delta_svd(base, other, rank=4, out=tmp_path, progress=False)
    (tmp_path / "delta_svd.safetensors").unlink()
    (tmp_path / "unit-00003.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="unit-00003.safetensors is damaged.*computed again"):
        assert same(delta_svd(base, tuned, rank=4, out=tmp_path, progress=False), first)


def test_without_resume_finished_work_is_refused(folder):
    run(folder, out=folder / "out", resume=False)
    with pytest.raises(InvalidArgumentError, match=f"{TENSORS} finished units of this run already"):
        run(folder, out=folder / "out", resume=False)


def test_a_folder_that_is_something_else(folder):
    with pytest.raises(InvalidArgumentError, match=r"is not a result store: it has no manifest\.json"):
        run(folder, out=folder / "base")
    assert not list((folder / "base").glob("unit-*"))


def test_a_full_disk_loses_nothing(folder, monkeypatch):
    write, calls = store_module._write, []

    def full(path, data):
        calls.append(path)
        if len(calls) > 6:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(store_module, "_write", full)
    with pytest.raises(
        StoreError, match=r"cannot write unit 5 to .*: No space left on device; finished units are kept"
    ):
        run(folder, out=folder / "out")
    monkeypatch.undo()
    assert len(list((folder / "out").glob("unit-*"))) == 5 and not list((folder / "out").glob(".*.tmp"))
    assert same(run(folder, out=folder / "out"), run(folder))


def test_a_disk_that_is_full_at_the_end_keeps_the_units(folder, monkeypatch):
    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "save_file", full)
    with pytest.raises(StoreError, match=r"delta_svd\.safetensors: No space left on device; finished units are kept"):
        run(folder, out=folder / "out")
    monkeypatch.undo()
    assert len(list((folder / "out").glob("unit-*"))) == TENSORS
    assert not (folder / "out" / "delta_svd.safetensors").exists() and not list((folder / "out").glob(".*.tmp"))
    monkeypatch.setattr(Settings, "factor_all", lambda *_, **__: pytest.fail("everything is there"))
    run(folder, out=folder / "out")


def test_read_only_output_shows_before_anything_is_read(folder, monkeypatch):
    from bkdfast.svd.reader import TensorFile

    def denied(path, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store_module, "_write", denied)
    monkeypatch.setattr(TensorFile, "read", lambda *_, **__: pytest.fail("nothing is to be read"))
    with pytest.raises(StoreError, match="Permission denied; nothing was computed yet"):
        run(folder, out=folder / "out")


def test_a_shard_that_vanishes_leaves_what_is_finished(folder, checkpoints, monkeypatch):
    (folder / "tuned").unlink()
    shutil.copytree(checkpoints / "tuned", folder / "tuned")
    done, factor = [], Settings.factor_all

    def vanishing(self, pairs):
        done.extend(pairs)
        if len(done) == 4:
            for file in (folder / "tuned").glob("model-*.safetensors"):
                file.rename(f"{file}.away")
        return factor(self, pairs)

    monkeypatch.setattr(Settings, "factor_all", vanishing)
    with pytest.raises(CheckpointError, match="cannot read .*No such file"):
        run(folder, out=folder / "out")
    monkeypatch.undo()
    kept = len(list((folder / "out").glob("unit-*")))
    assert kept in (4, 5), "the next pair may have been read ahead"
    for file in (folder / "tuned").glob("*.away"):
        file.rename(str(file).removesuffix(".away"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(run(folder, out=folder / "out"), run(folder))
