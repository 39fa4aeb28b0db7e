"""The sentences say what the numbers say, and the table fits a terminal."""

import math
from dataclasses import replace

import pytest
import torch

from bkdfast.report import summary
from bkdfast.report.text import (
    ablation_sentence,
    attribution_sentence,
    chosen_point,
    directions_sentence,
    headline,
    monitor_sentence,
    percent,
)
from bkdfast.studies.audit import Timing
from bkdfast.studies.rates import Rate
from tests.report.audits import make_audit


def test_headline_of_an_ablation_that_works():
    text = headline(make_audit(accuracy=(199, 199, 199, 199)))
    assert text.startswith(
        "Zeroing 4 of 24 heads takes attack success from 100% to 2% and leaves clean accuracy at 99.5%; as many random "
        "heads leave attack success at 99% (median of 3 sets, 98.5% to 99.5%)."
    )
    assert "tells triggered from clean requests: it flags 100% of triggered" in text


def test_headline_of_an_ablation_that_does_nothing():
    text = headline(make_audit(attack=(200, 199, 198, 199)))
    assert "Zeroing up to 4 of 24 heads does not clearly lower attack success" in text
    assert "99% at best" in text and "takes" not in text


def test_headline_without_separation():
    text = headline(make_audit(triggered_excess=0.0))
    assert "does not tell triggered from clean requests" in text and "intervals overlap" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"attack": (200, 199, 199, 150)}, "only lowers attack success from 100% to 75%"),
        ({"accuracy": (199, 150, 120, 60)}, "but at a cost: clean accuracy falls from 99.5% to 30%"),
        ({"random": (3, 4, 5)}, "so the effect is not special to these heads"),
        ({"random": ()}, "no random heads were tried"),
        ({"attack": (8, 7, 6, 5)}, "hardly a backdoor behaviour to remove"),
        ({"attack": (200,), "accuracy": (200,)}, "no ablation was run"),
        ({"attack": (2, 1, 0, 0), "accuracy": (2, 2, 2, 2), "total": 2, "random": ()}, "does not clearly lower"),
        ({"accuracy": (199, 199, 199, 191)}, "clean accuracy goes from 99.5% to 95.5%"),
    ],
)
def test_ablation_sentence(change, expected):
    assert expected in ablation_sentence(make_audit(**change))


def test_the_point_reported_is_the_smallest_that_is_as_good_as_the_best():
    assert chosen_point(make_audit(attack=(200, 150, 5, 3))).heads == 2
    assert chosen_point(make_audit(attack=(200, 150, 20, 3))).heads == 4
    assert chosen_point(make_audit(attack=(200, 150, 20, 3), accuracy=(199, 199, 199, 100))).heads == 2
    assert chosen_point(make_audit(attack=(200, 200, 200, 200))) is None


def test_controls_are_compared_by_the_median_set():
    """One random set that happens to hold a top head does not hide that the others do nothing."""
    assert "leave attack success" in ablation_sentence(make_audit(random=(0, 199, 198)))
    assert "not special" in ablation_sentence(make_audit(random=(0, 2, 198)))


@pytest.mark.parametrize(
    ("found", "false", "expected"),
    [
        (Rate(95, 100), Rate(3, 100), "The monitor tells triggered from clean requests: it flags 95%"),
        (Rate(60, 100), Rate(3, 100), "only in part"),
        (Rate(100, 100), Rate(40, 100), "only in part"),
        (Rate(5, 100), Rate(3, 100), "does not tell"),
        (Rate(100, 100), Rate(100, 100), "does not tell"),
        (Rate(2, 100), Rate(40, 100), "clean requests more often than triggered"),
        (Rate(0, 0), Rate(3, 100), "not tested"),
    ],
)
def test_monitor_sentence(found, false, expected):
    audit = make_audit()
    audit = replace(audit, monitor=replace(audit.monitor, detection=found, false_positives=false))
    assert expected in monitor_sentence(audit)


def test_attribution_sentence_tells_noise_from_effect():
    assert attribution_sentence(make_audit()).startswith(
        "Layer 2 head 3 raises the target probability most: +0.396 ± 0.0039 ("
    )
    assert attribution_sentence(make_audit(effect=0.0)).startswith("No head clearly raises")
    audit = make_audit()
    nothing = replace(audit, attribution=replace(audit.attribution, effects=torch.full((4, 6, 20), torch.nan)))
    assert attribution_sentence(nothing) == "No head was swept."


def test_directions_sentence_names_the_strongest():
    audit = make_audit()
    audit.directions.strength[3, 3:] = torch.tensor([2.0, 1.5, 0.5])
    expected = "Fine-tuning changed down_proj of block 3 most: its singular values fall from 2 (1st) to 0.5 (3rd)."
    assert directions_sentence(audit) == expected
    audit.directions.strength.zero_()
    assert directions_sentence(audit).startswith("There are no directions")


@pytest.mark.parametrize(
    ("rate", "shown"),
    [
        (0.0, "0%"),
        (1.0, "100%"),
        (0.9999, ">99.9%"),
        (1 - 1e-16, "100%"),
        (1e-5, "<0.1%"),
        (0.123, "12.3%"),
        (0.5, "50%"),
    ],
)
def test_percent_rounds_to_certainty_only_what_is_certain(rate, shown):
    assert percent(rate) == shown
    assert percent(math.nan) == "–"


@pytest.mark.parametrize("points", [1, 4, 12])
@pytest.mark.parametrize("compare", [True, False])
def test_summary_fits_a_terminal(points, compare):
    attack = tuple(range(200, 200 - 15 * points, -15))
    audit = make_audit(layers=64, heads=64, attack=attack, accuracy=(198,) * points, compare=compare, n_clean=4)
    lines = summary(audit).splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 130
    assert "\x1b" not in summary(audit)
    assert any(line.startswith("monitor") and "30 requests" in line for line in lines)
    assert len([line for line in lines if "1.5 s" in line]) == 4
    assert sum("8.0x" in line for line in lines) == (4 if compare else 0)
    point = chosen_point(audit)
    assert point is None or any(line.split()[:1] == [str(point.heads)] for line in lines)


def test_summary_disarms_names():
    text = summary(make_audit(names=("a\x1b[31m\nb", "x" * 500)))
    assert "\x1b" not in text and "a?[31m?b against xxx" in text
    assert max(map(len, text.splitlines())) <= 180


def test_a_slower_step_is_shown_as_slower():
    text = summary(replace(make_audit(), timings=(Timing("directions", 3.0, 0.3, "equal"),)))
    assert "0.1x" in text
