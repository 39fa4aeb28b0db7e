"""The sweep engine against the slow obvious way: one full forward with a plain hook for every head."""

from __future__ import annotations

import pytest
import torch
import transformers

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError, InvalidTypeError, ModelStateError, NonFiniteError, VerificationError
from bkdfast.sweep import base as base_run
from tests.hf import zoo

ROWS, TOKENS = 3, 9
TARGETS = [[5, 6, 7], [8], [9, 10], [11, 12, 13], [4, 5]]


def data(padding: str | None) -> list[dict[str, torch.Tensor]]:
    """Two batches of different size and length."""
    return [
        zoo.batch(rows=ROWS, tokens=TOKENS, padding=padding),
        zoo.batch(rows=2, tokens=6, padding=padding, seed=9),
    ]


def brute_force(model, batches, edit_z, targets, heads=zoo.HEADS):
    """Effects `[L, H, N]` of `edit_z(z_row, layer, head, last)` on the target log-probability, one forward a head.

    Each sample runs alone and without padding, so nothing of the engine's batching, padding or positions is shared.
    """
    spec = bf.hf.describe(model)
    samples = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            samples.append(ids[mask.bool()])
    effects = torch.full((spec.layers, heads, len(samples)), torch.nan)

    def score(prompt, target):
        ids = torch.cat([prompt, torch.tensor(target)])[None]
        with torch.no_grad():
            logprob = model(input_ids=ids).logits[0].log_softmax(-1)
        return sum(logprob[len(prompt) + i - 1, token] for i, token in enumerate(target)) / len(target)

    for n, prompt in enumerate(samples):
        base, last = score(prompt, targets[n]), len(prompt) - 1
        for layer, block in enumerate(spec.blocks):
            for head in range(block.heads):
                own = slice(head * block.head_dim, (head + 1) * block.head_dim)

                def hook(module, args, layer=layer, head=head, own=own, last=last):
                    z = args[0].clone()
                    z[0, :, own] = edit_z(z[0, :, own], layer, head, last)
                    return (z,)

                handle = model.get_submodule(block.out_proj).register_forward_pre_hook(hook)
                effects[layer, head, n] = score(prompt, targets[n]) - base
                handle.remove()
    return effects


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", zoo.DECODERS)
def test_patch_at_last_prompt_token(family, padding):
    model = zoo.build(family)
    source = torch.randn(zoo.LAYERS, zoo.HEADS, bf.hf.describe(model).blocks[0].head_dim) * 2

    def patch(z, layer, head, last):
        z = z.clone()
        z[last] = source[layer, head]
        return z

    expected = brute_force(model, data(padding), patch, TARGETS)
    metric = bf.metrics.target_logprob(TARGETS)
    found = bf.sweep(
        model, data(padding), edit=bf.Patch(source), at="last_prompt", metric=metric, verify=4, progress=False
    )
    assert expected.abs().amax((1, 2)).min() > 1e-2, "every layer must matter, or the comparison proves nothing"
    torch.testing.assert_close(found.effects, expected, atol=2e-5, rtol=1e-4)
    assert found.facts["largest_error"] < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_zero_at_all_positions(family):
    model = zoo.build(family)
    expected = brute_force(model, data("left"), lambda z, *_: torch.zeros_like(z), TARGETS)
    found = bf.sweep(
        model, data("left"), edit=bf.Zero(), metric=bf.metrics.target_logprob(TARGETS), verify=4, progress=False
    )
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found.effects, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("at", ["prompt", "generated", -2, 1, slice(1, 3), slice(-3, -1), slice(2, None)])
def test_positions_are_relative_to_the_prompt_not_to_the_teacher_forced_row(at):
    model = zoo.build("llama")

    def scale(z, layer, head, last):
        rows = list(range(len(z)))
        prompt, later = rows[: last + 1], rows[last + 1 :]
        chosen = {"prompt": prompt, "generated": later}.get(at) if isinstance(at, str) else None
        if isinstance(at, int):
            chosen = [prompt[at]]
        if isinstance(at, slice):
            chosen = prompt[at] if (at.start or 0) < 0 else rows[at]
        z = z.clone()
        z[chosen] *= 3
        return z

    expected = brute_force(model, data("left"), scale, TARGETS)
    found = bf.sweep(
        model,
        data("left"),
        edit=bf.Scale(3.0),
        at=at,
        metric=bf.metrics.target_logprob(TARGETS),
        verify=3,
        progress=False,
    )
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found.effects, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", zoo.ENCODERS)
def test_encoders(family):
    """No causal suffix there, but the layer prefix holds; against a plain hook on the same padded batch."""
    model, batch = zoo.build(family), zoo.batch(padding="right")
    metric = bf.metrics.logit_diff(5, 6)
    found = bf.sweep(model, batch, edit=bf.Zero(), metric=metric, progress=False)
    spec = bf.hf.describe(model)
    last = batch["attention_mask"].sum(1) - 1
    for layer, block in enumerate(spec.blocks):
        for head in range(block.heads):

            def hook(module, args, head=head, dim=block.head_dim):
                z = args[0].clone()
                z[..., head * dim : (head + 1) * dim] = 0
                return (z,)

            handle = model.get_submodule(block.out_proj).register_forward_pre_hook(hook)
            with torch.no_grad():
                logits = model(**batch).logits[torch.arange(len(last)), last]
            handle.remove()
            torch.testing.assert_close(
                found.effects[layer, head] + found.baseline, logits[:, 5] - logits[:, 6], atol=1e-4, rtol=1e-4
            )
    assert found.effects.abs().max() > 0.1


