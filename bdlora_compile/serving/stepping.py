"""The engine's thread: it runs the steps, does between two of them what others ask for, and fails once for all."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from bdlora_compile.errors import BdloraError, EngineClosedError, LostRankError, first_line
from bdlora_compile.serving.scheduler import Scheduler

_LOG = logging.getLogger(__name__)

POLL_SECONDS = 0.005
"""How often a thread looks for what nobody announces."""

_T = TypeVar("_T")


class StepThread:
    """Runs a scheduler, and a second thread beside it that notices steps without end and ranks that are lost.

    Args:
        lost: why the other ranks cannot be reached any more, None while they can.
        step_timeout: seconds after which a step counts as hung.

    Attributes:
        failed: why no step will run any more; None while steps run.
        lock: whoever hands something to the scheduler holds it and looks at ``failed`` first: a failure is set under
            it, then ends all that was handed over.
    """

    def __init__(self, lost: Callable[[], LostRankError | None], step_timeout: float) -> None:
        self.failed: BdloraError | None = None
        self.lock = threading.RLock()
        self._lost = lost
        self._step_timeout = step_timeout
        self._wake = threading.Event()
        self._is_stopped = False
        self._ended = threading.Event()
        self._asked: SimpleQueue[_Asked] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, scheduler: Scheduler) -> None:
        """Begin. The threads alone keep the scheduler."""
        # Daemons: a step that hangs in a collective must not keep the process alive.
        self._thread = threading.Thread(target=self._serve, args=(scheduler,), name="bdlora-engine", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, args=(scheduler,), name="bdlora-engine-watch", daemon=True).start()

    def stop(self) -> None:
        """Cancel what runs, and end; what was asked for before is done. Waits ``step_timeout`` at most."""
        self._is_stopped = True
        self.wake()
        if self._thread is not None:
            self._thread.join(self._step_timeout)
        self._ended.set()

    def wake(self) -> None:
        """There is something to do."""
        self._wake.set()

    def ask(self, work: Callable[[], _T]) -> Future[_T]:
        """Let the thread do something between two steps.

        Raises:
            BdloraError: ``failed``.
        """
        result: Future[_T] = Future()
        with self.lock:
            if self.failed is not None:
                raise self.failed
            self._asked.put(_Asked(work, result))
        self.wake()
        return result

    # --- the thread -------------------------------------------------------------------------------------------------

    def _serve(self, scheduler: Scheduler) -> None:
        try:
            while not self._is_over:
                self._wake.clear()
                self._do_what_was_asked()
                if not scheduler.step() and not self._is_over:
                    # What waits although nothing runs waits for files, or for rows of others.
                    self._wake.wait(POLL_SECONDS if len(scheduler.waiting) else None)
            if self.failed is None:
                scheduler.end_all("cancelled")
        except Exception as error:
            self._fail(scheduler, error if isinstance(error, BdloraError) else _broken(error))
        finally:
            self._do_what_was_asked()

    @property
    def _is_over(self) -> bool:
        return self._is_stopped or self.failed is not None

    def _do_what_was_asked(self) -> None:
        with suppress(Empty):
            while True:
                self._asked.get_nowait().do(self.failed)

    # --- its end ----------------------------------------------------------------------------------------------------

    def _watch(self, scheduler: Scheduler) -> None:
        while not self._ended.wait(min(self._step_timeout / 4, 1.0)):
            if (lost := self._lost()) is not None:
                # A rank died while this one waits for the device, or for requests.
                self._fail(scheduler, lost)
                return
            since = scheduler.stepping_since
            if since is not None and time.monotonic() - since > self._step_timeout:
                self._fail(scheduler, hangs(self._step_timeout))
                return

    def _fail(self, scheduler: Scheduler, error: BdloraError) -> None:
        """End everything with an error: nothing can be asked of the ranks any more."""
        with self.lock:
            if self.failed is None:
                _LOG.error("the engine has failed: %s", error, exc_info=error)
                self.failed = error
        scheduler.abandon(self.failed)
        self._do_what_was_asked()
        self._ended.set()


@dataclass(frozen=True, slots=True)
class _Asked:
    """Something for the thread, and where its result goes."""

    work: Callable[[], Any]
    result: Future[Any]

    def do(self, failed: BdloraError | None) -> None:
        """Do it; raises what makes the ranks useless, after the caller has been told."""
        try:
            if failed is not None:
                raise failed
            self.result.set_result(self.work())
        except LostRankError as error:
            self.result.set_exception(error)
            if failed is None:
                raise
        except Exception as error:
            self.result.set_exception(error)


def hangs(seconds: float) -> LostRankError:
    """The error of a step without end."""
    return LostRankError(
        "engine",
        found=f"a step that has not ended after {seconds:g} s",
        expected="an end within step_timeout",
        remedy="look at the logs of all ranks: one died or hangs; start them again",
    )


def _broken(error: Exception) -> EngineClosedError:
    broken = EngineClosedError(
        "engine",
        found=f"{type(error).__name__} in a step: {first_line(error)}",
        expected="a step without errors",
        remedy="look at the log, and start the process again",
    )
    broken.__cause__ = error
    return broken
