"""Sweeps of attention outputs, MLP outputs and the residual stream, and the sources that users make for them."""

from __future__ import annotations

import itertools

import pytest
import torch

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError, NonFiniteError
from tests.hf import zoo
from tests.sweep import brute, kinds
from tests.sweep.brute import ATTENTION, HEADS, MLP, RESIDUAL, Brute

SITES = (ATTENTION, MLP, RESIDUAL)
KINDS = ("zero", "patch", "patch a token", "add", "resample", "positional mean")
GRIDS = ("last", "all", "each", "rows")
L, D = zoo.LAYERS, 48


def covering() -> list[tuple[str, str, str, str, str]]:
    """Every family meets every site at half of the places; kinds and padding alternate."""
    found = []
    for number, family in enumerate(zoo.DECODERS):
        for i, (site, grid) in enumerate(itertools.product(SITES, GRIDS)):
            if (number + i) % 2 == 0 or family in ("llama", "gpt2"):
                found.append((family, site, KINDS[(number + i) % len(KINDS)], grid, ("left", "right")[i // 4 % 2]))
    return found


@pytest.mark.parametrize(("family", "site", "kind", "grid", "padding"), covering())
def test_sites(family, site, kind, grid, padding):
    kinds.check_targets(family, kind, grid, padding, site=site)


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.DECODERS)
def test_sites_in_every_combination(family):
    done = set(covering())
    for site, kind, grid, padding in itertools.product(SITES, KINDS, GRIDS, ("left", "right")):
        if (family, site, kind, grid, padding) in done:
            continue
        try:
            kinds.check_targets(family, kind, grid, padding, site=site)
        except AssertionError as error:
            raise AssertionError(f"{site}, {kind}, {grid}, padding on the {padding}: {error}") from error


@pytest.mark.parametrize("family", zoo.ENCODERS)
@pytest.mark.parametrize("site", SITES)
def test_sites_of_encoders(family, site):
    for kind, grid in (("zero", "all"), ("patch", "each"), ("resample", "last"), ("patch a token", "rows")):
        case = kinds.case(kind, grid, D, site=site)
        kinds.check(kinds.model(family), family, case, "right", brute.logit_diff(5, 6), bf.metrics.logit_diff(5, 6))


# Sources.


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", [*zoo.DECODERS, "bert"])
def test_site_outputs(family, padding):
    if family == "bert" and padding == "left":
        pytest.skip("an encoder with absolute positions sees padding on the left")
    model, batch = kinds.model(family), kinds.data(padding)[0]
    oracle = Brute(model, family, [batch])
    for site in (HEADS, *SITES):
        alone = [oracle.values(site, n) for n in range(3)]

        def outputs(at, site=site):
            found = bf.head_outputs(model, batch, at=at).flatten(-2) if site == HEADS else None
            return bf.site_outputs(model, batch, site=site, at=at) if found is None else found

        for at, tokens in (("last_prompt", [-1] * 3), (2, [2] * 3), (-3, [-3] * 3), ([1, 4, 6], [1, 4, 6])):
            want = torch.stack([values[token] for values, token in zip(alone, tokens, strict=True)])
            torch.testing.assert_close(outputs(at), want, atol=2e-5, rtol=1e-4)
        each, columns = outputs("each"), outputs("all")
        assert each.shape[:2] == columns.shape[:2] == (3, kinds.TOKENS)
        real = batch["attention_mask"] != 0
        torch.testing.assert_close(columns[real], torch.cat(alone), atol=2e-5, rtol=1e-4)
        for row, values in enumerate(alone):
            torch.testing.assert_close(each[row, : len(values)], values, atol=2e-5, rtol=1e-4)
            assert not each[row, len(values) :].any()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_means_at_each_position(padding):
    """Over the rows that have the position, batches of any order and length."""
    model, batches = kinds.model("llama"), kinds.data(padding)
    for data in (batches, batches[::-1]):
        oracle = Brute(model, "llama", data)
        for site in (HEADS, *SITES):
            alone = [oracle.values(site, n) for n in range(kinds.SAMPLES)]
            want = [torch.stack([v[t] for v in alone if len(v) > t]).mean(0) for t in range(kinds.TOKENS)]
            if site == HEADS:
                found = bf.head_means(model, data, at="each")
                assert found.shape == (1, kinds.TOKENS, L, zoo.HEADS, 16)
            else:
                found = bf.site_means(model, data, site=site, at="each")
                assert found.shape == (1, kinds.TOKENS, L, D)
                last = torch.stack([values[-1] for values in alone]).mean(0)
                torch.testing.assert_close(bf.site_means(model, data, site=site), last, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(found.view(kinds.TOKENS, L, -1), torch.stack(want), atol=2e-5, rtol=1e-4)


def test_outputs_of_several_batches_at_each_position():
    model, batches = kinds.model("llama"), kinds.data("left")
    found = bf.site_outputs(model, batches, site="mlp", at="each")
    assert found.shape == (kinds.SAMPLES, kinds.TOKENS, L, D)
    alone = bf.site_outputs(model, batches[1], site="mlp", at="each")
    assert torch.equal(found[3:, :6], alone) and not found[3:, 6:].any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon", "mixtral", "opt"])
def test_patching_everything_with_the_clean_run_gives_the_clean_metric(family):
    """The residual stream of any one layer at all prompt positions determines what follows."""
    model = kinds.model(family)
    clean, corrupted = zoo.batch(padding="right", seed=5), zoo.batch(padding="right", seed=6)
    metric = bf.metrics.logit_diff(5, 6)
    source = bf.site_outputs(model, clean, site="residual", at="each")
    options = dict(metric=metric, site="residual", at="prompt", progress=False)
    result = bf.sweep(model, corrupted, edit=bf.Patch(source), verify=L, **options)
    wanted = Brute(model, family, [clean]).scores([], brute.logit_diff(5, 6))[1]
    before = Brute(model, family, [corrupted]).scores([], brute.logit_diff(5, 6))[1]
    assert (wanted - before).abs().min() > 0.1
    torch.testing.assert_close(result.baseline.double(), before, atol=1e-4, rtol=1e-4)
    for layer in range(L):
        torch.testing.assert_close((result.baseline + result.effects[layer]).double(), wanted, atol=1e-4, rtol=1e-4)
    # Of itself, nothing changes.
    own = bf.Patch(bf.site_outputs(model, corrupted, site="residual", at="each"))
    assert bf.sweep(model, corrupted, edit=own, **options).effects.abs().max() < 1e-4


def test_the_map_of_layers_and_positions():
    """At each position its own token of the clean run; the rows' prompts are all of one length here."""
    model = kinds.model("llama")
    clean, corrupted = zoo.batch(padding=None, seed=5), zoo.batch(padding=None, seed=6)
    corrupted["input_ids"][:, -2:] = clean["input_ids"][:, -2:]
    source = bf.site_outputs(model, clean, site="residual", at="each")
    result = bf.sweep(
        model, corrupted, edit=bf.Patch(source), site="residual", positions=range(11), verify=6,
        metric=bf.metrics.logit_diff(5, 6), progress=False,
    )  # fmt: skip
    oracle = Brute(model, "llama", [corrupted])
    variants = [
        [brute.Change(layer, 0, t, lambda x, place: source[place.sample, place.token, place.layer], RESIDUAL)]
        for layer in range(L)
        for t in range(11)
    ]
    want = oracle.effects(variants, brute.logit_diff(5, 6))
    brute.close(result.effects.flatten(0, 1), want)
    # The last layer's stream matters only where the metric reads, and there it is everything.
    assert result.effects[L - 1, :10].abs().max() < 1e-5 and result.effects[L - 1, 10].abs().min() > 0.1


@pytest.mark.parametrize("padding", ["left", "right"])
def test_positional_mean_of_the_prompt_leaves_targets_alone(padding):
    model = kinds.model("gpt2")
    data = kinds.data(padding)
    means = bf.head_means(model, kinds.data("left", 2)[::-1], at="each")
    for at in ("prompt", slice(None, -2)):
        result = bf.sweep(
            model, data, edit=bf.Mean(means), at=at, heads=kinds.FEW, verify=6,
            metric=bf.metrics.target_logprob(kinds.TARGETS), progress=False,
        )  # fmt: skip
        variants = [
            [brute.Change(layer, head, at, lambda x, place: means[0, place.token, place.layer, place.head])]
            for layer, head in kinds.FEW
        ]
        want = Brute(model, "gpt2", data).effects(variants, brute.logprob(kinds.TARGETS))
        brute.close(torch.stack([result.effects[place] for place in kinds.FEW]), want)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_source_for_the_end_of_the_prompt_is_aligned_there(padding):
    """A prompt shorter than the source takes its last entries, in the engine as in its check."""
    model, batch = kinds.model("llama"), zoo.batch(rows=3, tokens=4, padding=padding)  # 4, 3 and 2 tokens
    source = kinds.draw(1, 3, L, zoo.HEADS, 16)
    result = bf.sweep(
        model, batch, edit=bf.Patch(source), at=slice(-3, None), heads=kinds.FEW, verify=6,
        metric=bf.metrics.logit_diff(5, 6), progress=False,
    )  # fmt: skip
    lengths = batch["attention_mask"].sum(1).tolist()

    def value(x, place):
        return source[0, place.token - (lengths[place.sample] - 3), place.layer, place.head]

    variants = [[brute.Change(layer, head, slice(-3, None), value)] for layer, head in kinds.FEW]
    want = Brute(model, "llama", [batch]).effects(variants, brute.logit_diff(5, 6))
    brute.close(torch.stack([result.effects[place] for place in kinds.FEW]), want)


def sites(**options):
    defaults = dict(edit=bf.Zero(), metric=bf.metrics.target_prob([5]), site="residual", progress=False)
    return bf.sweep(kinds.model("llama"), options.pop("data", zoo.batch()), **{**defaults, **options})


TWO = [zoo.batch(rows=3), zoo.batch(rows=3, seed=2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(site="block"), "site='block' is not one of heads, attention, mlp, residual"),
        (dict(heads=[(0, 1)]), "heads= does not go with site='residual'; give layers="),
        (dict(site="heads", layers=[1]), "layers= is for the other sites"),
        (dict(layers=[3]), "layer 3 is out of range: the model has 3 layers"),
        (dict(layers=[]), "layers= is empty"),
        (dict(edit=bf.Patch(torch.zeros(3, 4, 16))), r"shape \(3, 4, 16\); at this site it is \[D\] = \[48\]"),
        (dict(edit=bf.Patch(torch.zeros(4, L, D))), "source for 4 rows, but a variant has 3 rows"),
        # Equal sizes do not make one batch's rows those of another.
        (dict(edit=bf.Patch(torch.zeros(3, L, D)), data=TWO), "a source for each row, but there are 2 batches"),
        (dict(edit=bf.Patch(torch.zeros(3, 5, L, D)), data=TWO), "a source for each row, but there are 2 batches"),
        (dict(edit=bf.Patch(torch.zeros(1, 5, L, D)), at="all"), "a source for 1 rows, but a variant has 3 rows"),
        (dict(edit=bf.Patch(torch.zeros(1, 5, L, D)), positions=[0, 5]), "5 is beyond the 5 tokens that the source"),
        (dict(edit=bf.Patch(torch.zeros(1, 5, L, D)), positions=[-1]), "-1 does not count from a row's first token"),
        (dict(edit=bf.Patch(torch.zeros(1, 5, L, D)), positions=["all"]), "'all' does not count from"),
        (dict(edit=bf.Patch(torch.zeros(3, 5, L, D)), positions=[[1, 2]]), "has 2 positions, but the source is for 3"),
        (dict(positions=[]), "positions= is empty"),
        (dict(positions=[0], at="all"), "not both"),
    ],
)  # fmt: skip
def test_bad_input(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        sites(**options)


def test_outputs_that_are_not_there_or_not_finite():
    model = zoo.build("llama")
    with pytest.raises(InvalidArgumentError, match="site='block' is not one of 'attention', 'mlp', 'residual'"):
        bf.site_outputs(model, zoo.batch(), site="block")
    with pytest.raises(InvalidArgumentError, match="not one position a row"):
        bf.site_means(model, zoo.batch(), site="mlp", at="prompt")
    model.model.layers[1].mlp.down_proj.weight.data[3] = torch.nan
    with pytest.raises(NonFiniteError, match="the mlp of layer 1 is NaN or infinite at row 0, column 0"):
        bf.site_means(model, zoo.batch(), site="mlp")
