"""What a run shows: a rich bar (step, bits per byte, bytes/s, time left) on a terminal, else plain
lines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

_SECONDS_BETWEEN_LINES = 10.0


class Display(Protocol):
    """Receives every finished step."""

    def __call__(self, step: int, bits_per_byte: float, bytes_per_second: float) -> None:
        """Shows one step."""


@contextmanager
def progress(first_step: int, steps: int, *, plain: bool | None = None) -> Iterator[Display]:
    """A display for steps first_step + 1 .. steps; `plain` None asks whether stdout is a
    terminal.
    """
    if plain is None:
        plain = not sys.stdout.isatty()
    if not plain:
        try:
            import rich.progress
        except ImportError:
            print("plain progress lines: rich is not installed (pip install 'dilated[demo]')")
            plain = True
    if plain:
        yield _plain(first_step, steps)
        return
    bar = rich.progress.Progress(
        rich.progress.TextColumn("training"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        rich.progress.TextColumn("{task.fields[bits]} bits/byte"),
        rich.progress.TextColumn("{task.fields[rate]} kB/s"),
        rich.progress.TextColumn("{task.fields[left]} left"),
    )
    with bar:
        task = bar.add_task("", total=steps, completed=first_step, bits="-", rate="-", left="-")
        left = _time_left(first_step, steps)

        def show(step: int, bits_per_byte: float, bytes_per_second: float) -> None:
            bar.update(
                task,
                completed=step,
                bits=f"{bits_per_byte:.3f}",
                rate=f"{bytes_per_second / 1e3:.1f}",
                left=left(step),
            )

        yield show


def _plain(first_step: int, steps: int) -> Display:
    left = _time_left(first_step, steps)
    last = -_SECONDS_BETWEEN_LINES

    def show(step: int, bits_per_byte: float, bytes_per_second: float) -> None:
        nonlocal last
        now = time.monotonic()
        if step < steps and step > first_step + 1 and now - last < _SECONDS_BETWEEN_LINES:
            return
        last = now
        print(
            f"step {step}/{steps} | {bits_per_byte:.3f} bits/byte | "
            f"{bytes_per_second / 1e3:.1f} kB/s | {left(step)} left",
            flush=True,
        )

    return show


def _time_left(first_step: int, steps: int) -> Callable[[int], str]:
    begin = time.monotonic()

    def left(step: int) -> str:
        seconds = (time.monotonic() - begin) / max(1, step - first_step) * (steps - step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    return left
