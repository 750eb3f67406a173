"""Attention behind transformers' attention interface: grouped kv heads stay grouped, masks are made once a forward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
    """Scaled dot-product attention with query heads [B, H, S, d] over kv heads [B, H_kv, L, d], mask [B, 1, S, L]."""
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def mask(*args: Any, **kwargs: Any) -> Tensor:
    """The mask that transformers makes for SDPA, never left out: without one causality would depend on shapes."""
    kwargs["allow_is_causal_skip"] = False
    made = sdpa_mask(*args, **kwargs)
    return torch.as_tensor(made)


def register() -> None:
    """Make the implementation known to transformers under `NAME`."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