def test_variants_that_share_a_batch_do_not_disturb_each_other():
    model = zoo.build("llama")
    runs = [
        bf.sweep(
            model, data("left"), edit=bf.Zero(), metric=bf.metrics.target_prob(TARGETS), variants=n, progress=False
        ).effects
        for n in (1, 3, 4)
    ]
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], atol=1e-6, rtol=1e-4)


def test_blocks_before_the_edit_do_not_run():
    model, calls = zoo.build("llama"), []
    for layer, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda m, a, o, layer=layer: calls.append(layer))
    bf.sweep(
        model,
        zoo.batch(),
        edit=bf.Zero(),
        metric=bf.metrics.target_prob([5]),
        heads=[(2, 0), (2, 3)],
        variants=2,
        progress=False,
    )
    assert calls == [0, 1, 2, 2], "the base run, then only the edited layer's block"


def test_the_model_is_left_as_it_was():
    model, batch = zoo.build("gpt2"), zoo.batch()
    with torch.no_grad():
        before = model(**batch).logits
    with pytest.raises(InvalidTypeError, match="input_ids"):
        bf.sweep(model, [batch, {}], edit=bf.Zero(), metric=bf.metrics.target_prob([5]), progress=False)
    bf.sweep(model, batch, edit=bf.Zero(), metric=bf.metrics.target_prob([5]), progress=False)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)


@pytest.mark.parametrize("broken", ["dropped", "off by one token", "wrong head"])
def test_verify_goes_red_when_the_engine_is_wrong(monkeypatch, broken):
    """Mutation test: an engine that edits nothing, the wrong token or the wrong head must not pass."""
    right = base_run.lower

    def wrong(edits, spec, *, variants, last, **options):
        if broken == "dropped":
            variants = [[bf.Scale(1.0, e.layer, e.head, at=e.at) for e in variant] for variant in variants]
        if broken == "wrong head":
            variants = [[edit.to(head=(edit.head + 1) % zoo.HEADS) for edit in variant] for variant in variants]
        if broken == "off by one token":
            last = [position - 1 for position in last]
        return right(edits, spec, variants=variants, last=last, **options)

    monkeypatch.setattr(base_run, "lower", wrong)
    source = torch.randn(zoo.LAYERS, zoo.HEADS, 16) * 2
    with pytest.raises(VerificationError, match="plain hook"):
        bf.sweep(
            zoo.build("llama"),
            zoo.batch(),
            edit=bf.Patch(source),
            at="last_prompt",
            metric=bf.metrics.target_logprob([5]),
            verify=8,
            progress=False,
        )


