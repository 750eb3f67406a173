"""How factors get from host memory into the pool, and what has to wait for what.

Three streams of work exist: forwards (compute), uploads of new adapters, and moves of chunks that forwards may be
reading. An upload begins after everything that forwards were given so far, since its room may have been freed a moment
ago; it runs beside later forwards; and a forward waits for it only if one of its tokens uses that slot. A move runs
between two forwards, in their own order.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Work = Callable[[], None]


class Ticket(Protocol):
    """An upload that was started."""


class Copier(Protocol):
    """Does the copies of one bank. Calls come from one thread at a time, never from inside a forward."""

    def host_memory(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory of the host that an upload reads at full speed.

        Raises:
            RuntimeError: there is none left.
        """
        ...

    def step(self, tickets: Sequence[Ticket]) -> None:
        """A forward is about to be launched on the current stream, and reads what ``tickets`` upload.

        It begins when the one before has ended, whatever stream that is on.
        """
        ...

    def upload(self, work: Work) -> Ticket:
        """Do ``work`` (copies into room that no forward launched from now on reads before it waits for the ticket)."""
        ...

    def between_steps(self, work: Work, tickets: Sequence[Ticket]) -> None:
        """Do ``work`` after all forwards launched so far and after ``tickets``, and before any later forward."""
        ...


class PlainCopier:
    """Copies in the memory of the CPU: whatever was asked for is done when the call returns."""

    def host_memory(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(numel, dtype=dtype)

    def step(self, tickets: Sequence[Ticket]) -> None:
        return None

    def upload(self, work: Work) -> Ticket:
        work()
        return None

    def between_steps(self, work: Work, tickets: Sequence[Ticket]) -> None:
        work()


class StreamCopier:
    """Copies to a GPU from pinned memory, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._uploads = torch.cuda.Stream(device)
        self._compute = torch.cuda.current_stream(device)

    def host_memory(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(numel, dtype=dtype, pin_memory=True)

    def step(self, tickets: Sequence[Ticket]) -> None:
        # Loads may come from another thread, whose current stream is not that of the forwards.
        current = torch.cuda.current_stream(self._device)
        # A caller who records has waited for the GPU, and may not wait for other streams inside.
        if current != self._compute and not torch.cuda.is_current_stream_capturing():
            # Forwards share memory: the slots of their tokens, recorded ones' tensors, what ranks exchange.
            current.wait_stream(self._compute)
            self._compute = current
        self._wait(tickets)

    def upload(self, work: Work) -> Ticket:
        self._uploads.wait_stream(self._compute)
        with torch.cuda.stream(self._uploads):
            work()
            return self._uploads.record_event()

    def between_steps(self, work: Work, tickets: Sequence[Ticket]) -> None:
        self._wait(tickets)
        with torch.cuda.stream(self._compute):
            work()

    def _wait(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            assert isinstance(ticket, torch.cuda.Event), "a ticket of this copier"
            self._compute.wait_event(ticket)


def copier_for(device: torch.device) -> Copier:
    """The copier for banks on ``device``."""
    return StreamCopier(device) if device.type == "cuda" else PlainCopier()
