"""One token for each row from its logits, each row by its own parameters and its own random numbers.

A row's random numbers come from a generator of its own on the host, one number a token, and the token is the one whose
share of the cumulated probabilities, in the order of the vocabulary, holds that number. So a seed gives the same tokens
in any batch and on any device, as far as the logits are the same: those of a row differ by rounding between batches of
different size, which changes a token only where the number falls within that rounding of a boundary.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


class Chosen:
    """Tokens that the device chooses, on their way to the host: nobody waits before `read`.

    Attributes:
        ids: int64 [rows of the logits], on their device; those of rows that were not asked for are of no use.
    """

    def __init__(self, logits: Tensor, ids: Tensor, rows: Mapping[int, RowSampling]) -> None:
        self.ids = ids
        self._rows = list(rows)
        finite = logits.amax(dim=-1).isfinite()
        # Both in one copy: each copy to the host waits for the device.
        self._chosen = _Coming(torch.stack([ids, finite.to(ids.dtype)]))
        self._counts = {row: sampling.params.logprobs for row, sampling in rows.items()}
        asked = [row for row, count in self._counts.items() if count is not None]
        self._logprobs = _Logprobs(logits, ids, asked, max(self._counts[row] or 0 for row in asked)) if asked else None

    def read(self) -> dict[int, Choice]:
        """The token of each row that was asked for; waits for the device."""
        ids, finite = self._chosen.tolist()
        choices = {row: Choice(ids[row] if finite[row] else -1) for row in self._rows}
        if self._logprobs is not None:
            for row, own, top in self._logprobs.read():
                if finite[row]:
                    choices[row] = Choice(ids[row], own, top[: self._counts[row]])
        return choices


def choose_tokens(logits: Tensor, rows: Mapping[int, RowSampling]) -> Chosen:
    """The next token of each row.

    Args:
        logits: [rows, vocabulary], any floating dtype.
        rows: the rows that are asked for.
    """
    ids = logits.argmax(dim=-1)
    drawn = [row for row, sampling in rows.items() if not sampling.params.is_greedy]
    if drawn:
        places = _on(logits, torch.tensor(drawn))
        ids[places] = _draw(logits[places], [rows[row] for row in drawn])
    return Chosen(logits, ids, rows)


class _Coming:
    """A copy of a tensor on its way to the host."""

    def __init__(self, value: Tensor) -> None:
        self._host = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        self._host.copy_(value, non_blocking=True)
        self._event = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None

    def tolist(self) -> Any:
        """Its numbers, once they are here."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


def _on(logits: Tensor, value: Tensor) -> Tensor:
    """A small tensor of the host beside the logits; the host does not wait for the steps before."""
    return value.to(logits.device, non_blocking=True)


def _draw(logits: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """Ids [rows] drawn from each row's distribution, in float64."""
    params = [row.params for row in rows]
    numbers = [row.next_number() for row in rows]
    lists = [numbers, [one.temperature for one in params], [one.top_p for one in params]]
    settings = _on(logits, torch.tensor(lists, dtype=torch.float64))
    number, temperature, top_p = settings[:, :, None]
    # The best of each row is 0: a temperature near 0 divides to minus infinity, never to NaN.
    scaled = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperature
    narrowed = [index for index, one in enumerate(params) if one.top_k or one.top_p < 1]
    if narrowed:
        places = _on(logits, torch.tensor(narrowed))
        size = logits.shape[1]
        top_k = _on(logits, torch.tensor([[min(params[index].top_k or size, size)] for index in narrowed]))
        dropped = ~_kept(scaled[places], top_k, top_p[places])
        scaled[places] = scaled[places].masked_fill(dropped, -math.inf)
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


class _Logprobs:
    """Logarithms of probabilities of some rows, on their way to the host.

    Args:
        logits: [rows, vocabulary].
        ids: int64 [rows], tokens that were chosen.
        rows: those that asked.
        count: likeliest tokens of each.
    """

    def __init__(self, logits: Tensor, ids: Tensor, rows: Sequence[int], count: int) -> None:
        self._rows = rows
        places = _on(logits, torch.tensor(rows))
        logprobs = logits[places].float().log_softmax(-1)
        self._own = _Coming(logprobs.gather(1, ids[places][:, None])[:, 0])
        values, top = logprobs.topk(min(count, logprobs.shape[1]), dim=-1)
        self._values, self._top = _Coming(values), _Coming(top)

    def read(self) -> Iterator[tuple[int, float, tuple[tuple[int, float], ...]]]:
        """(row, logprob of its token, (id, logprob) of the likeliest tokens)."""
        for row, own, values, top in zip(
            self._rows, self._own.tolist(), self._values.tolist(), self._top.tolist(), strict=True
        ):
            yield row, own, tuple(zip(top, values, strict=True))
