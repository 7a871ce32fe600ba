"""The report of a tiny run: complete, self-contained, and its pictures show the numbers."""

from __future__ import annotations

import json
import re
import resource
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import figures
import report as report_module
from configuration import ModelConfig, TrainConfig
from corpus import Corpus, read_corpus
from errors import TrainingError
from evaluation import ContextCurve
from report import write_report
from run_folder import RunFolder
from training import TrainResult, train


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


@dataclass
class Run:
    corpus: Corpus
    result: TrainResult

    def report(self, out: Path, corpus: Corpus | None = None, full: bool = False) -> Path:
        with RunFolder(out) as folder:
            command = "python examples/longnet \udcff"  # a name that is no text
            return write_report(
                self.result, corpus or self.corpus, folder, command=command, full=full,
                num_windows=2,
            )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("report")
    (folder / "text").write_bytes(b"<b>some & text</b>\n" * 200)
    config = TrainConfig(
        input=str(folder / "text"), context=64, steps=3, warmup_steps=1,
        model=ModelConfig(
            embed_dim=16, num_layers=1, num_heads=2, segments=(16, 64), dilations=(1, 2)
        ),
    )  # fmt: skip
    corpus = read_corpus(config.input, context=64)
    with RunFolder(folder) as run_folder:
        return Run(corpus, train(config, corpus, run_folder, plain=True))


@pytest.fixture(scope="module")
def report(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "REPORT_LENGTHS", (64, 128))
        return run.report(tmp_path_factory.mktemp("full"), full=True)


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
        r"python examples/longnet \udcff", "What context buys", "Time and memory",
        "The pattern used", "A sample", "this operator", "runs this", torch.__version__,
        "dense attention (torch&#39;s SDPA)",
    ):  # fmt: skip
        assert word in text, word
    assert "<b>some" not in text  # the sample is escaped
    assert "This is not the corpus" not in text


def test_json_has_every_number(report: Path) -> None:
    values = json.loads(report.with_suffix(".json").read_text())
    assert len(values["training"]["history"]) == values["training"]["steps"] == 3
    assert values["context_curve"]["contexts"] == [64]
    assert {row["seqlen"] for row in values["timing"]} == {64, 128}
    assert {row["pass"] for row in values["timing"]} == {"forward", "forward_backward"}
    assert values["machine"]["torch"] == torch.__version__
    assert values["parameters"] > 0
    assert values["explain"]


def test_tables_scroll_in_what_is_too_narrow_for_them(report: Path) -> None:
    """No column is cut: a table stands in a box that scrolls, and its long cells wrap."""
    text = report.read_text()
    assert (
        len(re.findall("<table", text)) == len(re.findall('<div class="scroll"><table', text)) == 3
    )
    assert re.search(r"\.scroll \{ overflow-x: auto; \}", text)
    assert re.search(r"td, th \{[^}]*overflow-wrap: anywhere", text)
    assert '<meta name="viewport" content="width=device-width' in text
    rows = re.findall(r"<tr>.*?</tr>", text, re.DOTALL)
    timing = [row for row in rows if 'class="number"' in row]
    assert len(timing) == 13  # 2 lengths, 2 passes, 3 methods
    assert {len(re.findall(r"<t[dh]", row)) for row in timing} == {7}


def test_another_corpus_is_said(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"something else\n" * 100)
    corpus = read_corpus(other, context=64)
    page = run.report(tmp_path, corpus)
    assert "This is not the corpus the model learnt from" in page.read_text()
    said = json.loads(page.with_suffix(".json").read_text())["corpus"]
    assert not said["is_the_models"]
    assert said["models_sha256"] == run.corpus.fingerprint
    assert said["sha256"] == corpus.fingerprint


def test_a_report_is_whole_or_not_there(run: Run, tmp_path: Path) -> None:
    report = run.report(tmp_path)
    before = report.read_bytes()
    size, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(TrainingError, match=r"^--out: expected to write .* File too large"):
            run.report(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    assert report.read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("apart", [False, True])
def test_context_of_one_byte(tmp_path: Path, apart: bool) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}").write_bytes(f"{i} text\n".encode())
    config = TrainConfig(
        context=1, steps=1, separate_documents=apart,
        model=ModelConfig(embed_dim=16, num_layers=1, segments=(4,), dilations=(1,)),
    )  # fmt: skip
    corpus = read_corpus(tmp_path / "texts", context=1)
    with RunFolder(tmp_path / "run") as folder:
        result = train(config, corpus, folder, plain=True)
        assert write_report(result, corpus, folder, command="", full=False).exists()


def test_context_figure_has_units_and_values() -> None:
    curve = ContextCurve((256, 512), (3.0, 2.5), (0.0, 0.5), (0.0, 0.1), 4, 256)
    axes = figures.context_figure(curve).axes[0]
    assert axes.get_xlabel() == "context the model may read (bytes)"
    assert axes.get_ylabel() == "bits per byte"
    assert [t.get_text() for t in axes.texts] == ["3.000", "2.500"]
    assert asdict(curve)["num_windows"] == 4


def test_rows_that_were_not_run_say_why(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {
        "method": "dense_sdpa", "seqlen": 65536, "pass": "forward", "seconds_median": None,
        "seconds_iqr": None, "peak_extra_bytes": None, "flops": 1,
        "note": "not run: about 9 s per call",
    }  # fmt: skip
    run_row = {**row, "method": "dilated", "seconds_median": 1.0, "seconds_iqr": 0.5, "note": ""}
    monkeypatch.setattr(report_module, "length_sweep", lambda *_, **__: [row, run_row])
    text = run.report(tmp_path, full=True).read_text()
    dashes = '<td class="number">-</td>' * 3
    assert dashes + "<td>not run: about 9 s per call</td>" in text
    assert '<td class="number">1.0000</td>' in text
