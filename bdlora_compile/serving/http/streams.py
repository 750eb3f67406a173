"""Reading several streams at once, and noticing a client that has hung up."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import TypeVar

from starlette.types import Receive

from bdlora_compile.serving.requests import Event
from bdlora_compile.serving.stream import Stream

_T = TypeVar("_T")


class ClientGone(Exception):
    """Nobody reads the answer."""


async def merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Event]]:
    """(index of the stream, event) in the order in which events come, until all streams have ended."""
    events: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue(maxsize=len(streams))

    async def pump(index: int) -> None:
        async for event in streams[index]:
            await events.put((index, event))
        await events.put((index, None))

    pumps = [asyncio.create_task(pump(index)) for index in range(len(streams))]
    try:
        left = len(streams)
        while left:
            index, event = await events.get()
            if event is None:
                left -= 1
            else:
                yield index, event
    finally:
        for task in pumps:
            task.cancel()


async def while_connected(receive: Receive, work: Awaitable[_T], seconds: float) -> _T:
    """What ``work`` gives, unless the client hangs up before or time runs out.

    Raises:
        ClientGone: it hung up; the work was cancelled.
        TimeoutError: after ``seconds``; the work was cancelled.
    """
    task, gone = asyncio.ensure_future(work), asyncio.create_task(_hang_up(receive))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone if gone.done() else TimeoutError
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
