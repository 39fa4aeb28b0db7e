"""The report shows the numbers of the result, needs nothing else, and fits two tensors as well as three hundred."""

import csv
import math
from dataclasses import replace

import pytest
import torch

from bkdfast.errors import InvalidArgumentError
from bkdfast.report import delta_plots, delta_summary, write_delta_report
from bkdfast.report.deltas import tensor_rows
from bkdfast.svd import DeltaSVD
from bkdfast.svd.noise import noise_edge
from bkdfast.svd.overlap import Overlap, overlaps
from tests.report.delta_results import make_result, tensor_delta
from tests.report.test_html import Page

WRITERS = {"self_attn.o_proj": (32, 32), "mlp.down_proj": (32, 48)}


def write(result, folder, **options):
    """Text of the page, and the tables of both CSV files."""
    page = write_delta_report(result, folder, **options)
    tables = []
    for name in ("tensors", "overlap"):
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    return Page(page.read_text(encoding="utf-8")), *tables


def pictures(folder):
    return {path.name for path in folder.glob("*.png")}


def images(page):
    return [value for name, value in page.attributes if name == "src"]


def lines_of(axes):
    """Lines with more than a corner in the data's coordinates: no noise edge, no reference."""
    return [line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata())]


def test_the_tables_hold_the_result(tmp_path):
    result = make_result(layers=3, extra=("lm_head.weight",))
    page, tensors, found = write(result, tmp_path, model_type="llama")
    norms = [delta.frobenius for delta in result.values()]
    assert [float(row["frobenius"]) for row in tensors] == sorted(norms, reverse=True)
    assert {row["name"] for row in tensors} == set(result) and len(tensors) == 22
    for row in tensors:
        delta = result[row["name"]]
        assert float(row["energy"]) == pytest.approx(delta.energy) and int(row["rank"]) == delta.rank == 4
        assert float(row["changed_share"]) == pytest.approx(delta.changed / (delta.shape[0] * delta.shape[1]))
        assert float(row["noise_edge"]) == pytest.approx(noise_edge(delta))
        assert float(row["largest_angle"]) == 1e-5 and row["uncertified"] == "0" and row["converged"] == "True"
        assert row["name"] in page.text
    head = next(row for row in tensors if row["name"] == "lm_head.weight")
    assert head["layer"] == "" and "Outside the blocks" in page.text
    expected = overlaps(result, "llama")
    assert len(found) == len(expected) == 7 * 2 + 3
    for row, o in zip(found, expected, strict=True):
        assert float(row["overlap"]) == pytest.approx(o.overlap) and float(row["random"]) == 4 / 32
        assert (row["first"], int(row["layer"]), row["side"]) == (o.first, o.layer, o.side)


