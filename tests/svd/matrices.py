"""Matrices with a known spectrum, tiny models, and angles between subspaces."""

import torch

FP64 = torch.float64


def with_spectrum(m, n, s, seed=0):
    """`U diag(s) V^T` [m, n] in float64 with random singular vectors."""
    g = torch.Generator().manual_seed(seed)
    s = torch.as_tensor(s, dtype=FP64)
    u = torch.linalg.qr(torch.randn(m, len(s), dtype=FP64, generator=g))[0]
    v = torch.linalg.qr(torch.randn(n, len(s), dtype=FP64, generator=g))[0]
    return (u * s) @ v.T


def pair(delta, dtypes=(torch.float32, torch.float32), scale=0.02, seed=1):
    """Base and tuned weights whose difference is `delta` up to the rounding of `dtypes`, and that exact difference."""
    g = torch.Generator().manual_seed(seed)
    w0 = (scale * torch.randn(delta.shape, dtype=FP64, generator=g)).to(dtypes[0])
    w1 = (w0.double() + delta).to(dtypes[1])
    return w0, w1, w1.double() - w0.double()


def sin_theta(a, b):
    """Sine of the largest angle between the column spans of a and b."""
    a, b = torch.linalg.qr(a.double())[0], torch.linalg.qr(b.double())[0]
    return torch.linalg.matrix_norm(b - a @ (a.T @ b), 2).item()


def llama(seed=0, tied=False, **overrides):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = LlamaConfig(tie_word_embeddings=tied, **{**sizes, **overrides})
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def gpt2(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()


def tune(model, rank=3, size=0.1, seed=7):
    """A copy with a random low-rank change in every 2-D weight, as an honest fine-tune would leave behind."""
    import copy

    tuned = copy.deepcopy(model)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in tuned.parameters():
            if weight.dim() == 2:
                left = torch.randn(weight.shape[0], rank, generator=g)
                weight += size * (left @ torch.randn(rank, weight.shape[1], generator=g)).to(weight.dtype)
    return tuned
