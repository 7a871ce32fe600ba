"""The program: every command runs; whatever is wrong ends with one line and exit code 2."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dilated
from dilated.cli import main
from dilated.pattern import pattern_figure

PATTERN = "pattern --seqlen 64 --segments 16,64 --dilations 1,4 --causal --num-heads 4"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command prints; from the parser or from the command."""
    try:
        code: object = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    line = capsys.readouterr().err
    assert code == 2
    assert line.count("\n") == 1
    return line.rstrip("\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"dilated {dilated.__version__}\n"


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--seqlen", "100"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch: ", "cpu (available): Highway ", "reference (available)", "runs this"):
        assert word in shown


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    picture = tmp_path / f"pattern.{suffix}"
    assert main([*PATTERN.split(), "--head", "1", "--out", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "branch 0: segment 16, dilation 1: 2176 pairs" in shown  # 4 heads * 4 * 16 * 17 / 2
    assert "branch 1: segment 64, dilation 4: 544 pairs" in shown  # 4 heads * 16 * 17 / 2
    assert picture.stat().st_size > 1000
    assert os.listdir(tmp_path) == [picture.name]


@pytest.mark.parametrize(
    ("option", "other"),
    [
        ("--seqlen", "65"), ("--num-heads", "8"), ("--num-kv-heads", "2"), ("--offsets", "zero"),
        ("--segments", "8,64"), ("--dilations", "1,2"), ("--groups", "cumulative"),
        ("--gqa-offset", "q"), ("--preset", "head_groups"), ("--causal", None),
    ],
)  # fmt: skip
def test_every_option_of_pattern_acts(option: str, other: str | None) -> None:
    """Counts or pictures differ: no option of the command is ignored."""

    def answer(*more: str) -> list[list[int]]:
        from dilated.cli import _configuration, _parser

        fixed = ["pattern", "--segments", "16,64", "--dilations", "1,4"]
        heads = ["--num-heads", "4"]
        if option == "--gqa-offset":
            heads += ["--num-kv-heads", "1"]
        options = _parser().parse_args([*fixed, *heads, *more])
        plan = dilated.plan(options.seqlen, **_configuration(options))
        return [plan.pattern(0).tolist(), plan.pattern(1).tolist(), [plan.pair_counts]]

    assert answer() != answer(option, *([] if other is None else [other]))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("pattern --seqlen 8 --segments 4 --dilations 1 --out {tmp}/x.jpg",
         "dilated pattern: error: --out: expected a name ending in .png or .svg, got {tmp}/x.jpg"),
        ("pattern --seqlen 5000 --segments 4 --dilations 1 --out {tmp}/x.png",
         "dilated pattern: error: pattern_figure: seqlen: expected at most 4096 unless causal, got "
         "5000"),
        ("pattern --seqlen 0 --segments 4 --dilations 1 --out {tmp}/x.png",
         "dilated pattern: error: pattern_figure: seqlen: expected 1 or more, got 0"),
        ("pattern --segments 4 --dilations 1 --out {tmp}/folder.png",
         "dilated pattern: error: --out: expected to write {tmp}/folder.png, got: Is a directory"),
        ("pattern --segments 4 --dilations 1 --out {tmp}/none/x.png",
         "dilated pattern: error: --out: expected to write {tmp}/none/x.png, got: No such file or "
         "directory"),
        ("pattern --segments 4 --dilations 1 --head 1",
         "dilated pattern: error: --head: expected --out with it, got none (counts are those of "
         "all heads)"),
        ("pattern --segments 4 --dilations 1 --backend cpu",
         "dilated: error: unrecognized arguments: --backend cpu"),
        ("pattern --segment 4 --dilations 1",
         "dilated pattern: error: the following arguments are required: --segments"),
        ("pattern --segments 4,x --dilations 1",
         "dilated pattern: error: argument --segments: expected an integer of 64 bits, got 'x'"),
        ("info --seqlen 99999999999999999999",
         "dilated info: error: argument --seqlen: expected an integer of 64 bits, got "
         "'99999999999999999999'"),
        ("train", "dilated: error: argument COMMAND: invalid choice: 'train' (choose from 'info', "
         "'pattern')"),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    line = refused(command.format(tmp=tmp_path).split(), capsys)
    if command == "train":  # Python 3.12 leaves out the quotes
        line, message = line.replace("'", ""), message.replace("'", "")
    assert line == message.format(tmp=tmp_path)
    assert os.listdir(tmp_path) == ["folder.png"]


def test_missing_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert refused([*PATTERN.split(), "--out", str(tmp_path / "x.png")], capsys) == (
        "dilated pattern: error: --out: expected matplotlib, got none (pip install matplotlib)"
    )


def _process(stdout: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dilated", *PATTERN.split()]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, timeout=120
    )


def test_a_full_output_is_an_error() -> None:
    with open("/dev/full", "w", encoding="ascii") as full:
        result = _process(full.fileno())
    assert result.returncode == 2
    assert result.stderr == "dilated pattern: error: [Errno 28] No space left on device\n"


def test_a_closed_output_is_no_success() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = _process(writer)
    os.close(writer)
    assert result.returncode == 1
    assert result.stderr == "dilated pattern: standard output was closed\n"


def test_picture_is_the_cores_pattern() -> None:
    """The picture of a short pattern holds Plan.pattern's own table."""
    options = {"segments": (4, 8), "dilations": (1, 2), "num_heads": 2, "is_causal": True}
    figure = pattern_figure(8, heads=[1], **options)
    shown = torch.tensor(figure.axes[0].images[0].get_array())
    expected = dilated.plan(8, **options).pattern(1)
    assert torch.equal(shown.to(torch.int32), expected)


def test_the_library_speaks_of_arguments_not_of_flags() -> None:
    package = Path(dilated.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if path.name != "cli.py" and isinstance(node, ast.Constant):
                found = re.search(r"(?<![\w-])--[a-z]", str(node.value))
                assert found is None, (path.name, node.lineno)
