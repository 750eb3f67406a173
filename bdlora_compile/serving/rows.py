"""A request on its way: it waits, then it has a row of the cache."""

from collections.abc import Sequence
from dataclasses import dataclass

from bdlora_compile.runtime.adapters import Hold
from bdlora_compile.runtime.selection import NO_ADAPTER
from bdlora_compile.serving.requests import Usage
from bdlora_compile.serving.sampling import RowSampling
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
        filled: tokens that the row of the cache holds; it decodes from the last token of the prompt on.
        last: the token that the next decode step reads.
        generated: tokens so far.
        waited_seconds: before it had the row.
    """

    stream: Stream
    hold: Hold | None
    sampling: RowSampling
    text: TextStream | None
    waited_seconds: float
    last: int
    filled: int = 0
    generated: int = 0

    @property
    def slot(self) -> int:
        """Of its adapter, -1 for none."""
        return NO_ADAPTER if self.hold is None else self.hold.slot

    @property
    def prompt_left(self) -> Sequence[int]:
        """What of the prompt is to be prefilled: all but its last token, which the first decode step reads."""
        return self.stream.request.prompt[self.filled : -1]

    @property
    def usage(self) -> Usage:
        """Its tokens."""
        return Usage(len(self.stream.request.prompt), self.generated)
