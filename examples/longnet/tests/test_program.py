"""The program: every command runs, nothing is lost, wrong arguments end with one line."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import pty
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from run_folder import RunFolder

PROGRAM = Path(__file__).parents[1]
SMALL = [
    *("--context", "64", "--steps", "4", "--batch-size", "1", "--threads", "1", "--plain"),
    *("--embed-dim", "16", "--num-layers", "1", "--num-heads", "2"),
    *("--segments", "16,64", "--dilations", "1,2", "--report", "none"),
]


def program() -> Any:
    """`__main__.py` as a module; its folder is no package."""
    spec = importlib.util.spec_from_file_location("longnet_program", PROGRAM / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str]) -> int:
    return int(program().main(arguments))


def options() -> dict[str, list[str]]:
    """The flags of every command."""
    (commands,) = (a for a in program()._parser()._actions if a.dest == "command")
    return {
        name: [flag for a in command._actions for flag in a.option_strings if flag[:2] == "--"]
        for name, command in commands.choices.items()
    }


def train(text: Path, out: Path, *more: str, command: str = "train") -> list[str]:
    return [command, "--input", str(text), "--out", str(out), *SMALL, *more]


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


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in RunFolder(out).latest()["history"]]


def newest(out: Path) -> int:
    return max((int(path.stem[5:]) for path in RunFolder(out).checkpoints()), default=0)


@pytest.fixture
def run(text: Path, tmp_path: Path) -> Path:
    """A finished run."""
    assert main(train(text, tmp_path / "run")) == 0
    return tmp_path / "run"


def test_train_generate_report(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(train(text, out, "--report", "short")) == 0
    shown = capsys.readouterr().out
    pattern = r"^step 4/4 \| \d\.\d{3} bits/byte \| [\d.]+ kB/s \| 00:00 left$"
    assert re.search(pattern, shown, re.MULTILINE)
    report = json.loads((out / "report.json").read_text())
    assert report["command"].startswith("python examples/longnet train --input ")
    assert report["timing"] == []
    assert report["corpus"]["is_the_models"]
    command = ["generate", "--out", str(out), "--bytes", "5", "--window", "32"]
    assert main([*command, "--prompt", "def "]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("def ")
    assert "every byte runs the model over the last 32 bytes again (no cache)" in captured.err
    (out / "report.html").unlink()
    assert main(["report", "--out", str(out), "--report", "short"]) == 0
    assert (out / "report.html").is_file()
    other = tmp_path / "other"
    other.write_bytes(b"another text " * 50)
    assert main(["report", "--out", str(out), "--report", "short", "--input", str(other)]) == 0
    assert "This is not the corpus" in (out / "report.html").read_text()


# --- no run is lost -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        ["--input", "/no/such/file"], ["--embed-dim", "18"], ["--segments", "16"],
        ["--context", "10000"], ["--preset", "fkodom"], ["--threads", "0"], ["--steps", "0"],
        ["--learning-rate", "nan"], ["--glob", "*.py"], ["--separate-documents"],
        ["--merge", "sum"], ["--num-heads", "99999999999999999999"], ["--learning-rate", "1e30"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_overwrite_with_a_bad_option_deletes_nothing(
    text: Path, run: Path, bad: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    refused(train(text, run, "--overwrite", "--warmup-steps", "0", *bad), capsys)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_overwrite_replaces(text: Path, run: Path) -> None:
    before = losses(run)
    assert main(train(text, run, "--overwrite", "--seed", "7", "--steps", "3")) == 0
    assert len(losses(run)) == 3
    assert losses(run) != before[:3]
    assert newest(run) == 3


def test_demo_twice_keeps_a_finished_run(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert main(train(text, out, command="demo")) == 0
    before = RunFolder(out).checkpoints()[0].read_bytes()
    assert main(train(text, out, command="demo")) == 0
    assert f"{out} holds this run at step 4 of 4" in capsys.readouterr().out
    assert RunFolder(out).checkpoints()[0].read_bytes() == before
    assert main(train(text, out, "--steps", "6", command="demo")) == 0
    assert newest(out) == 6


def test_demo_replaces_no_other_run(
    text: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = losses(run)
    assert refused(train(text, run, "--seed", "5", command="demo"), capsys) == (
        "longnet demo: error: --seed: expected 0 as in the checkpoint, got 5 (only --steps, "
        "--learning-rate, --checkpoint-every, --input, --glob may change; --overwrite starts anew)"
    )
    assert losses(run) == before


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), *arguments]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, text=True, **streams)


def wait_for(step: int, process: subprocess.Popen[str], out: Path) -> None:
    while process.poll() is None and newest(out) < step:
        time.sleep(0.02)


def run_until(step: int, stop: signal.Signals, text: Path, out: Path, *more: str) -> str:
    """Starts a long run, sends the signal once a checkpoint of `step` or later is there."""
    process = start(*train(text, out, "--steps", "3000", "--checkpoint-every", "5", *more))
    wait_for(step, process, out)
    process.send_signal(stop)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + stop, errors
    return shown


def test_signals_save_and_resume_continues(text: Path, tmp_path: Path) -> None:
    """Real signals to a real process; resumed losses are an uninterrupted run's."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    shown = run_until(5, signal.SIGINT, text, parts)
    before = losses(parts)
    stopped = len(before)
    assert 5 <= stopped < 3000
    hint = re.search(rf"stopped at step {stopped} of 3000; saved. To go on: (.*)\n", shown)
    assert hint is not None
    again = [sys.executable, str(PROGRAM), "train", "--out", str(parts), "--resume"]
    assert shlex.split(hint[1]) == again
    run_until(stopped + 5, signal.SIGHUP, text, parts, "--resume")
    run_until(stopped + 5, signal.SIGTERM, text, whole)
    resumed, expected = losses(parts), losses(whole)
    assert resumed[:stopped] == before
    common = min(len(resumed), len(expected))
    assert common >= stopped + 5
    assert resumed[:common] == expected[:common]


