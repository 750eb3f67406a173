"""The device's side of the engine: rows of one cache, and the two forwards that fill them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bdlora_compile.model import make_cache
from bdlora_compile.runtime.leading import Leader, led
from bdlora_compile.runtime.selection import NO_ADAPTER, Selection
from bdlora_compile.served import ServedModel

AS_CHOSEN = -1
"""In place of a token: the one that was chosen by the row's last step, which the host may not have read yet."""

_LENGTH_STEP = 64
"""Cache lengths are rounded up to a multiple of this."""

_PART_STEP = 64
"""On GPUs parts of prompts are padded to a multiple of this."""


class Batch:
    """Rows that requests fill and leave; every rank has one, and makes the same calls (`runtime.leading`).

    A prompt goes through a cache of one row, chunk by chunk, and is copied from there: the rows that decode are not
    part of its forward. Its last token is left to the first decode step, which so gives the first new token; logits of
    a prompt are never needed. There are two graphs, [1, 2 or more tokens] and [2 or more rows, 1 token], whatever the
    number of requests.

    What decides, decides on rank 0: lengths and slots come with every call. So do tokens, unless they go from device to
    device (`AS_CHOSEN`). Other ranks need no logits.

    Args:
        model: from `bdlora_compile.load` or `attach`, compiled.
        num_rows: rows, at least 1.
        length: tokens that a row can hold.
    """

    def __init__(self, model: ServedModel, num_rows: int, length: int) -> None:
        self._model = model
        self.num_rows = num_rows
        # One row more of one token would be the other kind of graph.
        padded = max(num_rows, 2)
        self._cache = make_cache(model, padded, _round_up(length))
        device = self._cache.lengths.device
        # On GPUs forwards of a size that was seen before are one launch: parts of prompts come in few sizes there.
        self._part_step = _part_step(device)
        self._prompt = make_cache(model, 1, _round_up(length + max(self._part_step, 2)))
        self._tokens = torch.zeros(padded, 1, dtype=torch.int64, device=device)
        self._chosen = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._selection = Selection(torch.full((padded,), NO_ADAPTER, dtype=torch.int32))

    @property
    def leader(self) -> Leader | None:
        """See `runtime.leading`."""
        return self._model.leader

    @property
    def arguments(self) -> tuple[int, int]:
        """What another rank makes its own from: rows and length."""
        return self.num_rows, self._cache.length

    @property
    def runs_behind(self) -> bool:
        """Whether calls return before the device is done."""
        return self._tokens.is_cuda

    def keep(self, ids: Tensor) -> None:
        """On rank 0: remember what was chosen for each row (int64 [rows], on the device), see `AS_CHOSEN`."""
        self._chosen = ids

    @led
    @torch.no_grad()
    def prefill(self, tokens: Sequence[int], start: int, slot: int, row: int) -> None:
        """Run a part of a prompt and put its keys and values into a row.

        Args:
            tokens: the part.
            start: tokens of the prompt before it; they went through the calls before this one.
            slot: of the adapter, -1 for none.
            row: where it goes. Its length is not changed: `decode` is told.
        """
        stop = start + len(tokens)
        # Tokens that nobody sees: a sequence of one would be another graph. The next part overwrites them.
        size = max(_round_up(len(tokens), self._part_step), 2)
        padded = [*tokens, *[0] * (size - len(tokens))]
        ids = torch.tensor([padded]).to(self._tokens.device, non_blocking=True)
        positions = torch.arange(start, start + len(padded), device=ids.device)[None]
        self._prompt.set_lengths([start])
        self._run(
            Selection(torch.tensor(slot, dtype=torch.int32)),
            input_ids=ids,
            position_ids=positions,
            past_key_values=self._prompt,
            logits_to_keep=1,
        )
        self._cache.copy_tokens(row, self._prompt, 0, start, stop)

    @led
    @torch.no_grad()
    def decode(self, tokens: Sequence[int], lengths: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Logits [rows, vocabulary] after one more token in every row.

        Args:
            tokens: of each row, or `AS_CHOSEN`; anything for a row that nobody has.
            lengths: tokens that each row holds before; the new one is written behind them. Rows that nobody has get one
                too, which the next call or `prefill` overwrites.
            slots: of each row's adapter, -1 for none.
        """
        missing = self._cache.batch - self.num_rows
        self._cache.set_lengths([*lengths, *[0] * missing])
        self._tokens[: self.num_rows, 0] = self._given_or_chosen(tokens)
        chosen = torch.tensor([*slots, *[NO_ADAPTER] * missing], dtype=torch.int32)
        if not torch.equal(chosen, self._selection.slots):
            self._selection = Selection(chosen)
        logits: Tensor = self._run(
            self._selection,
            input_ids=self._tokens,
            # The cache adds to its lengths while the model runs.
            position_ids=self._cache.lengths[:, None].clone(),
            past_key_values=self._cache,
        ).logits
        return logits[: self.num_rows, -1]

    def _given_or_chosen(self, tokens: Sequence[int]) -> Tensor:
        given = torch.tensor(tokens).to(self._tokens.device, non_blocking=True)
        if AS_CHOSEN not in tokens:
            return given
        mesh = self._model.bdlora.plan.mesh
        if mesh.size > 1 and not self._model.bdlora.is_lockstep:
            collectives = torch.ops._c10d_functional
            self._chosen = collectives.wait_tensor(collectives.broadcast(self._chosen, 0, mesh.group))
        return torch.where(given == AS_CHOSEN, self._chosen, given)

    def _run(self, selection: Selection, **inputs: object) -> Any:
        with self._model.bdlora.chosen(selection):
            return self._model(use_cache=True, **inputs)


def _part_step(device: torch.device) -> int:
    return _PART_STEP if device.type == "cuda" else 1


def _round_up(length: int, step: int = _LENGTH_STEP) -> int:
    return -(-length // step) * step
