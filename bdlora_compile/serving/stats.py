"""What an engine counts, and what it says about itself."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counts:
    """What happened since the start."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    decode_steps: int = 0
    prefill_steps: int = 0
    step_seconds: float = 0.0
    last_step_seconds: float = 0.0
    finished: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine holds and what it did; counts are since `Engine.start`.

    Attributes:
        running: requests that have a row, by adapter (None: the base model).
        waiting: requests that have none yet, by adapter.
        rows: rows of the cache.
        rows_in_use: of these, how many a request has.
        cache_tokens: tokens that the rows in use hold.
        prompt_tokens, generated_tokens: of all requests so far.
        decode_steps: forwards of one token for each row.
        prefill_steps: forwards of a part of a prompt.
        step_seconds: time in all steps.
        last_step_seconds: of the last decode step.
        finished: requests that ended, by reason.
        refused: requests that `Engine.submit` refused because a queue was full.
    """

    running: Mapping[str | None, int]
    waiting: Mapping[str | None, int]
    rows: int
    rows_in_use: int
    cache_tokens: int
    prompt_tokens: int
    generated_tokens: int
    decode_steps: int
    prefill_steps: int
    step_seconds: float
    last_step_seconds: float
    finished: Mapping[str, int]
    refused: int