def test_a_reader_that_goes_away_costs_no_step(text: Path, tmp_path: Path) -> None:
    """`train | head -n 3`: saved, and no success."""
    out = tmp_path / "run"
    process = start(*train(text, out, "--steps", "1000000", "--checkpoint-every", "5"))
    assert process.stdout is not None
    wait_for(5, process, out)
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    said = re.fullmatch(
        r"longnet train: error: standard output: expected one that takes lines, got: Broken pipe "
        r"\(stopped at step (\d+) of 1000000, saved; --resume goes on\)\n",
        errors,
    )
    assert said is not None, errors
    assert newest(out) == int(said[1]) == len(losses(out))


def test_a_terminal_that_hangs_up_costs_no_step(text: Path, tmp_path: Path) -> None:
    """On a real terminal, with its progress bar: the line drops, the run is saved."""
    out = tmp_path / "run"
    arguments = train(text, out, "--steps", "1000000", "--checkpoint-every", "5")
    arguments.remove("--plain")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(PROGRAM), *arguments])
    shown = b""
    while newest(out) < 5:
        shown += os.read(terminal, 10000)
    os.close(terminal)  # SIGHUP, and every write fails
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) > 0
    assert b"bits/byte" in shown
    stopped = newest(out)
    assert stopped == len(losses(out))


