"""Both models are never in memory: the peak of the resident set, measured in a process of its own."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

SHAPE, TENSORS = (4096, 2048), 16
PAIR = 2 * 2 * SHAPE[0] * SHAPE[1]  # bytes of both sides, bfloat16

SCRIPT = """
    import sys
    import torch
    if sys.argv[1] != "nothing":
        import bkdfast as bf
        bf.{call}
    status = open("/proc/self/status").read()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """0.27 GB a side, in 2 and in 5 shards."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    w = torch.randn(SHAPE)
    change = torch.randn(SHAPE[0], 4) @ torch.randn(4, SHAPE[1])
    for side, shards in (("base", 2), ("tuned", 5)):
        (folder / side).mkdir()
        for shard in range(shards):
            tensors = {
                f"layers.{i:02d}.weight": (w * (1 + i / 8) + (0.01 * change if side == "tuned" else 0)).bfloat16()
                for i in range(shard, TENSORS, shards)
            }
            save_file(tensors, folder / side / f"model-{shard}.safetensors")
    return folder


def peak(folder, call: str) -> int:
    """Bytes of the largest resident set of a process that makes the call."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT).format(call=call or "x"), call or "nothing", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize(
    "call",
    [
        'delta_svd(sys.argv[2] + "/base", sys.argv[2] + "/tuned", rank=4, progress=False)',
        'delta_norms(sys.argv[2] + "/base", sys.argv[2] + "/tuned", progress=False)',
    ],
    ids=["svd", "norms"],
)
def test_peak_is_three_pairs_over_torch(checkpoints, call):
    used = peak(checkpoints, call) - peak(checkpoints, "")
    print(f"{used / 1e6:.0f} MB over torch, of which three pairs are {3 * PAIR / 1e6:.0f}")
    assert PAIR < used < 3 * PAIR + 100e6 < TENSORS * PAIR, "the last is both models"
