"""Attention behind transformers' attention interface: grouped kv heads stay grouped, rows see their own keys only.

Where a model's layers are plain causal the "mask" that they get is a row table (`runtime/attention.py`), made once a
forward. Layers with other masks (sliding windows, packed rows, a mask of the caller's own) get a whole mask
[B, 1, S, L] and PyTorch's scaled dot-product attention; `attention_text` says which layers of a graph do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from transformers import PretrainedConfig
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    padding_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bdlora_compile.errors import ConfigError
from bdlora_compile.ir import Captured, fake_tensor, layer_of, module_path, stage_nodes
from bdlora_compile.runtime.attention import attention as attend_rows
from bdlora_compile.runtime.attention import has_flash, row_table

NAME = "bdlora"
"""Name of the implementation, as ``config._attn_implementation`` has it."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query heads [B, H, S, d] over kv heads [B, G, L, d]; its mask is what `mask` made, or [B, 1, S, L].

    Returns:
        [B, S, H, d], and no weights.
    """
    if attention_mask is not None and attention_mask.ndim == 2:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend_rows(query, key, value, attention_mask, scale), None
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """A row table int32 [3, B + 1] where keys are masked by causality and left padding alone, else [B, 1, S, L].

    Args:
        attention_mask: bool [B, keys], zeros are padding; or int64 [B], tokens of left padding in each row, which
            `ServedModel` makes of it where a cache remembers them.
        q_offset: tokens that the rows hold already, int64 [B] if each row has its own number.
        batch_size, q_length, kv_length, kv_offset, mask_function, device, kwargs: as for transformers' own functions.
    """
    if mask_function is causal_mask_function and isinstance(kv_offset, int) and kv_offset == 0:
        return row_table(_starts(attention_mask, batch_size, device), q_offset, q_length, kv_length)
    if isinstance(q_offset, int):
        settings: dict[str, Any] = {**kwargs, "allow_is_causal_skip": False}
        return torch.as_tensor(
            sdpa_mask(
                batch_size=batch_size,
                q_length=q_length,
                kv_length=kv_length,
                q_offset=q_offset,
                kv_offset=kv_offset,
                mask_function=mask_function,
                attention_mask=attention_mask,
                device=device,
                **settings,
            )
        )
    return _mask_of_rows(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device)


def _starts(padding: Tensor | None, batch: int, device: torch.device | str) -> Tensor:
    """int64 [B], tokens of left padding in each row."""
    if padding is None:
        return torch.zeros(batch, dtype=torch.int64, device=device)
    return padding if padding.ndim == 1 else (padding.cumsum(-1) == 0).sum(-1)


def _mask_of_rows(
    batch: int,
    seq: int,
    length: int,
    offset: Tensor,
    kv_offset: int,
    mask_function: Callable[..., Tensor],
    padding: Tensor | None,
    device: torch.device | str,
) -> Tensor:
    """Any mask function over rows that each hold their own number of tokens: bool [B, 1, S, L]."""
    row = torch.arange(batch, device=device)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    query = (torch.arange(seq, device=device) + offset.reshape(-1, 1))[:, None, :, None]
    key = (torch.arange(length, device=device) + kv_offset)[None, None, None, :]
    sees = mask_function(row, head, query, key)
    if padding is not None and padding.ndim == 1:
        sees = sees & (key >= padding[:, None, None, None])
    elif padding is not None:
        sees = sees & padding_mask_function(prepare_padding_mask(padding, length, kv_offset))(row, head, query, key)
    return sees.expand(batch, -1, seq, length)


def register() -> None:
    """Make the implementation known to transformers under `NAME`."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)


def require_plain_scores(config: PretrainedConfig) -> None:
    """Refuse models whose attention is more than a softmax of scaled scores, which no path here computes.

    Raises:
        ConfigError: the model caps its scores.
    """
    if getattr(config, "attn_logit_softcapping", None):
        raise ConfigError(
            f"{type(config).__name__}.attn_logit_softcapping",
            found=str(config.attn_logit_softcapping),
            expected="None: attention scores as they are",
            remedy="serve another model; capped scores are not supported",
        )


def attention_text(captured: Captured, device: torch.device) -> str:
    """Which attention the layers of a graph have and why, for the report."""
    by_rows = [*stage_nodes(captured.graph, "bdlora::attention")]
    by_mask = [*stage_nodes(captured.graph, "scaled_dot_product_attention")]
    parts = []
    if by_rows:
        query = fake_tensor(by_rows[0].all_input_nodes[0])
        is_flash = has_flash(query.dtype, int(query.shape[3]), device)
        kernel = "FlashAttention-2" if is_flash else f"plain PyTorch for {query.dtype} on {device.type}"
        parts.append(f"each row's own keys in {_layers(captured, by_rows)} ({kernel})")
    if by_mask:
        parts.append(f"all keys under a whole mask in {_layers(captured, by_mask)}: their masks are not plain causal")
    return "; ".join(parts) or "none"


def _layers(captured: Captured, calls: Sequence[Node]) -> str:
    """How many layers calls belong to, those counted that a layer of the graph stands for."""
    found = {layer_of(module_path(node)) for node in calls}
    layers = captured.layers
    count = sum(layers.path(kept) in found for kept in layers.stands_in) if layers is not None else len(calls)
    return f"{count} layer{'s' if count != 1 else ''}"