def test_untested_families_are_verified_by_default():
    import transformers as hf

    torch.manual_seed(0)
    config = hf.GPTNeoConfig(
        vocab_size=67, hidden_size=48, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with pytest.warns(UserWarning, match="not in the tested list"):
        result = bf.sweep(model, zoo.batch(), edit=bf.Zero(), metric=bf.metrics.target_logprob([5]), progress=False)
    assert result.facts["verified_cells"] == 4


def test_out_of_memory_halves_the_batch(monkeypatch):
    model = zoo.build("llama")
    run, sizes = base_run.BaseRun.scores, []

    def limited(self, variants, start):
        sizes.append(len(variants))
        if len(variants) > 1:
            raise torch.OutOfMemoryError("pretend")
        return run(self, variants, start)

    monkeypatch.setattr(base_run.BaseRun, "scores", limited)
    options = dict(edit=bf.Zero(), metric=bf.metrics.target_prob([5]), progress=False)
    small = bf.sweep(model, zoo.batch(), variants=4, **options)
    assert sizes == [4, 2, *[1] * 12], "once it is known what fits, nothing larger is tried"
    monkeypatch.undo()
    torch.testing.assert_close(small.effects, bf.sweep(model, zoo.batch(), variants=1, **options).effects)


def sweep_with(model=None, batch=None, **options):
    options = {"edit": bf.Zero(), "metric": bf.metrics.target_prob([5]), "progress": False, **options}
    return bf.sweep(model or zoo.build("llama"), zoo.batch() if batch is None else batch, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch=[]), "no data"),
        (dict(batch={"input_ids": zoo.batch()["input_ids"]}), "row 1 is padded on the left .* no attention_mask"),
        (dict(batch={"input_ids": torch.zeros(0, 3, dtype=torch.long)}), "non-empty tensor"),
        (dict(heads=[(0, 4)]), r"head \(0, 4\) is out of range"),
        (dict(heads=[]), "heads= is empty"),
        (dict(edit=bf.Zero(1)), "fills in layer and head itself"),
        (dict(edit=bf.Zero(rows=0)), "fills in layer and head itself"),
        (dict(edit=bf.Patch(torch.zeros(3, 4, 7))), r"shape \(3, 4, 7\)"),
        (dict(metric=bf.metrics.target_prob([[5], [6], [7], [8]])), "targets for 4 samples, but the data has 3"),
        (dict(metric=bf.metrics.logit_diff([5, 6], 7)), "targets for 2 samples, but the data has 3"),
        (dict(metric=bf.metrics.target_prob([[5], [6]])), "targets for 2 samples, but the data has 3"),
        (dict(metric=bf.metrics.target_prob([5] * 200)), "do not fit the model's context of 128"),
        (dict(variants=0), "at least one head"),
        (dict(at="first_prompt"), "is not one of"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        sweep_with(**options)


def test_padding_row_without_tokens():
    batch = zoo.batch()
    batch["attention_mask"][1] = 0
    with pytest.raises(InvalidArgumentError, match="row 1 of the batch is all padding"):
        sweep_with(batch=batch)


def test_nan_weights_are_named():
    model = zoo.build("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="sample 0 is nan without any edit"):
        sweep_with(model=model)


def test_dropout_is_refused():
    model = zoo.build("gpt2").train()
    with pytest.raises(ModelStateError, match=r"model.eval\(\)"):
        sweep_with(model=model)


def test_empty_target():
    with pytest.raises(InvalidArgumentError, match="target 1 is empty"):
        bf.metrics.target_prob([[5], []])


def test_probability_does_not_underflow_in_a_long_target():
    """The published code multiplies probabilities: 150 tokens at 0.5 are 0 in float32. Log space keeps 0.5."""
    metric = bf.metrics.target_prob([1] * 150)
    scored = metric.extend({"input_ids": torch.ones(1, 2, dtype=torch.long)}, 0)
    logits = torch.zeros(1, 150, 2)
    assert metric.score(logits, scored).item() == pytest.approx(0.5)


def test_result_table_and_ranking():
    result = sweep_with()
    frame = result.to_pandas()
    assert len(frame) == zoo.LAYERS * zoo.HEADS and frame.effect.is_monotonic_decreasing
    assert result.top(1)[0] == (frame.layer[0], frame["head"][0])
    assert result.top(2, by="decrease")[0] == tuple(frame.iloc[-1][["layer", "head"]].astype(int))
    with pytest.raises(InvalidArgumentError, match="k=99"):
        result.top(99)


def test_numbers_that_would_mean_something_else_are_refused():
    options = dict(edit=bf.Zero(), metric=bf.metrics.target_prob([5]), progress=False)
    with pytest.raises(InvalidArgumentError, match="LlamaModel has no head"):
        bf.sweep(zoo.build("llama").model, zoo.batch(), **options)
    with pytest.raises(InvalidArgumentError, match="in bert attention looks ahead"):
        bf.sweep(zoo.build("bert"), zoo.batch(), **options)
    classifier = transformers.AutoModelForSequenceClassification.from_config(zoo.CONFIGS["llama"]()).eval()
    with pytest.raises(InvalidArgumentError, match=r"logits of every token.*returns \(3, 2\)"):
        bf.sweep(classifier, zoo.batch(tokens=2, padding=None), **{**options, "metric": bf.metrics.logit_diff(0, 1)})
    types = torch.ones(3, 11, dtype=torch.long)
    with pytest.raises(InvalidArgumentError, match="cannot extend .'token_type_ids'"):
        bf.sweep(zoo.build("llama"), dict(zoo.batch(), token_type_ids=types), **options)
    source = torch.zeros(3, zoo.LAYERS, zoo.HEADS, 16)
    with pytest.raises(InvalidArgumentError, match="a source for each row, but there are 2 batches"):
        bf.sweep(zoo.build("llama"), [zoo.batch(), zoo.batch(seed=2)], **{**options, "edit": bf.Patch(source)})


@pytest.mark.parametrize("at", ["all", slice(2, None)])
def test_verify_with_a_source_for_each_token(at):
    """The teacher-forced rows are longer than the source."""
    model, batch = zoo.build("llama"), zoo.batch()
    source = bf.head_outputs(model, zoo.batch(seed=5), at="all")
    source = source if at == "all" else source[:, :4]
    metric = bf.metrics.target_logprob([5, 6])
    result = bf.sweep(model, batch, edit=bf.Patch(source), at=at, metric=metric, verify=6, progress=False)
    assert result.effects.abs().max() > 0.1


def test_rotary_frequencies_that_depend_on_the_length():
    """LongRoPE takes other frequencies for long rows: a prefix alone would get those of a short one."""
    torch.manual_seed(0)
    half = 16 // 2
    config = zoo.CONFIGS["phi3"]()
    config.original_max_position_embeddings = 8
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
        "original_max_position_embeddings": 8,
    }
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 if weight.dim() > 1 else weight)
    metric = bf.metrics.target_logprob([5, 6])
    result = bf.sweep(
        model, zoo.batch(padding=None), edit=bf.Zero(), at="last_prompt", metric=metric, verify=6, progress=False
    )
    assert not result.facts["shared_prefix"] and result.effects.abs().max() > 0.01
    assert result.facts["largest_error"] < 1e-5
