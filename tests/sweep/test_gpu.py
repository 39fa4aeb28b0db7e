"""Sweeps on a GPU say what they say on the CPU. Skipped, test by test, where there is no GPU."""

from __future__ import annotations

import pytest
import torch

import bkdfast as bf
from tests.hf import zoo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
METRIC = bf.metrics.target_logprob([5, 6, 7])


@pytest.mark.parametrize("site", ["heads", "attention", "mlp", "residual"])
@pytest.mark.parametrize("at", ["last_prompt", "all"])
@pytest.mark.parametrize("family", zoo.DECODERS)
def test_as_on_the_cpu(family, at, site):
    options = dict(edit=bf.Scale(0.3), at=at, site=site, metric=METRIC, progress=False)
    expected = bf.sweep(zoo.build(family), zoo.batch(), **options)
    found = bf.sweep(zoo.build(family).cuda(), zoo.batch(), verify=4, **options)
    assert expected.effects.abs().max() > 1e-2
    torch.testing.assert_close(found.effects, expected.effects, atol=1e-3, rtol=1e-2)  # cuBLAS may use TF32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_the_kernel(dtype):
    found = bf.sweep(
        zoo.build("llama", dtype=dtype).cuda(), zoo.batch(), edit=bf.Zero(), at="last_prompt", metric=METRIC, verify=6,
        progress=False,
    )  # fmt: skip
    assert found.effects.isfinite().all() and found.facts["shared_prefix"]


def test_out_of_memory_is_an_error_of_torch():
    model = zoo.build("llama").cuda()
    free = torch.cuda.mem_get_info()[0]
    hold = torch.empty(int(free * 0.995), dtype=torch.uint8, device="cuda")
    ids = torch.randint(3, zoo.VOCAB, (4096, 100))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(torch.OutOfMemoryError):
        bf.sweep(model, batch, edit=bf.Zero(), metric=METRIC, progress=False)
    del hold
