"""The program: every command runs; wrong arguments end with one line and exit code 2."""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dilated.cli import main
from dilated.training import latest_checkpoint

SMALL = [
    *("--context", "64", "--steps", "4", "--batch-size", "1", "--threads", "1", "--plain"),
    *("--embed-dim", "16", "--num-layers", "1", "--num-heads", "2"),
    *("--segments", "16,64", "--dilations", "1,2"),
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(b"".join(f"line {i} of {i * i}\n".encode() for i in range(400)))
    return path


def test_train_generate_report(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", "--input", str(text), "--out", str(out), *SMALL]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^step 4/4 \| \d\.\d{3} bits/byte \| [\d.]+ kB/s \| 0:00 left$", shown, re.M)
    report = json.loads((out / "report.json").read_text())
    assert report["command"].startswith("dilated train --input ")
    assert report["timing"] == []
    assert (out / "report.html").is_file()
    command = ["generate", "--out", str(out), "--prompt", "line ", "--bytes", "5", "--window", "32"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("line ")
    assert "every byte runs the model over the last 32 bytes again (no cache)" in captured.err
    (out / "report.html").unlink()
    assert main(["report", "--out", str(out), "--report", "short"]) == 0
    assert (out / "report.html").is_file()


def test_demo_twice_goes_on_or_starts_anew(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["demo", "--input", str(text), "--out", str(tmp_path / "demo"), "--report", "none"]
    assert main([*command, *SMALL]) == 0
    assert main([*command, *SMALL]) == 0
    assert "holds a finished run: starting anew" in capsys.readouterr().out


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--seqlen", "100"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch: ", "cpu (available): Highway ", "reference (available)", "runs this"):
        assert word in shown


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    picture = tmp_path / f"pattern.{suffix}"
    command = "pattern --seqlen 64 --segments 16,64 --dilations 1,4 --causal --head 1 --num-heads 4"
    assert main([*command.split(), "--out", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "branch 0: segment 16, dilation 1: 2176 pairs" in shown  # 4 heads * 4 * 16 * 17 / 2
    assert "branch 1: segment 64, dilation 4: 544 pairs" in shown  # 4 heads * 16 * 17 / 2
    assert picture.stat().st_size > 1000


def test_bench_is_the_benchmark_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--rows", "nonsense"])
    assert stopped.value.code == 2
    assert "dilated bench: error: --rows: expected some of paper-" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "train --input {tmp}/none",
            "dilated train: error: --input: expected a readable file or folder, got {tmp}/none "
            "(it does not exist)",
        ),
        (
            "train --input {text} --out {text}/run --context 64",
            "dilated train: error: --out: expected a writable folder, got {text}/run "
            "(Not a directory)",
        ),
        (
            "train --input {text} --out {tmp}/run --resume",
            "dilated train: error: --resume: expected checkpoints in {tmp}/run/checkpoints, "
            "got none",
        ),
        (
            "train --input {text} --out {tmp}/run --context 64 --embed-dim 18",
            "dilated train: error: LongNetLM: embed_dim: expected a multiple of 2 * num_heads = 8, "
            "got 18 (xPos rotates pairs of head_dim = embed_dim / num_heads)",
        ),
        (
            "train --input {text} --out {tmp}/run --steps 0",
            "dilated train: error: --steps: expected >= 1, got 0",
        ),
        (
            "train --input {text} --out {tmp}/run --threads 0",
            "dilated train: error: --threads: expected >= 1, got 0",
        ),
        (
            "generate --out {tmp}/none",
            "dilated generate: error: --resume: expected checkpoints in {tmp}/none/checkpoints, "
            "got none",
        ),
        (
            "pattern --seqlen 8 --segments 4 --dilations 1 --out {tmp}/x.jpg",
            "dilated pattern: error: --out: expected a name ending in .png or .svg, "
            "got {tmp}/x.jpg",
        ),
        (
            "pattern --seqlen 5000 --segments 4 --dilations 1 --out {tmp}/x.png",
            "dilated pattern: error: --seqlen: expected <= 4096 for a picture without --causal, "
            "got 5000",
        ),
    ],
)
def test_errors_are_one_line(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    names = {"text": text, "tmp": tmp_path}
    assert main(command.format(**names).split()) == 2
    assert capsys.readouterr().err == message.format(**names) + "\n"


def test_missing_matplotlib_is_said_before_training(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert main(["train", "--input", str(text), "--out", str(tmp_path / "run"), *SMALL]) == 2
    assert capsys.readouterr().err == (
        "dilated train: error: matplotlib is needed for pictures: pip install 'dilated[demo]'\n"
    )
    assert not (tmp_path / "run").exists()


def _start(text: Path, out: Path, *more: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dilated", "train", "--input", str(text), "--out", str(out)]
    return subprocess.Popen(
        [*command, *SMALL, "--report", "none", *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def _newest(out: Path) -> int:
    return max((int(path.stem[5:]) for path in out.glob("checkpoints/step-*.pt")), default=0)


def _run_until(step: int, stop: signal.Signals, text: Path, out: Path, *more: str) -> str:
    """Starts a long run, sends the signal once a checkpoint of `step` or later is there."""
    process = _start(text, out, "--steps", "3000", "--checkpoint-every", "5", *more)
    while process.poll() is None and _newest(out) < step:
        time.sleep(0.02)
    process.send_signal(stop)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + stop, errors
    return shown


def test_ctrl_c_saves_and_resume_continues(text: Path, tmp_path: Path) -> None:
    """A real SIGINT to a real process: exit 130; resumed losses are an uninterrupted run's."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    shown = _run_until(5, signal.SIGINT, text, parts)
    before = latest_checkpoint(parts)
    stopped = before["step"]
    assert 5 <= stopped < 3000
    assert f"stopped at step {stopped} of 3000; saved. To go on: dilated train --out" in shown
    _run_until(stopped + 5, signal.SIGTERM, text, parts, "--resume")
    _run_until(stopped + 5, signal.SIGINT, text, whole)
    histories = [latest_checkpoint(out)["history"] for out in (parts, whole)]
    assert histories[0][:stopped] == before["history"]
    resumed, expected = ([record["loss"] for record in history] for history in histories)
    common = min(len(resumed), len(expected))
    assert common >= stopped + 5
    assert resumed[:common] == expected[:common]


def test_no_room_for_a_checkpoint(text: Path, tmp_path: Path) -> None:
    """The system refuses large files, as a full disk does: exit 2, one line, nothing torn left."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = _start(text, tmp_path / "run", preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    folder = tmp_path / "run" / "checkpoints"
    assert process.returncode == 2
    assert errors == (
        f"dilated train: error: --out: expected to write {folder / 'step-00000004.pt'}, got: "
        "File too large (there is no checkpoint yet)\n"
    )
    assert list(folder.iterdir()) == []
