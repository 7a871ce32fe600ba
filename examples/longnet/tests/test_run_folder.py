"""Nothing of a run is lost: whole files or none, one writer, old runs go last."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import run_folder
from errors import TrainingError
from run_folder import RunFolder, load_checkpoint


def _saved(out: Path, *steps: int) -> RunFolder:
    folder = RunFolder(out)
    with folder:
        for step in steps:
            folder.save(step, {"weights": torch.arange(1000.0) + step})
    return folder


def _steps(folder: RunFolder) -> list[int]:
    return [int(path.stem[5:]) for path in folder.checkpoints()]


def test_the_newest_two_are_kept_in_order_of_numbers(tmp_path: Path) -> None:
    assert _steps(_saved(tmp_path, 2, 99_999_999, 100_000_000)) == [100_000_000, 99_999_999]


@pytest.mark.parametrize("damage", ["half", "flipped", "empty", "foreign", "folder"])
def test_damaged_checkpoint_falls_back(tmp_path: Path, damage: str) -> None:
    folder = _saved(tmp_path, 4, 6)
    path, before = folder.checkpoints()
    content = bytearray(path.read_bytes())
    if damage == "half":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        torch.save({"step": 6, "model": {}}, path)
    else:
        path.unlink()
        path.mkdir()
    said: list[str] = []
    assert folder.latest(said.append)["step"] == 4
    assert len(said) == 1
    assert said[0].startswith("--out: expected a")
    assert f", got {path} (" in said[0]
    assert said[0].endswith("; trying the one before it")
    before.write_bytes(b"")
    with pytest.raises(TrainingError) as caught:
        folder.latest(said.append)
    assert str(caught.value) == (
        f"--out: expected a whole checkpoint in {path.parent}, got 2 that are not (another --out; "
        "train and demo have --overwrite)"
    )


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {"format": "another"}])
def test_other_files_are_no_checkpoints(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "x.pt"
    torch.save(content, path)
    with pytest.raises(TrainingError) as caught:
        load_checkpoint(path)
    assert str(caught.value) == (
        f"--out: expected a checkpoint of this program, got {path} (another program's, or an older "
        "version's)"
    )


@pytest.mark.parametrize("name", ["checkpoint", "report.html"])
def test_full_disk_leaves_what_was_there(tmp_path: Path, name: str) -> None:
    """A write that the system cuts short is seen by nobody, checkpoint or report."""
    folder = _saved(tmp_path, 1)
    big = {"weights": torch.zeros(1000)}
    with folder:
        folder.write("report.html", b"whole")
        before = _limit_files(20)
        try:
            with pytest.raises(TrainingError) as caught:
                folder.save(2, big) if name == "checkpoint" else folder.write(name, b"x" * 1000)
        finally:
            _limit_files(before)
    path = tmp_path / ("checkpoints/step-00000002.pt" if name == "checkpoint" else name)
    kept = tmp_path / "checkpoints" / "step-00000001.pt"
    hint = f" (the last good checkpoint is {kept})" if name == "checkpoint" else ""
    assert str(caught.value) == f"--out: expected to write {path}, got: File too large{hint}"
    assert os.listdir(kept.parent) == [kept.name]
    assert load_checkpoint(kept)["step"] == 1
    assert (tmp_path / "report.html").read_bytes() == b"whole"
    assert {p.name for p in tmp_path.iterdir()} <= {"checkpoints", "report.html", ".lock"}


def _limit_files(size: int) -> int:
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return before


def test_replacing_a_run_deletes_it_last(tmp_path: Path) -> None:
    folder = _saved(tmp_path, 40, 80)
    with folder:
        folder.write("report.html", b"of the old run")
        folder.replace_run()
        assert _steps(folder) == [80, 40]
        assert folder.own_checkpoints() == []
        before = _limit_files(20)
        try:
            with pytest.raises(TrainingError):
                folder.save(1, {})
        finally:
            _limit_files(before)
        assert _steps(folder) == [80, 40]
        assert (tmp_path / "report.html").exists()
        folder.save(1, {})
        assert _steps(folder) == [1]
        assert not (tmp_path / "report.html").exists()
        folder.save(2, {})
    assert _steps(folder) == [2, 1]


def test_a_new_step_of_the_same_number_takes_the_place(tmp_path: Path) -> None:
    folder = _saved(tmp_path, 40)
    with folder:
        folder.replace_run()
        folder.save(40, {"new": True})
    assert folder.latest()["new"]


def test_one_writer_per_folder(tmp_path: Path) -> None:
    """Also between processes; a writer that was killed leaves no lock."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from run_folder import RunFolder\n"
        "with RunFolder(sys.argv[2]) as folder: print('locked', flush=True); sys.stdin.read()"
    )
    source = str(Path(run_folder.__file__).parent)
    other = subprocess.Popen(
        [sys.executable, "-c", program, source, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(TrainingError) as caught:
        RunFolder(tmp_path).__enter__()
    assert str(caught.value) == (
        f"--out: expected a folder of its own, got {tmp_path} (another run writes there)"
    )
    other.kill()
    other.communicate()
    with RunFolder(tmp_path):
        pass


def test_left_over_temporary_files_go(tmp_path: Path) -> None:
    folder = _saved(tmp_path, 1)
    stale = tmp_path / "checkpoints" / ".step-00000002.pt.tmp"
    stale.write_bytes(b"half")
    with folder:
        assert not stale.exists()


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_unwritable_folder(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    out = tmp_path / "file" if kind == "file" else tmp_path / "file" / "run"
    assert RunFolder(out).checkpoints() == []
    with pytest.raises(TrainingError) as caught:
        RunFolder(out).__enter__()
    assert str(caught.value) == f"--out: expected a writable folder, got {out} (Not a directory)"
