"""What goes into the engine and what comes out of it."""

import math
from dataclasses import dataclass
from typing import Literal

from bdlora_compile.errors import BdloraError, RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""How a request ended: at a stop condition, at its number of tokens, by `Stream.cancel`, or by an error."""

MAX_LOGPROBS = 20
"""Alternatives that can be asked for at each position."""


def _check(name: str, value: object, is_good: bool, expected: str) -> None:
    if not is_good:
        raise RequestError(name, found=f"{value!r:.100}", expected=expected, remedy=f"correct {name} in the request")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, in vLLM's names. Several completions of a prompt are several requests with own seeds.

    Attributes:
        max_tokens: tokens to generate at most; the end-of-sequence token counts.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: smallest set of likeliest tokens whose probabilities sum to it; 1 takes all.
        top_k: number of likeliest tokens that are drawn from; 0 takes all.
        stop: texts that end the completion; they are not part of it.
        stop_token_ids: tokens that end the completion, beside those of the model's generation config.
        seed: the same seed gives the same tokens, whatever else runs; None draws one.
        logprobs: None for none; K for the logarithm of the probability of each token and of the K likeliest ones.
            They are those of the model's distribution, before temperature, top_p and top_k.
        ignore_eos: go on after an end-of-sequence token.

    Raises:
        RequestError: a value is out of range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        is_temperature = math.isfinite(self.temperature) and self.temperature >= 0
        _check("temperature", self.temperature, is_temperature, "a finite number, at least 0")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1")
        _check("top_k", self.top_k, self.top_k >= 0, "at least 0")
        _check("stop", self.stop, all(self.stop), "texts of at least one character")
        is_seed = self.seed is None or -(2**63) <= self.seed < 2**63
        _check("seed", self.seed, is_seed, "an integer of 64 bits")
        is_count = self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS
        _check("logprobs", self.logprobs, is_count, f"0 to {MAX_LOGPROBS}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0 or self.top_k == 1


@dataclass(frozen=True, slots=True)
class Request:
    """One completion of one prompt.

    Attributes:
        prompt: token ids, at least one.
        adapter: name of the adapter, None for the base model.
        sampling: how tokens are chosen.
    """

    prompt: tuple[int, ...]
    adapter: str | None = None
    sampling: SamplingParams = SamplingParams()


@dataclass(frozen=True, slots=True)
class Token:
    """A token was generated.

    Attributes:
        id: its id.
        text: the text that can be shown as of this token; empty while a character is incomplete, or while the text
            may turn out to be the beginning of a stop text. The texts of all tokens are the completion.
        logprob: natural logarithm of its probability, None if `SamplingParams.logprobs` is None.
        top: (id, logprob) of the likeliest tokens at its place, the likeliest first.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of every request.

    Attributes:
        reason: why it ended.
        error: what went wrong, where the reason is "error".
        usage: its tokens.
        stop: the stop text or the token id that ended it; None for an end-of-sequence token of the model.
        waited_seconds: from `Engine.submit` until it had a row; None if it never had one.
    """

    reason: FinishReason
    usage: Usage
    error: BdloraError | None = None
    stop: str | int | None = None
    waited_seconds: float | None = None


Event = Token | Finished


@dataclass(frozen=True, slots=True)
class Completion:
    """A request from end to end, see `Stream.result`."""

    tokens: tuple[Token, ...]
    finished: Finished

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of all tokens."""
        return tuple(token.id for token in self.tokens)

    @property
    def text(self) -> str:
        """The whole completion."""
        return "".join(token.text for token in self.tokens)
