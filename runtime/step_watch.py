"""Notices a forward on a GPU that never ends, as a rank that it waits for died or hangs.

Over gloo such a forward raises an error. On GPUs a collective is only launched. NCCL's own watchdog knows nothing of
collectives in a CUDA graph, and nothing watches symmetric memory: whoever waits for the device waits for ever, where no
exception can reach it. What can be done is to say which rank is lost, and to end the process.
"""

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, Protocol

import torch

from bdlora_compile.errors import AgreementError

_POLL_SECONDS = 0.5


class Mark(Protocol):
    """A place in the order of the device's work."""

    def query(self) -> bool:
        """Whether the device has passed it; may raise RuntimeError if the device has failed."""
        ...


def mark_now() -> Mark | None:
    """A mark behind all that was launched on the current stream; None while that is being captured."""
    if torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def end_process(error: AgreementError) -> NoReturn:
    """Print the error and end this process with status 1; Python cannot: a thread waits for the device."""
    print(f"bdlora_compile: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)


class StepWatch:
    """Watches one forward after the other from a thread, which the first forward starts.

    Args:
        limit: how long the device may take to get from one forward to a later one.
        first_limit: the same for the first forward of a graph: other ranks may still be compiling kernels.
        give_up: the error that names who is lost, see `Agreement.give_up`.
        mark: puts a mark behind a forward; None if it is not to be watched.
        end: what is done with the error.
    """

    def __init__(
        self,
        limit: timedelta,
        first_limit: timedelta,
        give_up: Callable[[str], AgreementError],
        mark: Callable[[], Mark | None] = mark_now,
        end: Callable[[AgreementError], object] = end_process,
    ) -> None:
        self._limits = limit.total_seconds(), first_limit.total_seconds()
        self._give_up = give_up
        self._mark = mark
        self._end = end
        # Of forwards that the device has not passed, oldest first; as many as the host may be ahead.
        self._marks: deque[tuple[Mark, float]] = deque()
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def launched(self, *, is_first: bool = False) -> None:
        """A forward was launched on the current stream."""
        if self._stopped.is_set():
            return
        mark = self._mark()
        if mark is None:
            return
        self._marks.append((mark, self._limits[is_first]))
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="bdlora-step-watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Somebody else watches from now on."""
        self._stopped.set()

    def _watch(self) -> None:
        had_marks, since = False, 0.0
        while not self._stopped.wait(min(_POLL_SECONDS, self._limits[0] / 4)):
            try:
                if self._pass() or not had_marks:
                    since = time.monotonic()
                had_marks = bool(self._marks)
                limit = self._marks[0][1] if had_marks else math.inf
                is_late = time.monotonic() - since > limit
                reason = f"a forward that was not over after {limit:g} s" if is_late else ""
            except RuntimeError as error:
                reason = f"the device failed: {error}"
            if reason:
                self._end(self._give_up(reason))
                return

    def _pass(self) -> bool:
        """Forget the forwards that the device has passed; returns whether there are any."""
        has_passed = False
        while self._marks and self._marks[0][0].query():
            self._marks.popleft()
            has_passed = True
        return has_passed
