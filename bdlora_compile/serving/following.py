"""Rank 0 drives, the others follow: a program for one process serves a model on many ranks.

Rank 0's forwards and changes of adapters go to the others before they run: one broadcast over a gloo group of its own
for each call, of 4 KB if that is enough. What rank 0 computes on the host (sampling, streamers, scheduling, texts) it
computes alone. A call that fails must fail on every rank; a rank that fails alone, dies or hangs ends all of them.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import ProcessGroup

from bdlora_compile.errors import BdloraError, ConfigError, LostRankError, first_line
from bdlora_compile.runtime.adapters import AdapterSet
from bdlora_compile.served import ServedModel
from bdlora_compile.serving.batch import Batch
from bdlora_compile.serving.messages import Call, Message, Reader, Signal, Writer

_FRAME = 4096
"""Bytes of a broadcast; a longer message takes a second one."""

_BEAT_SECONDS = 2.0
"""How often rank 0 says that it is there, if it says nothing else: a dead peer is noticed by it."""

_GRACE = timedelta(seconds=5)
"""How long a rank on which a call failed waits to hear that it failed on rank 0 as well."""

_T = TypeVar("_T")


@contextmanager
def follow(model: Any, adapters: AdapterSet, timeout: timedelta = timedelta(seconds=60)) -> Iterator[bool]:
    """Inside the block rank 0 uses the model and its adapters as if there were no other ranks.

    Every rank enters it after `load` and ``compile``. The block begins at once on rank 0, with True. On the other
    ranks it begins when rank 0 has left its own, with False: until then they repeat the forwards and changes of
    adapters that rank 0 makes. With one rank there is nothing to follow, and the block begins with True::

        with bdlora_compile.follow(model, adapters) as drives:
            if drives:
                serve(model, adapters)

    On rank 0 any thread may call: calls are made one after the other, each forward with the adapters that its own
    thread (or task) chose by `AdapterSet.use`. A thread that chose none while another has a block open is refused.

    Args:
        model, adapters: from `bdlora_compile.load` or `attach`.
        timeout: after which a rank that takes no message, or a rank 0 that sends none, counts as lost.

    Raises:
        LostRankError: a rank died, hangs, or failed alone; then its message has that rank's error. On rank 0 in the
            call that noticed; on others from here.
    """
    if not isinstance(model, ServedModel) or adapters.deployment is not model.bdlora:
        raise ConfigError(
            "follow",
            found="a model and adapters that do not belong together",
            expected="both from one call of `bdlora_compile.load` or `attach`",
            remedy="pass what that call returned",
        )
    size = model.bdlora.plan.mesh.size
    if size == 1 or model.bdlora.is_lockstep:
        yield True
        return
    model.bdlora.agreement.exchange("follow", "")
    group = dist.new_group(timeout=timeout, backend="gloo")
    channel = _Channel(group, PrefixStore("bdlora/follow", dist.distributed_c10d._get_default_store()))
    fixed = {"model": model, "adapters": adapters}
    if dist.get_rank() == 0:
        with _Leading(channel, fixed) as leader:
            model.bdlora.leader = leader
            try:
                yield True
            finally:
                model.bdlora.leader = None
    else:
        _follow(channel, model, fixed)
        yield False
    dist.destroy_process_group(group)


class _Channel:
    """Messages from rank 0 to all others, and the last words of one of these, which cannot send any."""

    def __init__(self, group: ProcessGroup, store: Store) -> None:
        self._group = group
        self._store = store
        self._frame = torch.zeros(_FRAME, dtype=torch.uint8)

    @property
    def sources(self) -> str:
        """On the others: whose loss ends the messages. Gloo broadcasts along a tree, so some hand them on."""
        return "rank 0" if self._group.size() == 2 else "rank 0, or another rank that follows"

    def send(self, data: bytes) -> None:
        """On rank 0. Returns once the others have taken it, or the network has."""
        head = len(data).to_bytes(8, "little") + data[: _FRAME - 8]
        self._frame[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        dist.broadcast(self._frame, 0, self._group)
        if rest := data[_FRAME - 8 :]:
            dist.broadcast(torch.frombuffer(bytearray(rest), dtype=torch.uint8), 0, self._group)

    def receive(self, limit: timedelta | None = None) -> bytes:
        """On the others. Waits for ``limit``, or as long as the group does."""
        work = dist.broadcast(self._frame, 0, self._group, async_op=True)
        assert work is not None, "this rank is in the group"
        work.wait() if limit is None else work.wait(limit)
        data = self._frame.numpy().tobytes()
        length = int.from_bytes(data[:8], "little")
        missing = length - (_FRAME - 8)
        if missing <= 0:
            return data[8 : 8 + length]
        rest = torch.empty(missing, dtype=torch.uint8)
        dist.broadcast(rest, 0, self._group)
        return data[8:] + rest.numpy().tobytes()

    def leave_word(self, text: str) -> None:
        """On the others: why this one ends, for rank 0 to find when it misses it."""
        with suppress(RuntimeError):
            self._store.set("word", f"rank {dist.get_rank()}: {text}")

    def word(self) -> str | None:
        """On rank 0: what a rank that ended has left."""
        with suppress(RuntimeError):
            if self._store.check(["word"]):
                return bytes(self._store.get("word")).decode()
        return None


class _Leading:
    """Rank 0's side: every call is sent, then made here."""

    def __init__(self, channel: _Channel, fixed: Mapping[str, Any]) -> None:
        self._channel = channel
        self._writer = Writer(self, fixed)
        self._lock = threading.RLock()
        self._is_inside = False
        self._is_over = threading.Event()
        self._last_sent = time.monotonic()
        self.lost: LostRankError | None = None

    def run(self, method: Callable[..., _T], target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _T:
        """See `runtime.leading.Leader`."""
        with self._lock:
            if self._is_inside:
                # A part of a call that the others make: they come to it by themselves.
                return method(target, *args, **kwargs)
            if self._is_over.is_set():
                raise _dismissed()
            modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            self._send(Call(target, method.__name__, args, kwargs, *modes))
            self._is_inside = True
            try:
                return method(target, *args, **kwargs)
            except Exception as error:
                self._is_inside = False
                # If the others cannot be told, the error is theirs.
                self._send(Signal.FAILED, cause=error)
                raise
            finally:
                self._is_inside = False

    def __enter__(self) -> "_Leading":
        threading.Thread(target=self._beat, name="bdlora-beat", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_over.set()
            if self.lost is None:
                self._send(Signal.END)

    def _send(self, message: Message, cause: Exception | None = None) -> None:
        if self.lost is not None:
            raise self.lost
        data = self._writer.write(message)
        try:
            self._channel.send(data)
        except RuntimeError as error:
            self.lost = _lost(cause or error, word=self._channel.word())
            raise self.lost from (cause or error)
        self._last_sent = time.monotonic()

    def _beat(self) -> None:
        while not self._is_over.wait(_BEAT_SECONDS / 4):
            # A call that runs says it, too.
            if self._lock.acquire(blocking=False):
                try:
                    if time.monotonic() - self._last_sent > _BEAT_SECONDS and not self._is_over.is_set():
                        with suppress(LostRankError):
                            self._send(Signal.BEAT)
                finally:
                    self._lock.release()
            if self.lost is not None:
                return


def _follow(channel: _Channel, model: ServedModel, fixed: Mapping[str, Any]) -> None:
    """Repeat rank 0's calls until it ends."""
    makers: Mapping[str, Callable[..., Any]] = {
        # Numbers that rank 0 gave, apart from those that caches get here.
        "LocalCache": lambda batch, length, number: model.new_cache(batch, length, ("rank 0", number)),
        "Batch": lambda rows, length: Batch(model, rows, length),
    }
    reader = Reader(makers, fixed, model.bdlora.plan.device)
    failure: Exception | None = None
    while True:
        # A call holds its cache, which rank 0 may have no more.
        message: Message | None = None
        try:
            message = reader.read(channel.receive(_GRACE if failure else None))
        except RuntimeError as error:
            raise _failed_alone(failure, channel) if failure else _lost(error, channel.sources) from (failure or error)
        if (message is Signal.FAILED) != (failure is not None):
            raise _failed_alone(failure, channel) from failure
        failure = None
        if message is Signal.END:
            return
        if isinstance(message, Call):
            try:
                message.run()
            except Exception as error:
                failure = error


def _lost(error: Exception, who: str = "a rank that follows", word: str | None = None) -> LostRankError:
    found = str(error) if isinstance(error, BdloraError) else first_line(error)
    return LostRankError(
        who,
        found=f"an error that it had alone ({word})"
        if word
        else f"a broken connection, or no answer in time ({found})",
        expected="a process that takes part",
        remedy="look at the logs of all ranks for the first error; then start all of them again",
    )


def _failed_alone(failure: Exception | None, channel: _Channel) -> LostRankError:
    """The error of a rank that cannot go on: a call had another outcome here than on rank 0."""
    who = "rank 0" if failure is None else "this rank"
    what = "an error" if failure is None else f"{type(failure).__name__}: {first_line(failure)}"
    if failure is not None:
        channel.leave_word(what)
    return LostRankError(
        f"{who}, in a call that all ranks made",
        found=what,
        expected="the same outcome as on the other ranks",
        remedy="look at that rank's log; then start all ranks again",
    )


def _dismissed() -> ConfigError:
    return ConfigError(
        "call on rank 0",
        found="a call after the other ranks were let go",
        expected="calls inside the block of `bdlora_compile.follow`",
        remedy="make it inside, or end the program",
    )
