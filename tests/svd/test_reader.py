"""Tensors read into memory of their own are what safetensors says they are; what is wrong with a file is told."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from bkdfast.errors import CheckpointError
from bkdfast.svd import reader
from bkdfast.svd.reader import TensorFile

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def same(one, other):
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    )


@pytest.fixture
def path(tmp_path):
    tensors = {str(dtype): (8 * torch.randn(5, 3)).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "row": torch.arange(7.0)}
    save_file(tensors | {"stack": torch.randn(4, 6, 5)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_every_dtype_and_shape(path, chunk, monkeypatch):
    monkeypatch.setattr(reader, "_CHUNK", chunk)
    file, expected = TensorFile(path), load_file(path)
    assert set(file.entries) == set(expected)
    for name, tensor in expected.items():
        assert file.entries[name].shape == tuple(tensor.shape) and file.entries[name].nbytes == tensor.nbytes
        assert same(file.read(name), tensor), name


def test_rows_are_read_alone(path):
    file, stack = TensorFile(path), load_file(path)["stack"]
    for start, stop in ((0, 1), (2, 3), (1, 4), (3, 99), (2, None), (2, 2)):
        assert same(file.read("stack", start, stop), stack[start:stop])
    assert file.read("stack", 2, 3).untyped_storage().nbytes() == 6 * 5 * 4


def test_a_file_that_changes_is_told(path):
    file = TensorFile(path)
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"abcd")
    with pytest.raises(CheckpointError, match=r"x\.safetensors was changed while it was being read \(at row\)"):
        file.read("row")
    assert TensorFile(path).stamp != file.stamp
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read row from .*No such file"):
        file.read("row")


def test_the_stamp_changes_with_the_times_only(path):
    before = TensorFile(path).stamp
    assert len(before) == 32 and TensorFile(path).stamp == before
    file = TensorFile(path)
    path.chmod(0o600)
    file.read("row")  # its contents are the same
    os.utime(path, ns=(1, 1))
    assert TensorFile(path).stamp != before


@pytest.mark.parametrize("content", [b"", b"\x05" + bytes(7) + b"[1,2]", b"\xff" * 40, b"\x02" + bytes(7) + b"{}"[:1]])
def test_what_is_no_safetensors_file(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a safetensors file"):
        TensorFile(tmp_path / "x")


def test_a_dtype_that_torch_lacks(path):
    text = path.read_bytes().replace(b'"I16"', b'"X16"')
    path.write_bytes(text)
    file = TensorFile(path)
    assert file.entries["torch.int16"].dtype is None
    with pytest.raises(CheckpointError, match=r"torch\.int16 of .* has a dtype that torch lacks"):
        file.read("torch.int16")
