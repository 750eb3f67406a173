"""The events of one request, for a thread or an event loop to iterate."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

from bdlora_compile.serving.requests import Completion, Event, Finished, Request, Token


class Stream:
    """What `Engine.submit` returns: `Token` events, then one `Finished`.

    Iterate it once: with ``for`` in any thread, or with ``async for`` in any event loop. Leaving a ``with`` block
    before the end cancels the request. Events wait here for a slow reader; there are at most max_tokens + 1.

    Args:
        request: what was submitted.
        wake: called by `cancel`, so that the engine looks at the stream.
    """

    def __init__(self, request: Request, wake: Callable[[], None] = lambda: None) -> None:
        self._request = request
        self._wake = wake
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._listener: Callable[[], object] = lambda: None
        self._version: str | None = None
        self._is_cancelled = self._is_finished = False

    @property
    def request(self) -> Request:
        """What was submitted."""
        return self._request

    @property
    def adapter_version(self) -> str | None:
        """Digest of the adapter's contents (`AdapterSet.version`); None for the base model, and while it waits."""
        return self._version

    @property
    def is_finished(self) -> bool:
        """Whether `Finished` was published, read or not."""
        return self._is_finished

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called before the end."""
        return self._is_cancelled

    def cancel(self) -> None:
        """End the request at the next step; nothing if it has ended. From any thread."""
        if not self._is_finished:
            self._is_cancelled = True
            self._wake()

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end; all events together.

        Raises:
            TimeoutError: after ``timeout`` seconds; the request goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._is_finished:
                left = None if deadline is None else deadline - time.monotonic()
                if not self._changed.wait(left) and left is not None:
                    raise TimeoutError(f"the request has not ended after {timeout:g} s")
        *tokens, finished = self
        assert isinstance(finished, Finished), "the last event"
        return Completion(tuple(token for token in tokens if isinstance(token, Token)), finished)

    def __iter__(self) -> Iterator[Event]:
        event: Event | None = None
        while not isinstance(event, Finished):
            with self._changed:
                self._changed.wait_for(lambda: self._events)
                event = self._events.popleft()
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._listener = lambda: loop.call_soon_threadsafe(ready.set)
        event: Event | None = None
        while not isinstance(event, Finished):
            ready.clear()
            event = self._take()
            if event is None:
                await ready.wait()
            else:
                yield event

    def _take(self) -> Event | None:
        with self._changed:
            return self._events.popleft() if self._events else None

    # --- the engine's side ------------------------------------------------------------------------------------------

    def begin(self, adapter_version: str | None) -> None:
        """The request has a row."""
        self._version = adapter_version

    def publish(self, event: Event) -> None:
        """Hand an event to the reader; the last one is a `Finished`."""
        with self._changed:
            self._events.append(event)
            self._is_finished = isinstance(event, Finished)
            self._changed.notify_all()
            # A reader whose event loop has ended reads no more.
            with suppress(RuntimeError):
                self._listener()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cancel()