def test_the_page_needs_nothing_else(tmp_path):
    page, *_ = write(make_result(), tmp_path)
    loads = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert len(loads) == 3 and all(value.startswith("data:image/svg+xml;base64,") for value in loads)
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    assert pictures(tmp_path) == {"spectra.png", "layers.png", "overlap.png"}
    assert all((tmp_path / name).stat().st_size > 10_000 for name in pictures(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_names_are_trusted_nowhere(tmp_path):
    name = "model.layers.0.<script>alert(1)</script>.$x^2$.weight"
    delta = tensor_delta(name, 20, 30, 2, 0, note="<b>odd</b>")
    page, tensors, _ = write(
        DeltaSVD(
            {name: delta},
            only_in_base=("<i>",),
            skipped={"<u>": "<s>"},
            metadata={"tuned": "<u>&", "versions": {"<i>": "<s>"}},
        ),
        tmp_path,
    )
    assert (
        not {"script", "b", "i", "u", "s"} & set(page.tags) - {"b"} and page.tags.count("b") == 6 and name in page.text
    )
    assert tensors[0]["name"] == name and tensors[0]["note"] == "<b>odd</b>" and "<i>" in page.text
    assert "Weight deltas: <u>& against base" in page.text
    assert "\x1b" not in delta_summary(DeltaSVD({"a\x1b[2J": replace(delta, name="a\x1b[2J")})).splitlines()[3]


def test_one_tensor(tmp_path):
    name = "model.layers.3.mlp.down_proj.weight"
    page, tensors, found = write(DeltaSVD({name: tensor_delta(name, 20, 30, 5, 0)}), tmp_path)
    assert len(tensors) == 1 and not found and len(images(page)) == 1 and pictures(tmp_path) == {"spectra.png"}
    assert "changed the one tensor" in page.text and name in page.text


def test_two_tensors(tmp_path):
    page, tensors, found = write(make_result(layers=1, rank=2, projections=WRITERS), tmp_path)
    assert len(tensors) == 2 and len(found) == 1 and len(images(page)) == 3 and "details" not in page.tags


def test_no_change_at_all_and_older_pictures(tmp_path):
    write(make_result(layers=2), tmp_path)
    result = make_result(layers=2, rank=0)
    page, tensors, found = write(result, tmp_path)
    assert "None of the 14 tensors that were compared differs." in page.text
    assert pictures(tmp_path) == {"layers.png"}, "those of a change that is no longer there are gone"
    assert all(row["energy"] == row["largest_s"] == row["largest_angle"] == "" for row in tensors)
    assert all(row["overlap"] == row["random"] == "" for row in found)
    assert "None of the 14" in delta_summary(result)


def test_an_unchanged_tensor_among_others(tmp_path):
    result = make_result(layers=3, projections=WRITERS)
    name = "model.layers.1.mlp.down_proj.weight"
    result.tensors[name] = tensor_delta(name, 32, 48, 0, 0, frobenius=0.0)
    page, tensors, found = write(result, tmp_path)
    assert tensors[-1]["name"] == name and tensors[-1]["frobenius"] == "0.0" and "5 of 6 tensors" in page.text
    missing = [row for row in found if row["overlap"] == ""]
    assert len(missing) == 3 and all("mlp.down_proj" in (row["first"], row["second"]) for row in missing)


def test_nothing_was_compared(tmp_path):
    page, tensors, found = write(DeltaSVD({}), tmp_path)
    assert not tensors and not found and "No tensor was compared." in page.text and not images(page)


def test_names_without_layers(tmp_path):
    page, tensors, found = write(make_result(layers=0, extra=("wte", "a.b.weight", "lm_head.weight")), tmp_path)
    assert len(tensors) == 3 and not found and pictures(tmp_path) == {"spectra.png"} and len(images(page)) == 1


def test_three_hundred_tensors(tmp_path):
    result = make_result(layers=43, rank=8)
    assert len(result) == 301
    page, tensors, found = write(result, tmp_path)
    assert all(name in page.text for name in result) and len(tensors) == 301 and len(found) == 7 * 42 + 43
    assert "details" in page.tags and "The other 271 tensors" in page.text
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    said = delta_summary(result).splitlines()
    assert len(said) == 14 and "291 more" in said[-1] and max(map(len, said[1:])) < 120


def test_the_folder_must_be_there(tmp_path):
    with pytest.raises(InvalidArgumentError, match="no folder"):
        write_delta_report(make_result(layers=1), tmp_path / "none")


def test_what_the_page_says_of_storage(tmp_path):
    template = "h.{}.{}.weight"
    projections = {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.c_fc": (32, 128), "mlp.c_proj": (128, 32)}
    result = make_result(layers=2, projections=projections, template=template, extra=("wte.weight",))
    page, _, found = write(result, tmp_path, model_type="gpt2")
    assert "as [in, out] (model type gpt2): there v is the output side" in page.text
    assert "output side, v: attn.c_proj, mlp.c_proj" in page.text
    assert "input side, u: attn.c_attn, mlp.c_fc" in page.text
    assert {row["width"] for row in found} == {"32"} and len(found) == 4 + 2
    page, _, _ = write(make_result(layers=2), tmp_path)
    assert "[out, in] (no config was given, so nn.Linear is assumed): u is the output side" in page.text


def test_uncertified_and_unconverged_are_said(tmp_path):
    result = make_result(layers=1, projections=WRITERS)
    name = "model.layers.0.mlp.down_proj.weight"
    odd = replace(result[name], dimension=torch.tensor([1, 0, 0, 0]), converged=False, note="rank clipped to 4")
    result.tensors[name] = replace(odd, subspace=torch.tensor([3e-4, 1, 1, 1]))
    page, tensors, _ = write(result, tmp_path)
    row = next(row for row in tensors if row["name"] == name)
    assert (float(row["largest_angle"]), row["uncertified"], row["converged"]) == (
        pytest.approx(3e-4, rel=1e-5), "3", "False",
    )  # fmt: skip
    assert "3.0e-04 (3 without)" in page.text and "rank clipped to 4" in page.text
    (line,) = [line for line in delta_summary(result).splitlines() if line.endswith("not converged")]
    assert line.split()[0] == name


def test_spectra_have_a_panel_a_projection_and_a_line_a_layer():
    result = make_result(layers=12, projections=WRITERS, extra=("lm_head.weight",))
    figure = delta_plots.spectra(result)
    panels = figure.axes[:3]
    assert [axes.get_title("left") for axes in panels] == ["self_attn.o_proj", "mlp.down_proj", "outside the blocks"]
    for axes, projection in zip(panels[:2], WRITERS, strict=True):
        for layer, line in enumerate(lines_of(axes)):  # layer 2 before layer 10
            delta = result[f"model.layers.{layer}.{projection}.weight"]
            assert list(line.get_ydata()) == delta.s.tolist()
        assert len(lines_of(axes)) == 12
        edges = {noise_edge(result[f"model.layers.{i}.{projection}.weight"]) for i in range(12)}
        drawn = {line.get_ydata()[0] for line in axes.lines if line.get_linestyle() != "-"}
        assert drawn == {min(edges), max(edges)}
    colours = [line.get_color() for line in lines_of(panels[0])]
    assert len(set(colours)) == 12 and sum(colours[0][:3]) < sum(colours[-1][:3])
    assert panels[0].get_yscale() == "log" and "energy captured 67%" in panels[0].texts[0].get_text()


def test_of_experts_the_largest_is_drawn_and_the_map_has_all():
    projections = {f"mlp.experts.{e}.down_proj": (32, 48) for e in range(3)}
    result = make_result(layers=2, projections=projections)
    axes = delta_plots.spectra(result).axes[0]
    experts = [[result[f"model.layers.{i}.mlp.experts.{e}.down_proj.weight"] for e in range(3)] for i in range(2)]
    assert [line.get_ydata()[0] for line in lines_of(axes)] == [max(float(d.s[0]) for d in row) for row in experts]
    norms = delta_plots.layer_maps(result).axes[0].images[0].get_array()
    together = [math.sqrt(sum(d.frobenius**2 for d in row)) for row in experts]
    assert norms.tolist() == [pytest.approx(together)]


def test_maps_have_a_column_a_layer_in_the_order_of_the_model():
    result = make_result(layers=12, projections=WRITERS)
    del result.tensors["model.layers.5.mlp.down_proj.weight"]
    upper, lower = delta_plots.layer_maps(result, 4).axes[:2]
    norms, shares = (axes.images[0].get_array() for axes in (upper, lower))
    assert [label.get_text() for label in upper.get_yticklabels()] == list(WRITERS)
    for row, projection in enumerate(WRITERS):
        for layer in range(12):
            delta = result.get(f"model.layers.{layer}.{projection}.weight")
            if delta is None:
                assert norms.mask[row, layer] and shares.mask[row, layer]
            else:
                assert norms[row, layer] == delta.frobenius and shares[row, layer] == pytest.approx(100 * delta.energy)


def test_the_lower_map_has_numbers_of_triplets_where_a_rule_chose_them():
    result = make_result(layers=3, projections=WRITERS)
    name = "model.layers.1.mlp.down_proj.weight"
    result.tensors[name] = result[name].leading(2)
    lower = delta_plots.layer_maps(result).axes[1]
    others = max(delta.rank for delta in result.values())
    assert lower.get_title("left") == "Triplets that were kept"
    assert sorted(lower.images[0].get_array().ravel().tolist()) == [2, *[others] * 5]
    assert {text.get_text() for text in lower.texts} == {"2", str(others)}


def test_a_vision_tower_is_told_from_the_language_model():
    text = make_result(layers=2, projections=WRITERS, template="language_model.model.layers.{}.{}.weight")
    tower = make_result(layers=3, projections=WRITERS, template="vision_tower.encoder.layers.{}.{}.weight")
    groups = delta_plots.by_projection({**text, **tower})
    assert {label: len(layers) for label, layers in groups.items()} == {
        **{f"language_model: {p}": 2 for p in WRITERS},
        **{f"vision_tower: {p}": 3 for p in WRITERS},
    }
    assert len(overlaps({**text, **tower})) == 2 * 1 + 2 * 2 + 2 + 3


def test_overlap_lines_and_their_reference():
    result = make_result(layers=12, projections=WRITERS)
    found = [o for o in overlaps(result) if not (o.comparison == "next layer" and o.layer == 6)]
    left, right = delta_plots.overlap_curves(found).axes
    for line, name in zip(left.lines, WRITERS, strict=False):
        assert line.get_label() == name
        x, y = line.get_xdata(), line.get_ydata()
        assert [i for i in x if not math.isnan(i)] == [*range(6), *range(7, 11)] and math.isnan(y[6])
        for layer, value in zip(x, y, strict=True):
            same = [o.overlap for o in found if (o.comparison, o.first, o.layer) == ("next layer", name, layer)]
            assert same == [value] or math.isnan(layer)
    assert len(right.lines[0].get_xdata()) == 12
    for axes in (left, right):
        dashed = [line for line in axes.lines if line.get_linestyle() != "-"]
        assert set(dashed[0].get_ydata()) == {4 / 32}
        assert axes.get_ylim()[0] == 0 and axes.get_legend().get_texts()[-1].get_text() == "random directions: 0.12"


def test_no_more_lines_and_panels_than_can_be_told_apart():
    projections = {f"mlp.part_{i}": (32, 32) for i in range(30)}
    result = make_result(layers=2, projections=projections)
    assert len(delta_plots.spectra(result).axes) == delta_plots.PANELS + 1  # the colour bar
    maps = delta_plots.layer_maps(result)
    assert len(maps.axes[0].get_yticklabels()) == delta_plots.ROWS and "24 projections" in maps.axes[0].get_title(
        "left"
    )
    (axes,) = delta_plots.overlap_curves(overlaps(result)).axes
    assert len(lines_of(axes)) == delta_plots.LINES and "(8 of 30)" in axes.get_title("left")


def test_any_scale_of_values():
    for scale in (1e-12, 1e6):
        result = make_result(layers=3, projections=WRITERS)
        tensors = {n: replace(d, s=d.s * scale, frobenius=d.frobenius * scale) for n, d in result.items()}
        small = "model.layers.1.mlp.down_proj.weight"
        tensors[small] = replace(tensors[small], s=tensors[small].s * 1e-3, frobenius=tensors[small].frobenius * 1e-3)
        for figure in (delta_plots.spectra(tensors), delta_plots.layer_maps(tensors)):
            figure.canvas.draw()
        assert "log scale" in delta_plots.layer_maps(tensors).axes[0].get_title("left")


def test_overlap_columns_are_the_fields_of_an_overlap(tmp_path):
    write(make_result(layers=1), tmp_path)
    assert (tmp_path / "overlap.csv").read_text().splitlines()[0].split(",") == list(Overlap.__dataclass_fields__)


def test_rows_come_in_the_order_of_the_model_where_norms_are_equal():
    delta = tensor_delta("", 32, 48, 2, 0)
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (10, 2, 9)]
    rows = tensor_rows(DeltaSVD({name: replace(delta, name=name) for name in names}))
    assert [row["layer"] for row in rows] == [2, 9, 10]
