"""The report is one file that needs nothing else, says what was found, and leaves out what was not measured."""

from __future__ import annotations

import base64
import io
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dydit.errors import DyditError
from dydit.inspection.inspect import inspect
from dydit.parity.parity import ParityConfig, run_parity
from dydit.reports.bench_report import BenchReport, Comparison, Side, SideKind, SideResult
from dydit.reports.html_report import ReportContent, render_report, write_report
from dydit.reports.parity_report import FlippedImage, Status
from dydit.reports.plots import latency_png, parity_png
from dydit.reports.plots_masks import tokens_png
from dydit.reports.plots_samples import samples_png
from dydit.reports.results import Line, Machine

SECTIONS = ("samples", "masks", "tokens", "parity", "latency", "plan", "machine")


class Page(HTMLParser):
    """What a page consists of: tags with attributes, text by section, and whether tags are balanced."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text, self.section = [], [], {}, "top"
        self.feed(html)
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "section":
            self.section = dict(attributes)["id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text[self.section] = " ".join((self.text.get(self.section, "") + " " + data).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def parity(make_bundle, make_checkpoint):
    return run_parity(make_bundle(), make_checkpoint(), ParityConfig(labels=(1,), threads=1, every=6))


@pytest.fixture(scope="module")
def bench():
    def side(name, ms, macs):
        rounds = {"round_ms": (ms,), "step_ms": (ms,), "median_ms": ms, "min_ms": ms * 0.9, "max_ms": ms * 1.1}
        counts = {
            "load_seconds": 0.1,
            "subnets_loaded": 4,
            "peak_bytes": 9 << 20,
            "settled_bytes": 3 << 20,
            "images_per_second": 5.25,
        }
        made = Side(name=name, kind=SideKind.BUNDLE, path=name)
        cost = {"token_share": (1,), "flops_ratio": (1,), "macs": macs}
        return SideResult(side=made, **rounds, **counts, **cost, overflows=0)

    ratio = {"ratios": (1.75,), "median": 1.75, "min": 1.5, "max": 2.0, "allowed": 2.0, "achieved": 0.875}
    return BenchReport(
        **{"batch": 4, "cfg_scale": 1.0, "latents": "run", "threads": 1, "repeats": 3, "warmup": 1, "seed": 0},
        **{"steps": 12, "steps_measured": (0, 11), "timesteps": (999, 0), "load_average": (0.1, 2.25), "seconds": 1.0},
        sides=(side("ours", 8.0, 4e6), side("theirs", 14.0, 8e6)),
        comparisons=(Comparison(side="ours", other="theirs", **ratio),),
        machine=Machine.here(),
    )


@pytest.fixture(scope="module")
def content(make_bundle, parity, bench):
    images, tokens = np.zeros((2, 1, 8, 8)), np.ones((2, 3, 2, 16), bool)
    inspection = inspect(make_bundle().path)
    drawn = {name.removesuffix(".png"): data for name, data in inspection.pictures().items()}
    return ReportContent(
        title="A <b>title</b> & more",
        subtitle="what it is about",
        headlines=[
            Line(label="speed-up", value="1.75\u00d7", note="on this machine"),
            Line(label="results", value="/a/long/path/x", note="all"),
        ],
        machine=Machine.here(),
        pictures={
            **drawn,
            "samples": samples_png(images, [0, 1]),
            "tokens": tokens_png(images, tokens, [999, 0], ["a", "b"]),
            "parity": parity_png(parity),
            "latency": latency_png(bench),
        },
        samples_note="two images",
        parity=parity,
        bench=bench,
        bundle=inspection.facts,
        facts=(("Bundle", "where it is"),),
    )


@pytest.fixture(scope="module")
def html(content):
    return render_report(content)


def changed(content, **fields):
    return ReportContent(**{**vars(content), **fields})


def test_nothing_comes_from_outside(html):
    page = Page(html)
    assert page.all("script") == page.all("link") == page.all("iframe") == []
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            if name in attributes:
                assert attributes[name].startswith(("data:image/png;base64,", "#")), attributes[name][:60]
    assert not re.search(r"url\(|@import|https?://|//cdn", html)


def test_every_section_is_there_with_its_picture(html):
    page = Page(html)
    assert [each["id"] for each in page.all("section")] == list(SECTIONS)
    links = [each["href"].removeprefix("#") for each in page.all("a")]
    assert links == list(SECTIONS), "the navigation leads to each"
    images = page.all("img")
    assert len(images) == 6 and all(each["alt"] for each in images)
    for each in images:
        data = base64.b64decode(each["src"].partition(",")[2], validate=True)
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.format == "PNG"
            assert (int(each["width"]), int(each["height"])) == (picture.width // 2, picture.height // 2)


def test_text_is_escaped_and_headlines_come_first(html):
    page = Page(html)
    assert page.all("b") == [] and "A <b>title</b> & more" in page.text["top"]
    assert "Speed-up 1.75\u00d7 on this machine Results /a/long/path/x all" in page.text["top"]


def test_tables_say_what_was_measured(html, parity, content):
    text = Page(html).text
    for check in parity.checks:
        assert check.title.replace("->", "\u2192") in text["parity"] and check.detail in text["parity"]
    assert text["parity"].count("\u2713 pass") == 5 and "fail" not in text["parity"].partition("One step")[0]
    assert "ours 8.00 7.20 \u2013 8.80 5.25 4 M 3.00 MiB 0.10 s" in text["latency"]
    assert "theirs 1.75 \u00d7 1.50 \u2013 2.00 2.00 \u00d7 88%" in text["latency"]
    idle = content.bench.model_copy(update={"load_average": (0.0, 0.0)})
    assert "machine was busy" not in Page(render_report(changed(content, bench=idle))).text["latency"]
    loaded = content.bench.model_copy(update={"load_average": (99.0, 1.0)})
    assert "machine was busy" in Page(render_report(changed(content, bench=loaded))).text["latency"]
    assert "Batch 4, no guidance, 1 thread, 3 rounds after 1 of warm-up, 2 of 12 steps" in text["latency"]
    facts = content.bundle
    assert f"{facts.width.distinct_masks} distinct masks in 12 steps" in text["plan"]
    chosen = f"{facts.chosen.segments} {facts.chosen.subnets} {facts.chosen.versus_exact:.3f}"
    assert chosen in text["plan"]
    assert Machine.here().cpu in text["machine"] and "numpy" in text["machine"] and "where it is" in text["machine"]


def test_failures_are_shown_as_such(content, parity):
    flip = FlippedImage(image=3, step=2, timestep=817, block=1, margin=1e-6, tie=True, flips=5, value=0.02)
    checks = [*parity.checks]
    checks[3] = checks[3].model_copy(update={"status": Status.FAILED, "worst": None, "flipped_images": (flip,)})
    checks[4] = checks[4].model_copy(update={"status": Status.SKIPPED, "per_step": ()})
    broken = parity.model_copy(update={"checks": tuple(checks), "stale_reasons": ("the weights changed",)})
    text = Page(render_report(changed(content, parity=broken))).text["parity"]
    assert text.count("\u2717 fail") == 1 and text.count("skipped") == 1 and "the weights changed" in text
    assert "3 817 1 1e-6 5 2e-2 yes" in text


def test_what_was_not_measured_is_left_out(content):
    nothing = {"pictures": {}, "parity": None, "bench": None, "bundle": None}
    page = Page(render_report(changed(content, **nothing)))
    assert [each["id"] for each in page.all("section")] == ["machine"] and page.all("img") == []
    page = Page(render_report(changed(content, **{**nothing, "bench": content.bench})))
    assert [each["id"] for each in page.all("section")] == ["latency", "machine"]


def test_a_static_bundle_has_a_plan_and_no_masks(content, make_bundle, make_checkpoint, small_config):
    static = inspect(make_bundle(make_checkpoint(small_config.without_routers())).path)
    page = Page(render_report(changed(content, bundle=static.facts, pictures=static.pictures())))
    assert [each["id"] for each in page.all("section")] == ["parity", "latency", "plan", "machine"]
    assert (
        page.all("img") == [] and "1 distinct mask in 12 steps becomes 1 subnetwork for 1 segment" in page.text["plan"]
    )


def test_it_is_written_as_utf8(content, tmp_path):
    write_report(tmp_path / "deep" / "report.html", content)
    assert (tmp_path / "deep" / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_without_jinja_one_line_says_what_to_install(content, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(DyditError, match=r"pip install 'dydit\[report\]'"):
        render_report(content)
