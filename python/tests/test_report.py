"""The report of a tiny run: complete, self-contained, and its pictures show the numbers."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import dilated
from dilated.report import figures, write_report
from dilated.report.timing import cells
from dilated.training import ContextCurve, ModelConfig, TrainConfig, read_corpus, train


class _Page(HTMLParser):
    """Collects every address and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "data", "action")
        self.addresses += [value or "" for name, value in attrs if name in names]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "text").write_bytes(b"<b>some & text</b>\n" * 200)
    config = TrainConfig(
        input=str(folder / "text"), context=64, steps=3, warmup_steps=1,
        model=ModelConfig(
            embed_dim=16, num_layers=1, num_heads=2, segments=(16, 64), dilations=(1, 2)
        ),
    )  # fmt: skip
    corpus = read_corpus(config.input, context=64)
    result = train(config, corpus, folder, plain=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dilated.report.timing.REPORT_LENGTHS", (64, 128))
        return write_report(result, corpus, folder, command="dilated demo", num_windows=2)


def test_page_is_self_contained(report: Path) -> None:
    """Addresses are data inside the page or anchors of it; styles load nothing."""
    text = report.read_text()
    page = _Page()
    page.feed(text)
    assert page.addresses
    outside = [a for a in page.addresses if not a.startswith(("data:image/png;base64,", "#"))]
    assert outside == []
    assert re.findall(r"url\((?!['\"]?#)|@import|<script|<link", text) == []
    assert page.tags.count("svg") == 3
    assert page.tags.count("img") == 1


def test_page_says_what_ran(report: Path) -> None:
    text = report.read_text()
    for word in (
        "dilated demo", "What context buys", "Time and memory", "The pattern used", "A sample",
        "this operator", "dense scaled_dot_product_attention", "runs this", torch.__version__,
    ):  # fmt: skip
        assert word in text, word
    assert "<b>some" not in text  # the sample is escaped


def test_json_has_every_number(report: Path) -> None:
    values = json.loads(report.with_suffix(".json").read_text())
    assert len(values["training"]["history"]) == values["training"]["steps"] == 3
    assert values["context_curve"]["contexts"] == [64]
    assert {row["seqlen"] for row in values["timing"]} == {64, 128}
    assert {row["pass"] for row in values["timing"]} == {"forward", "forward_backward"}
    assert values["machine"]["torch"] == torch.__version__
    assert values["parameters"] > 0
    assert values["explain"]


def test_pattern_picture_is_the_cores_pattern() -> None:
    """The picture of a short pattern holds Plan.pattern's own table."""
    options = {"segments": (4, 8), "dilations": (1, 2), "num_heads": 2, "is_causal": True}
    figure = figures.pattern_figure(8, heads=[1], **options)
    shown = torch.tensor(figure.axes[0].images[0].get_array())
    expected = dilated.plan(8, **options).pattern(1)
    assert torch.equal(shown.to(torch.int32), expected)


def test_context_figure_has_units_and_values() -> None:
    curve = ContextCurve((256, 512), (3.0, 2.5), (0.0, 0.5), (0.0, 0.1), 4, 256)
    axes = figures.context_figure(curve).axes[0]
    assert axes.get_xlabel() == "context the model may read (bytes)"
    assert axes.get_ylabel() == "bits per byte"
    assert [t.get_text() for t in axes.texts] == ["3.000", "2.500"]
    assert asdict(curve)["num_windows"] == 4


def test_rows_that_were_not_run_say_why() -> None:
    row = {
        "method": "dense_sdpa", "seqlen": 65536, "pass": "forward", "seconds_median": None,
        "seconds_quartiles": None, "repeats": 0, "peak_extra_bytes": None, "flops": 1,
        "note": "not run: about 9 s per call",
    }  # fmt: skip
    assert cells(row)[3:] == ("-", "-", "-", "not run: about 9 s per call")
