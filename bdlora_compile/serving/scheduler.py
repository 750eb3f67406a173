"""Which request runs in which row, and what each step does: the engine without its thread.

One step gives prompts of rows that join up to ``prefill_chunk`` tokens, and then every row that decodes one token. Rows
join and leave between steps.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from bdlora_compile.errors import AdapterError, BdloraError, LostRankError, QueueFullError, RequestError
from bdlora_compile.runtime.adapters import AdapterSet
from bdlora_compile.runtime.pending import Pending
from bdlora_compile.runtime.selection import NO_ADAPTER
from bdlora_compile.serving.batch import Batch
from bdlora_compile.serving.queues import FairQueues, Key, Readiness
from bdlora_compile.serving.requests import Finished, FinishReason, Token, Usage
from bdlora_compile.serving.rows import Row, Step, Waiting
from bdlora_compile.serving.sampling import Choice, RowSampling, choose_tokens
from bdlora_compile.serving.stats import Counts
from bdlora_compile.serving.stream import Stream
from bdlora_compile.serving.text import TextStream


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of a scheduler, see `Engine`."""

    max_rows: int
    max_length: int
    max_waiting: int
    max_waiting_per_adapter: int
    prefill_chunk: int


class Scheduler:
    """Rows, queues and steps. One thread calls it, but for `waiting.put`, which its caller must guard.

    Args:
        batch: the rows.
        adapters: the model's adapters.
        tokenizer: a ``tokenizers.Tokenizer``, or None.
        eos: tokens that end a completion unless it ignores them.
        limits: sizes.
        clock: seconds.
    """

    def __init__(
        self,
        batch: Batch,
        adapters: AdapterSet,
        tokenizer: Any | None,
        eos: Collection[int],
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batch = batch
        self._adapters = adapters
        self._tokenizer = tokenizer
        self._eos = frozenset(eos)
        self._limits = limits
        self._clock = clock
        self._rows: list[Row | None] = [None] * limits.max_rows
        # In the order in which they joined: the batch takes one prompt after the other.
        self._joining: deque[tuple[int, Row]] = deque()
        self._reading: dict[str, Pending[None]] = {}
        self._unread: Step | None = None
        # Of requests that have not ended; any thread adds.
        self._open: set[Stream] = set()
        self.waiting: FairQueues[Waiting] = FairQueues(limits.max_waiting, limits.max_waiting_per_adapter)
        self.counts = Counts()
        self.stepping_since: float | None = None

    @property
    def running(self) -> Mapping[Key, int]:
        """Requests that have a row, by adapter."""
        return Counter(row.stream.request.adapter for row in self._rows if row is not None)

    @property
    def cache_tokens(self) -> int:
        """Tokens that rows in use hold."""
        return sum(row.filled for row in self._rows if row is not None)

    @property
    def is_idle(self) -> bool:
        """Whether all requests have ended; one on its way from the queue to a row has not."""
        return not self._open

    def add(self, stream: Stream) -> None:
        """Queue a request.

        Raises:
            QueueFullError: see `FairQueues.put`.
        """
        self._open.add(stream)
        try:
            self.waiting.put(stream.request.adapter, Waiting(stream, self._clock()))
        except QueueFullError:
            self._open.discard(stream)
            raise

    def step(self) -> bool:
        """Do what there is to do now; False if that is nothing."""
        self._drop_cancelled()
        self._finish_unwanted_reading()
        self._admit()
        with self._timed():
            did = self._prefill()
            return self._decode() or did

    @contextmanager
    def _timed(self) -> Iterator[None]:
        self.stepping_since = self._clock()
        try:
            yield
        finally:
            self.counts.step_seconds += self._clock() - self.stepping_since
            self.stepping_since = None

    def end_all(self, reason: FinishReason, error: BdloraError | None = None, with_rows: bool = True) -> None:
        """End all requests that wait, and with ``with_rows`` those that run."""
        for waiting in self.waiting.remove(lambda _: True):
            self._refuse(waiting, reason, error)
        for index, row in enumerate(self._rows if with_rows else ()):
            if row is not None:
                self._end(index, row, reason, error=error)

    def end_waiting(self, adapter: str, error: BdloraError) -> None:
        """End requests of an adapter that have no row yet."""
        for waiting in self.waiting.remove(lambda one: one.stream.request.adapter == adapter):
            self._refuse(waiting, "error", error)

    def abandon(self, error: BdloraError) -> None:
        """End all streams and speak to no rank: from any thread, once a step has failed or hangs."""
        rows, self._rows = self._rows, [None] * len(self._rows)
        for waiting in self.waiting.remove(lambda _: True):
            self._refuse(waiting, "error", error)
        for row in rows:
            if row is not None:
                self._publish(row.stream, Finished("error", row.usage, error, None, row.waited_seconds))
        for stream in [*self._open]:
            # Failed on its way from the queue to a row.
            self._publish(stream, Finished("error", Usage(len(stream.request.prompt), 0), error))

    def check(self) -> None:
        """A decode step for nobody. What it writes into rows, their next steps overwrite."""
        with self._timed():
            lengths = [0 if row is None else row.next_place for row in self._rows]
            self._batch.decode([0] * len(lengths), lengths, [NO_ADAPTER] * len(lengths)).argmax().item()

    # --- joining and leaving ----------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        for waiting in self.waiting.remove(lambda one: one.stream.is_cancelled):
            self._refuse(waiting, "cancelled")
        for index, row in enumerate(self._rows):
            if row is not None and row.stream.is_cancelled:
                self._end(index, row, "cancelled")

    def _admit(self) -> None:
        for index, taken in enumerate(self._rows):
            if taken is not None:
                continue
            # Others may overtake an adapter that the pool has no room for once for each row.
            turn = self.waiting.next(self._readiness, patience=self._limits.max_rows)
            if turn is None:
                return
            self._join(index, self.waiting.pop(turn[0]))

    def _readiness(self, key: Key) -> Readiness:
        """Whether a request of an adapter can have a row now."""
        if key is None:
            return Readiness.READY
        try:
            if not self._adapters.has_room(key):
                return Readiness.NO_ROOM
            return Readiness.READY if self._is_read(key) else Readiness.COMING
        except LostRankError:
            raise
        except BdloraError as error:
            # It was unloaded, its files are not there any more, or pinned adapters have taken the pool.
            self.end_waiting(key, error)
            return Readiness.COMING

    def _is_read(self, key: str) -> bool:
        """Whether an adapter can be used without reading files; if not, they are read beside the steps."""
        if key not in self._reading:
            if not self._adapters.needs_reading(key):
                return True
            self._reading[key] = self._adapters.begin_prefetch(key)
        if not self._reading[key].is_staged:
            return False
        self._reading.pop(key).commit()
        return True

    def _finish_unwanted_reading(self) -> None:
        """What was read for requests that were cancelled meanwhile goes to host memory, or is forgotten."""
        for key in [key for key in self._reading if key not in self.waiting.lengths]:
            if self._reading[key].is_staged:
                with suppress(AdapterError):
                    self._reading.pop(key).commit()

    def _join(self, index: int, waiting: Waiting) -> None:
        stream, request = waiting.stream, waiting.stream.request
        try:
            hold = None if request.adapter is None else self._adapters.hold(request.adapter)
        except AdapterError as error:
            self._refuse(waiting, "error", error)
            return
        stream.begin(None if hold is None else hold.version)
        text = None if self._tokenizer is None else TextStream(self._tokenizer, request.sampling.stop)
        waited = self._clock() - waiting.since
        row = Row(stream, hold, RowSampling(request.sampling), text, waited, request.prompt[-1])
        self._rows[index] = row
        self._joining.append((index, row))
        self.waiting.charge(request.adapter, len(request.prompt))
        self.counts.prompt_tokens += len(request.prompt)

    def _end(
        self,
        index: int,
        row: Row,
        reason: FinishReason,
        stop: str | int | None = None,
        error: BdloraError | None = None,
    ) -> None:
        self._rows[index] = None
        self._joining = deque(entry for entry in self._joining if entry[1] is not row)
        if row.hold is not None:
            self._adapters.release(row.hold)
        self._publish(row.stream, Finished(reason, row.usage, error, stop, row.waited_seconds))

    def _refuse(self, waiting: Waiting, reason: FinishReason, error: BdloraError | None = None) -> None:
        self._publish(waiting.stream, Finished(reason, Usage(len(waiting.stream.request.prompt), 0), error))

    def _publish(self, stream: Stream, end: Finished) -> None:
        """The last event of a request."""
        self._open.discard(stream)
        self.counts.finished[end.reason] += 1
        stream.publish(end)

    # --- steps ------------------------------------------------------------------------------------------------------

    def _prefill(self) -> bool:
        """Parts of prompts, the row that joined first first, up to the step's number of tokens."""
        room = self._limits.prefill_chunk
        while self._joining and room:
            index, row = self._joining[0]
            part = row.prompt_left[:room]
            if part:
                self._batch.prefill(part, row.filled, row.slot, index)
                row.filled += len(part)
                room -= len(part)
                self.counts.prefill_steps += 1
            if not row.prompt_left:
                self._joining.popleft()
        return room < self._limits.prefill_chunk

    def _decode(self) -> bool:
        """Launch a step of every row whose prompt is in, and take its tokens.

        Where launches return before the device is done, those of the step before are taken instead: what the host does
        falls into the device's time. A row that ends by such a token has then run once more, for nobody.
        """
        start = self._clock()
        launched = step = self._launch()
        if self._batch.runs_behind:
            step, self._unread = self._unread, launched
        if step is not None:
            for index, choice in step.chosen.read().items():
                # A row may be another's by now; and another thread ends all streams when a step hangs.
                if self._rows[index] is step.rows[index]:
                    self._take(index, step.rows[index], choice)
            self.counts.last_step_seconds = self._clock() - start
        return launched is not None or step is not None

    def _launch(self) -> Step | None:
        rows = self._rows
        decoding = {
            index: row
            for index, row in enumerate(rows)
            if row is not None and not row.prompt_left and not self._is_full(row, row.generated + row.coming)
        }
        if not decoding:
            return None
        logits = self._batch.decode(
            [decoding[index].next_token if index in decoding else 0 for index in range(len(rows))],
            [row.next_place if row is not None else 0 for row in rows],
            [decoding[index].slot if index in decoding else NO_ADAPTER for index in range(len(rows))],
        )
        chosen = choose_tokens(logits, {index: row.sampling for index, row in decoding.items()})
        self._batch.keep(chosen.ids)
        for row in decoding.values():
            row.coming += 1
        self.counts.decode_steps += 1
        return Step(decoding, chosen)

    def _take(self, index: int, row: Row, choice: Choice) -> None:
        """Give a row its next token, and end it if that was the last."""
        row.coming -= 1
        if choice.id < 0:
            self._end(index, row, "error", error=_not_finite(row))
            return
        row.filled += 1
        row.generated += 1
        row.last = choice.id
        self.waiting.charge(row.stream.request.adapter, 1)
        self.counts.generated_tokens += 1
        end = self._end_of(row, choice.id)
        text, stop_text = "", None
        # A token that stops a text is no part of it, as a text that does.
        if row.text is not None and (end is None or end[0] != "stop"):
            text, stop_text = row.text.push(choice.id)
        if row.text is not None and end is not None and stop_text is None:
            rest, stop_text = row.text.finish()
            text += rest
        end = end if stop_text is None else ("stop", stop_text)
        row.stream.publish(Token(choice.id, text, choice.logprob, choice.top))
        if end is not None:
            self._end(index, row, *end)

    def _end_of(self, row: Row, token: int) -> tuple[FinishReason, str | int | None] | None:
        """(reason, what stopped it) if a row ends with this token, whatever its text."""
        sampling = row.stream.request.sampling
        if token in sampling.stop_token_ids:
            return "stop", token
        if token in self._eos and not sampling.ignore_eos:
            return "stop", None
        return ("length", None) if self._is_full(row, row.generated) else None

    def _is_full(self, row: Row, generated: int) -> bool:
        """Whether no token may follow when so many were generated."""
        request = row.stream.request
        return generated >= request.sampling.max_tokens or len(request.prompt) + generated >= self._limits.max_length


def _not_finite(row: Row) -> RequestError:
    return RequestError(
        f"logits of a request of {row.stream.request.adapter or 'the base model'}",
        found="a value that is not finite",
        expected="numbers",
        remedy="check the adapter and the dtype of the model; other requests go on",
    )
