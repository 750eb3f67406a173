"""How tokens look in OpenAI's two kinds of answer (`answers.Form`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from bdlora_compile.serving.http.words import Words
from bdlora_compile.serving.requests import Token


class CompletionForm:
    """``/v1/completions``: plain text, and logprobs in lists.

    Args:
        words: names tokens in logprobs.
        has_logprobs: whether they were asked for.
    """

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, words: Words, has_logprobs: bool) -> None:
        self._words = words
        self._has_logprobs = has_logprobs
        self._offsets: dict[int, int] = {}

    def begin(self, index: int) -> None:
        """Nothing comes before the first token."""

    def part(self, index: int, token: Token) -> Mapping[str, Any]:
        """A chunk's choice."""
        return self._choice(index, [token], None)

    def end(self, index: int, reason: str) -> Mapping[str, Any]:
        """The last chunk's choice."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}

    def whole(self, index: int, tokens: Sequence[Token], reason: str) -> Mapping[str, Any]:
        """A whole answer's choice."""
        return self._choice(index, tokens, reason)

    def _choice(self, index: int, tokens: Sequence[Token], reason: str | None) -> Mapping[str, Any]:
        text = "".join(token.text for token in tokens)
        logprobs = self._logprobs(index, tokens) if self._has_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> Mapping[str, Any]:
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            own = self._words.token_text(token.id)
            lists["tokens"].append(own)
            lists["token_logprobs"].append(token.logprob)
            # The token that was drawn is always among them, as OpenAI has it.
            top = {self._words.token_text(one): logprob for one, logprob in token.top}
            lists["top_logprobs"].append({**top, own: token.logprob})
            lists["text_offset"].append(self._offsets.get(index, 0))
            self._offsets[index] = self._offsets.get(index, 0) + len(token.text)
        return lists


class ChatForm:
    """``/v1/chat/completions``: a message, and logprobs as a list of tokens.

    Args:
        words: names tokens in logprobs.
        has_logprobs: whether they were asked for.
    """

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, words: Words, has_logprobs: bool) -> None:
        self._words = words
        self._has_logprobs = has_logprobs

    def begin(self, index: int) -> Mapping[str, Any]:
        """Who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""}, [], None)

    def part(self, index: int, token: Token) -> Mapping[str, Any]:
        """A chunk's choice."""
        return self._chunk(index, {"content": token.text}, [token], None)

    def end(self, index: int, reason: str) -> Mapping[str, Any]:
        """The last chunk's choice."""
        return self._chunk(index, {}, [], reason)

    def whole(self, index: int, tokens: Sequence[Token], reason: str) -> Mapping[str, Any]:
        """A whole answer's choice."""
        text = "".join(token.text for token in tokens)
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def _chunk(
        self, index: int, delta: Mapping[str, Any], tokens: Sequence[Token], reason: str | None
    ) -> Mapping[str, Any]:
        logprobs = self._logprobs(tokens) if tokens else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[Token]) -> Mapping[str, Any] | None:
        if not self._has_logprobs:
            return None
        return {"content": [self._logprob(token) for token in tokens], "refusal": None}

    def _logprob(self, token: Token) -> Mapping[str, Any]:
        top = [self._named(one, logprob) for one, logprob in token.top]
        return {**self._named(token.id, token.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float | None) -> Mapping[str, Any]:
        text = self._words.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": self._words.token_bytes(text)}
