"""Every signal that would end the program as a request: the step in progress ends, the run is
saved, the program leaves with 128 plus the signal's number. Only SIGKILL ends it otherwise.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU")


class StopRequest:
    """Whether the run is to stop, and why: by a signal, or because its output is gone."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.output: OSError | None = None

    def __bool__(self) -> bool:
        return self.signal is not None or self.output is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns signals into a flag inside the block; the handlers before it return after.

    What was ignored before (SIGHUP under nohup) stays ignored.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may set handlers
        return

    def handle(number: int, _: FrameType | None) -> None:
        request.signal = number

    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handle)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
