"""A request on its way: it waits, then it has a row of the cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bdlora_compile.runtime.adapters import Hold
from bdlora_compile.runtime.selection import NO_ADAPTER
from bdlora_compile.serving.batch import AS_CHOSEN
from bdlora_compile.serving.requests import Usage
from bdlora_compile.serving.sampling import Chosen, RowSampling
from bdlora_compile.serving.stream import Stream
from bdlora_compile.serving.text import TextStream


@dataclass(slots=True, eq=False)
class Waiting:
    """A request without a row; ``since`` by the scheduler's clock."""

    stream: Stream
    since: float


@dataclass(slots=True, eq=False)
class Row:
    """A request with a row.

    Attributes:
        hold: its adapter's contents, None for the base model.
        text: None without a tokenizer.
        waited_seconds: before it had the row.
        last: the last token that is known.
        filled: tokens before that one, which the row of the cache holds; it decodes from the prompt's last token on.
        generated: tokens so far.
        coming: steps that were launched and whose tokens were not read yet: 0 or 1.
    """

    stream: Stream
    hold: Hold | None
    sampling: RowSampling
    text: TextStream | None
    waited_seconds: float
    last: int
    filled: int = 0
    generated: int = 0
    coming: int = 0

    @property
    def slot(self) -> int:
        """Of its adapter, -1 for none."""
        return NO_ADAPTER if self.hold is None else self.hold.slot

    @property
    def prompt_left(self) -> Sequence[int]:
        """What of the prompt is to be prefilled: all but its last token, which the first decode step reads."""
        return self.stream.request.prompt[self.filled : -1]

    @property
    def next_token(self) -> int:
        """What its next decode step reads."""
        return AS_CHOSEN if self.coming else self.last

    @property
    def next_place(self) -> int:
        """Where its next decode step writes."""
        return self.filled + self.coming

    @property
    def usage(self) -> Usage:
        """Its tokens."""
        return Usage(len(self.stream.request.prompt), self.generated)


@dataclass(frozen=True, slots=True)
class Step:
    """A decode step that was launched: the rows that it gives a token, and these tokens."""

    rows: Mapping[int, Row]
    chosen: Chosen
