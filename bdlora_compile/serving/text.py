"""The text of a completion as its tokens come, and the stop texts in it."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from bdlora_compile.errors import ConfigError


class TextStream:
    """Text that can be shown after each token. All of it together is the tokenizer's own decoding of all tokens.

    Text is held back while a character is incomplete, and while it may be the beginning of a stop text.

    Args:
        tokenizer: the ``tokenizers.Tokenizer`` of a fast tokenizer, see `fast_tokenizer_of`.
        stops: texts that end the completion.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream: DecodeStream | None = DecodeStream(skip_special_tokens=True)
        self._stops = stops
        self._ids: list[int] = []
        self._length = 0
        self._held = ""

    def push(self, token: int) -> tuple[str, str | None]:
        """(text that can be shown as of this token, the stop text that it completed); after a stop text, nothing."""
        self._ids.append(token)
        return self._add(self._next(token))

    def finish(self) -> tuple[str, str | None]:
        """The same for what was held back, when no token follows."""
        text, stop = self._add(self._whole()[self._length :])
        rest, self._held = self._held, ""
        return (text, stop) if stop is not None else (text + rest, None)

    def _next(self, token: int) -> str:
        if self._stream is not None:
            try:
                return self._stream.step(self._tokenizer, token) or ""
            except Exception:  # tokenizers has no class for it
                # A token changed the text of those before it, which a stream cannot take back: decode all from now on.
                self._stream = None
        whole = self._whole()
        return "" if whole.endswith("\N{REPLACEMENT CHARACTER}") else whole[self._length :]

    def _whole(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text

    def _add(self, new: str) -> tuple[str, str | None]:
        self._length += len(new)
        text = self._held + new
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self._held = ""
            return text[:at], stop
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        shown = len(text) - held
        self._held = text[shown:]
        return text[:shown], None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)


def fast_tokenizer_of(tokenizer: Any) -> Any:
    """The ``tokenizers.Tokenizer`` inside a tokenizer of transformers; its decoder is what streams text.

    Raises:
        ConfigError: it has none.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise ConfigError(
            "Engine(tokenizer=...)",
            found=f"a {type(tokenizer).__name__}, which cannot decode token by token",
            expected="a fast tokenizer of transformers",
            remedy="load it with `AutoTokenizer.from_pretrained`, or pass None and read token ids",
        )
    return fast