def test_two_runs_do_not_meet_in_a_folder(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    long = train(text, out, "--steps", "1000000", "--checkpoint-every", "5")
    first = start(*long)
    wait_for(5, first, out)
    for more in (["--overwrite"], ["--resume"]):
        second = start(*long, *more)
        assert second.communicate(timeout=60)[1] == (
            f"longnet train: error: --out: expected a folder of its own, got {out} (another run "
            "writes there)\n"
        )
        assert second.returncode == 2
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    assert newest(out) >= 5


def test_no_room_for_a_checkpoint(text: Path, tmp_path: Path) -> None:
    """The system refuses large files, as a full disk does: exit 2, one line, nothing torn left."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(*train(text, tmp_path / "run"), preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    folder = tmp_path / "run" / "checkpoints"
    assert process.returncode == 2
    assert errors == (
        f"longnet train: error: --out: expected to write {folder / 'step-00000004.pt'}, got: "
        "File too large (there is no checkpoint)\n"
    )
    assert list(folder.iterdir()) == []


# --- generate -----------------------------------------------------------------------------------


def test_prompts_and_texts_of_any_bytes(run: Path, tmp_path: Path) -> None:
    """What goes into a pipe is what was drawn, to the byte, whatever the terminal's alphabet."""
    prompt = bytes(range(1, 256))
    (tmp_path / "prompt").write_bytes(prompt)
    texts = []
    for source in (["--prompt", os.fsdecode(prompt)], ["--prompt-file", str(tmp_path / "prompt")]):
        command = [sys.executable, PROGRAM, "generate", "--out", run, "--bytes", "40", *source]
        environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
        result = subprocess.run(
            command, capture_output=True, check=True, timeout=60, env=environment
        )
        texts.append(result.stdout)
    assert texts[0] == prompt + texts[1]
    assert len(texts[1]) == 41


def test_a_terminal_without_unicode_shows_a_text(run: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(PYTHONIOENCODING="ascii", LC_ALL="C")
        arguments = ["generate", "--out", str(run), "--prompt", "\u00e9 ", "--bytes", "30"]
        os.execv(sys.executable, [sys.executable, str(PROGRAM), *arguments])
    shown = b""
    try:
        while part := os.read(terminal, 10000):
            shown += part
    except OSError:  # the end of a terminal
        pass
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0, shown
    assert shown.startswith(b"\\xe9 ")
    assert b"30 bytes in " in shown


def test_text_is_written_as_it_is_drawn(run: Path) -> None:
    """Ctrl-C after a while loses nothing of what was drawn."""
    process = subprocess.Popen(
        [sys.executable, PROGRAM, "generate", "--out", run, "--bytes", "1000000", "--prompt", "ab"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(20).startswith(b"ab")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b"longnet generate: stopped\n"


def test_a_full_output_stops_generation_at_once(run: Path) -> None:
    with open("/dev/full", "w", encoding="ascii") as full:
        process = start("generate", "--out", str(run), "--bytes", "1000000", stdout=full)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors == "longnet generate: error: [Errno 28] No space left on device\n"


# --- wrong arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --input {tmp}/none",
         "train: error: --input: expected readable files and folders, got {tmp}/none (No such file "
         "or directory)"),
        ("train --input {text} --out {text}/run --context 64",
         "train: error: --out: expected a writable folder, got {text}/run (Not a directory)"),
        ("train --input {text} --out {text} --context 64",
         "train: error: --out: expected a writable folder, got {text} (Not a directory)"),
        ("train --input {text} --out {tmp}/run --resume",
         "train: error: --out: expected checkpoints in {tmp}/run/checkpoints, got none"),
        ("train --input {text} --out {tmp}/run --resume --overwrite",
         "train: error: argument --overwrite: not allowed with argument --resume"),
        ("train --input {text} --out {tmp}/run --context 64 --embed-dim 18",
         "train: error: LongNetLM: embed_dim: expected a multiple of 2 * num_heads = 8, got 18 "
         "(xPos rotates pairs of head_dim = embed_dim / num_heads)"),
        ("train --input {text} --steps 0", "train: error: --steps: expected >= 1, got 0"),
        ("train --input {text} --threads 0",
         "train: error: --threads: expected 1 to 1024, got 0"),
        ("train --input {text} --steps 99999999999999999999",
         "train: error: argument --steps: expected an integer of 64 bits, got "
         "'99999999999999999999'"),
        ("train --input {text} --seed 99999999999999999999",
         "train: error: --seed: expected an integer of 64 bits, got 99999999999999999999"),
        ("train --input {text} --glob *.py",
         "train: error: --glob: expected a folder as --input, got {text}"),
        ("train --glob *.py", "train: error: --glob: expected a folder as --input, got none"),
        ("train --step 3", "error: unrecognized arguments: --step 3"),
        ("report --out {tmp}/none",
         "report: error: --out: expected checkpoints in {tmp}/none/checkpoints, got none"),
        ("generate --out {tmp}/none",
         "generate: error: --out: expected checkpoints in {tmp}/none/checkpoints, got none"),
        ("generate --prompt a --prompt-file b",
         "generate: error: argument --prompt-file: not allowed with argument --prompt"),
        ("generate --prompt-file {tmp}",
         "generate: error: --prompt-file: expected a readable file, got {tmp} (Is a directory)"),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    names = {"text": text, "tmp": tmp_path}
    line = refused(command.format(**names).split(), capsys)
    assert line.removeprefix("longnet ").removeprefix("longnet: ") == message.format(**names)
    assert sorted(os.listdir(tmp_path)) == ["text"]  # nothing was made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "generate: prompt: expected shape (n,) with n >= 1, got (0,)"),
        (["--temperature", "nan"], "generate: temperature: expected a finite number >= 0, got nan"),
        (["--bytes", "-1"], "generate: num_tokens: expected >= 0, got -1"),
        (["--top-k", "0"], "generate: top_k: expected >= 1, got 0"),
        (["--seed", str(2**64)], f"--seed: expected an integer of 64 bits, got {2**64}"),
    ],
)
def test_generate_refuses(
    run: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    line = refused(["generate", "--out", str(run), *options], capsys)
    assert line == f"longnet generate: error: {message}"


@pytest.mark.parametrize("change", ["config", "model", "history"])
def test_checkpoints_of_another_make_are_one_line(
    run: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in RunFolder(run).checkpoints():
        state = torch.load(path, weights_only=True)
        if change == "config":
            state["config"] = state["config"].replace("steps", "epochs")
        elif change == "model":
            state["model"] = {"weight": torch.zeros(2)}
        else:
            del state["history"]
        torch.save(state, path)
    capsys.readouterr()
    line = refused(["generate", "--out", str(run)], capsys)
    assert line.startswith("longnet generate: error: --out: expected ")


def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/texts\xff"))
    root.mkdir()
    for i in range(20):
        Path(os.fsdecode(os.fsencode(root) + b"/\xfe%d" % i)).write_bytes(b"%d words " % i * 30)
    out = root / "run"
    assert main(train(root, out, "--report", "short", "--glob", "\udcfe*")) == 0
    assert main(train(root, out, "--glob", "\udcfe*", "--resume", "--steps", "5")) == 0
    assert "texts\\udcff" in capsys.readouterr().out
    assert len(json.loads((out / "report.json").read_text())["corpus"]["held_out_files"]) > 0


ODD = ["", "-1", "0", "9" * 20, "9" * 5000, "nan", "-inf", "\u00e9\udcff", "/dev/null", "/"]


@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
@pytest.mark.parametrize("command", ["train", "report", "generate"])
def test_odd_values_work_or_are_one_line(
    command: str,
    value: str,
    text: Path,
    run: Path,
    tmp_path: Path,
    capsysbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every flag with every odd value: exit code 0, or 2 and one line; never a traceback."""
    monkeypatch.chdir(tmp_path)
    small = {
        "train": train(text, tmp_path / "other", "--overwrite"),
        "report": ["report", "--out", str(run), "--report", "short"],
        "generate": ["generate", "--out", str(run), "--bytes", "2"],
    }[command]
    for flag in options()[command]:
        if flag in ("--help", "--resume", "--overwrite"):
            continue
        capsysbinary.readouterr()
        try:
            code: object = main([*small, f"{flag}={value}"])
        except SystemExit as stopped:
            code = stopped.code
        errors = capsysbinary.readouterr().err
        assert code in (0, 2), (flag, errors)
        assert code == 0 or errors.count(b"\n") == 1, (flag, errors)


def test_texts_name_flags_that_exist() -> None:
    """Whatever a message, a hint or a help text tells the user to type."""
    known = {flag for flags in options().values() for flag in flags}
    for path in PROGRAM.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", node.value))
                assert named <= known, (path.name, node.lineno)
