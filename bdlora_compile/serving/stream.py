"""The events of one request, for a thread or an event loop to iterate."""

from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Self

from bdlora_compile.serving.requests import Completion, Event, Request


class Stream:
    """What `Engine.submit` returns: `Token` events, then one `Finished`.

    Iterate it once: with ``for`` in any thread, or with ``async for`` in any event loop. Leaving a ``with`` block
    before the end cancels the request. Events wait here for a slow reader; there are at most max_tokens + 1.
    """

    @property
    def request(self) -> Request:
        """What was submitted."""
        raise NotImplementedError

    @property
    def adapter_version(self) -> str | None:
        """Digest of the adapter's contents (`AdapterSet.version`); None for the base model, and while it waits."""
        raise NotImplementedError

    @property
    def is_finished(self) -> bool:
        """Whether `Finished` was published, read or not."""
        raise NotImplementedError

    def cancel(self) -> None:
        """End the request at the next step; nothing if it has ended. From any thread."""
        raise NotImplementedError

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end; all events together.

        Raises:
            TimeoutError: after ``timeout`` seconds; the request goes on.
        """
        raise NotImplementedError

    def __iter__(self) -> Iterator[Event]:
        raise NotImplementedError

    def __aiter__(self) -> AsyncIterator[Event]:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cancel()
