"""One token for each row from its logits, each row by its own parameters and its own random numbers.

A row's random numbers come from a generator of its own on the host, one number a token, and the token is the one whose
share of the cumulated probabilities, in the order of the vocabulary, holds that number. So a seed gives the same tokens
in any batch and on any device, as far as the logits are the same: those of a row differ by rounding between batches of
different size, which changes a token only where the number falls within that rounding of a boundary.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdlora_compile.serving.requests import SamplingParams


class RowSampling:
    """A request's parameters, and where it is in its random numbers."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._random = random.Random(params.seed)

    def next_number(self) -> float:
        """Uniform in [0, 1)."""
        return self._random.random()


@dataclass(frozen=True, slots=True)
class Choice:
    """The token of a row.

    Attributes:
        id: the token; -1 if the row's logits are not finite.
        logprob: of it, None if not asked for.
        top: (id, logprob) of the likeliest tokens.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose_tokens(logits: Tensor, rows: Mapping[int, RowSampling]) -> dict[int, Choice]:
    """The next token of each row.

    Args:
        logits: [rows, vocabulary], any floating dtype.
        rows: the rows that are asked for.
    """
    best, ids = logits.max(dim=-1)
    drawn = [row for row, sampling in rows.items() if not sampling.params.is_greedy]
    if drawn:
        ids[drawn] = _draw(logits[drawn], [rows[row] for row in drawn])
    # Both in one copy: each copy to the host waits for the device.
    chosen, finite = torch.stack([ids, best.isfinite().to(ids.dtype)]).tolist()
    choices = {row: Choice(chosen[row] if finite[row] else -1) for row in rows}
    asked = [row for row, sampling in rows.items() if sampling.params.logprobs is not None and finite[row]]
    return choices | (_with_logprobs(logits, ids, rows, asked) if asked else {})


def _draw(logits: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """Ids [rows] drawn from each row's distribution, in float64."""
    params = [row.params for row in rows]
    numbers = [row.next_number() for row in rows]
    settings = torch.tensor(
        [numbers, [one.temperature for one in params], [one.top_p for one in params]], dtype=torch.float64
    ).to(logits.device)
    number, temperature, top_p = settings[:, :, None]
    # The best of each row is 0: a temperature near 0 divides to minus infinity, never to NaN.
    scaled = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperature
    narrowed = [index for index, one in enumerate(params) if one.top_k or one.top_p < 1]
    if narrowed:
        top_k = torch.tensor([[params[index].top_k or logits.shape[1]] for index in narrowed], device=logits.device)
        dropped = ~_kept(scaled[narrowed], top_k, top_p[narrowed])
        scaled[narrowed] = scaled[narrowed].masked_fill(dropped, -math.inf)
    shares = scaled.softmax(-1).cumsum(-1)
    # A token without probability has no share: its cumulated value is that of the one before it.
    found = torch.searchsorted(shares, number * shares[:, -1:], right=True)
    return found[:, 0].clamp_max(logits.shape[1] - 1)


def _kept(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Which tokens may be drawn: the ``top_k`` likeliest, and of these the first whose probabilities reach ``top_p``.

    Args:
        scaled: [rows, vocabulary], logits over temperature.
        top_k: int64 [rows, 1].
        top_p: [rows, 1].
    """
    values, order = scaled.sort(dim=-1, descending=True, stable=True)
    among = torch.arange(values.shape[1], device=values.device) < top_k
    probabilities = values.masked_fill(~among, -math.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = among & ((before < top_p) | (top_p >= 1))
    return torch.zeros_like(kept).scatter_(1, order, kept)


def _with_logprobs(
    logits: Tensor, ids: Tensor, rows: Mapping[int, RowSampling], asked: Sequence[int]
) -> dict[int, Choice]:
    """Choices of the rows that asked for logprobs."""
    logprobs = logits[asked].float().log_softmax(-1)
    own = logprobs.gather(1, ids[asked][:, None])[:, 0].tolist()
    counts = [rows[row].params.logprobs or 0 for row in asked]
    values, places = (part.tolist() for part in logprobs.topk(min(max(counts), logprobs.shape[1]), dim=-1))
    return {
        row: Choice(int(ids[row]), own[index], tuple(zip(places[index][:count], values[index][:count], strict=True)))
        for index, (row, count) in enumerate(zip(asked, counts, strict=True))
    }
