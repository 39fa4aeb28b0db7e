"""The page needs nothing else, trusts no name, and is written whole or not at all."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from bkdfast.errors import InvalidArgumentError
from bkdfast.report import html as html_module
from bkdfast.report import write_report
from bkdfast.report.text import headline
from tests.report.audits import make_audit

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; checks that tags are closed in order."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert write_report(make_audit(), path) == path
    return path.read_text(encoding="utf-8")


def test_the_page_needs_nothing_else(source):
    page = Page(source)
    loads = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert len(loads) == 4 and all(value.startswith("data:image/svg+xml;base64,") for value in loads)
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    assert "url(" not in source and "@import" not in source
    assert len(source) < 1_500_000


def test_the_pictures_load_nothing_either(source):
    for data in re.findall(r"base64,([^\"]+)", source):
        picture = base64.b64decode(data).decode()
        assert picture.startswith("<?xml") and picture.rstrip().endswith("</svg>")
        links = re.findall(r'href="([^"]*)"', picture)
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
        assert "<script" not in picture


def test_no_path_of_this_machine_is_on_the_page(source):
    pictures = "".join(base64.b64decode(data).decode() for data in re.findall(r"base64,([^\"]+)", source))
    text = re.sub(r"base64,[^\"]+", "", source) + re.sub(r"base64,[^\"]+", "", pictures)
    assert not re.search(r"/(home|tmp|work|root|usr|var|Users)/", text)


def test_the_page_says_what_was_found(source):
    audit = make_audit()
    text = Page(source).text
    assert headline(audit) in text
    for expected in (
        "100% → 2%",
        "layer",
        f"{float(audit.attribution.mean[2, 3]):+.4f}",
        "30 of 30",
        "Wilson",
        "8.0x",
        "12.0 s",
        "One run on one machine (cpu, 1 thread)",
        "2509.21761",
        "2508.00161",
        "Grey cells were not swept",
    ):
        assert expected in text
    rows = re.findall(r"<tr[^>]*>.*?</tr>", source)
    assert sum("± " in row for row in rows) == 10
    assert [re.findall(r"<td[^>]*>([^<]*)", row)[:2] for row in rows if "chosen" in row] == [["4", "2%"]]


def test_hostile_names_are_text(tmp_path):
    name = "<script>alert(1)</script>\"'&$\\frac{"
    audit = make_audit(names=(name, "<img src=x onerror=alert(1)>"), metric="<b>$\\x$ & --> metric")
    audit = replace(audit, timings=tuple(replace(t, step="<i>", agreement="<u>") for t in audit.timings))
    page = Page(write_report(audit, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert not {"script", "i", "u"} & set(page.tags)
    assert page.tags.count("img") == 4 and page.tags.count("b") == 4  # the tiles' own
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert name in page.text


def test_times_without_comparison_are_dashes(tmp_path):
    text = Page(write_report(make_audit(compare=False), tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert "not run in plain PyTorch" in text and "1.5 s–––" in text


@pytest.mark.parametrize(
    "change",
    [
        {"attack": (200, 199, 199, 200)},
        {"triggered_excess": 0.0},
        {"attack": (200,), "accuracy": (200,)},
        {"random": ()},
        {"n_triggered": 0},
        {"effect": 0.0, "rank": 1},
        {"layers": 24, "heads": 32},
    ],
)
def test_pages_of_other_outcomes(tmp_path, change):
    audit = make_audit(**change)
    page = Page(write_report(audit, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert headline(audit) in page.text
    assert "nan" not in page.text and "inf" not in page.text.replace("information", "")


def test_a_sweep_of_no_head(tmp_path):
    audit = make_audit()
    audit = replace(audit, attribution=replace(audit.attribution, effects=torch.full((4, 6, 20), torch.nan)))
    assert "No head was swept." in write_report(audit, tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_failed_report_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("drawing failed")

    monkeypatch.setattr(html_module.plots, "monitor_ranges", fail)
    with pytest.raises(RuntimeError, match="drawing failed"):
        write_report(make_audit(), tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("old")
    monkeypatch.setattr(html_module, "_page", lambda audit: "new \ud800")  # a lone surrogate cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        write_report(make_audit(), path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InvalidArgumentError, match="there is no folder"):
        write_report(make_audit(), tmp_path / "missing" / "r.html")
