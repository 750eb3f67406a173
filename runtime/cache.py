"""A key/value cache that holds this rank's heads only, for transformers' ``generate`` and for loops of one's own."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from bdlora_compile.errors import ConfigError, HollowError
from bdlora_compile.runtime.cache_memory import CacheMemory, Size
from bdlora_compile.runtime.leading import Leader, led


@torch.library.custom_op("bdlora::cache_update", mutates_args=("store",))
def cache_update(store: Tensor, k: Tensor, v: Tensor, lengths: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Append k and v to a layer of the cache and return its keys and values; the compiler gives it its meaning.

    In the graph that Dynamo captures k, v and the results have all kv heads, while ``store`` has this rank's;
    partitioning replaces the operator by writes into this rank's heads. It has no other implementation.

    Args:
        store: [layers, 2, batch, local kv heads, length, head_dim], written in place; 0 are keys, 1 values.
        k, v: [batch, kv heads, seq, head_dim].
        lengths: int64 [batch], tokens that each row holds already.
        layer: index into ``store``.
    """
    raise HollowError(
        "bdlora_compile cache",
        found="a forward that was not compiled by the bdlora backend",
        expected="a model compiled with `model.compile(backend='bdlora')`: the cache holds this rank's heads only",
        remedy="compile the model, or use transformers' own cache with the plain model",
    )


@cache_update.register_fake
def _(store: Tensor, k: Tensor, v: Tensor, lengths: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    batch, heads, _, head_dim = k.shape
    length = store.shape[4]
    return k.new_empty(batch, heads, length, head_dim), v.new_empty(batch, heads, length, v.shape[3])


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a cache of a model must look like on one rank.

    Attributes:
        num_layers: decoder layers.
        local_heads: kv heads that a rank holds.
        head_dim: size of a head.
        num_hosted: ranks that this process hosts (1 outside the lock-step interpreter).
    """

    num_layers: int
    local_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    num_hosted: int = 1


class LocalCacheLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped for mypy
    """One layer's view of the cache: keys and values [batch, local kv heads, length, head_dim]."""

    # Not what `generate` means by it: it would make whole masks before each forward.
    is_compileable = False
    is_sliding = False

    def __init__(self, store: Tensor, lengths: Tensor, index: int) -> None:
        super().__init__()
        self.store = store
        self.lengths = lengths
        self.index = index
        self.is_initialized = True

    # The mixin sets both to None; here they are always the store's.
    @property
    def keys(self) -> Tensor:
        """[batch, local kv heads, length, head_dim]."""
        return self.store[self.index, 0]

    @keys.setter
    def keys(self, value: object) -> None: ...

    @property
    def values(self) -> Tensor:
        """[batch, local kv heads, length, head_dim]."""
        return self.store[self.index, 1]

    @values.setter
    def values(self, value: object) -> None: ...

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the cache is allocated when it is made."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append, and return all keys and values; see `cache_update`."""
        keys, values = cache_update(self.store, key_states, value_states, self.lengths, self.index)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys that a mask covers."""
        return self.store.shape[4], 0

    def get_seq_length(self) -> Tensor:
        """Tokens that the longest row holds, int64 []."""
        return self.lengths.max()

    def get_max_length(self) -> int:
        """Tokens that a row can hold."""
        return self.store.shape[4]

    def reset(self) -> None:
        """Nothing: the cache resets all layers at once."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Nothing: the cache reorders all layers at once."""


class LocalCache(Cache):  # type: ignore[misc]  # transformers is untyped for mypy
    """A cache of fixed length with this rank's kv heads, allocated at once; each row writes at its own position.

    ``generate`` of a loaded model makes one by itself; a loop of one's own gets one from `bdlora_compile.make_cache`.

    Args:
        shape: what the model needs on a rank.
        batch: rows.
        length: tokens that a row can hold.
        memory: what it lies in; its own by default.

    Attributes:
        store: [layers, 2, batch, local kv heads, length, head_dim]. One tensor for all layers, so that a compiled
            graph guards one input and has one set of symbolic sizes, however many layers there are. A head's tokens
            lie together: to attention each head of each row is a sequence of its own.
        lengths: int64 [batch], tokens that each row holds, left padding included.
        starts: int64 [batch], tokens of left padding in each row: they are never seen.
        number: of its memory, the same on all ranks; see `runtime.cache_memory`.
        leader: on rank 0, once other ranks that follow have one like it (see `runtime.leading`).
    """

    def __init__(self, shape: CacheShape, batch: int, length: int, memory: CacheMemory | None = None) -> None:
        memory = memory or new_memory(shape, (batch, length), None)
        self.number = memory.number
        self.store, self.lengths, self.starts = memory.store, memory.lengths, memory.starts
        super().__init__(layers=[LocalCacheLayer(self.store, self.lengths, i) for i in range(shape.num_layers)])
        self.shape = shape
        self.batch = batch
        self.length = length
        # Counted on the host as well: asking `lengths` before each forward would wait for the GPU.
        self._used = [0] * batch
        self.leader: Leader | None = None
        _mark_sizes_dynamic(self)

    @property
    def arguments(self) -> tuple[int, int, Hashable]:
        """What another rank makes its own from: batch, length and number."""
        return self.batch, self.length, self.number

    @property
    def is_used(self) -> bool:
        """Whether some row holds tokens."""
        return any(self._used)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append to one layer; the rows' lengths grow once all layers have been written."""
        keys, values = cache_update(self.store, key_states, value_states, self.lengths, layer_idx)
        if layer_idx == len(self.layers) - 1:
            self.lengths.add_(key_states.shape[2])
        return keys, values

    def get_query_offset(self, layer_idx: int = 0) -> Tensor:
        """Where the new tokens of each row begin, int64 [batch]; transformers makes masks by it."""
        return self.lengths

    def pad_left(self, mask: Tensor, seq: int) -> None:
        """Take each row's left padding from the mask that comes with ``seq`` new tokens.

        A step of one token asks nothing of the GPU: the rows' padding is known since the prompt.

        Args:
            mask: [batch, tokens], of all tokens that the rows will then hold; zeros are padding.
            seq: new tokens of a row.

        Raises:
            ConfigError: the mask has another size, or zeros that are not at the left.
        """
        used = max(self._used)
        expected = (self.batch, used + seq)
        if tuple(mask.shape) != expected:
            raise ConfigError(
                "attention_mask",
                found=f"{list(mask.shape)}",
                expected=f"{list(expected)}: the {used} tokens of the cache and {seq} new ones",
                remedy="pass the mask of all tokens so far, or none",
            )
        if seq == 1 and used:
            return
        starts = left_padding(mask, allows_right=False)
        self.starts.copy_(starts)

    def require_room(self, shape: CacheShape, batch: int, seq: int) -> None:
        """Check that a forward of [batch, seq] tokens of a model fits, before it writes anything.

        Raises:
            ConfigError: the cache was made for another model or batch, or its rows would grow past its length.
        """
        if shape != self.shape:
            raise _misfit(f"the cache of another model ({self.shape})", str(shape))
        if batch != self.batch:
            raise _misfit(f"{self.batch} rows", f"the {batch} rows of the batch")
        used = max(self._used)
        if used + seq > self.length:
            raise _misfit(
                f"{used} tokens of {self.length} in use",
                f"room for {seq} more, a length of {used + seq} tokens",
            )

    def advance(self, seq: int) -> None:
        """Count the tokens that a forward has written to every row."""
        self._used = [used + seq for used in self._used]

    @led
    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Say how many tokens each row holds: those behind them are forgotten, padding too, and written next."""
        if len(lengths) != self.batch or not all(0 <= length <= self.length for length in lengths):
            raise _misfit(f"{self.batch} rows of up to {self.length} tokens", f"rows of {list(lengths)} tokens")
        self._used = list(lengths)
        self.write_lengths()
        torch.minimum(self.starts, self.lengths, out=self.starts)

    def write_lengths(self) -> None:
        """Tell the device what the host has counted: a forward that failed may have counted there already."""
        # The host does not wait for the forwards before.
        self.lengths.copy_(torch.tensor(self._used), non_blocking=True)

    @led
    def copy_tokens(self, row: int, source: "LocalCache", source_row: int, start: int, stop: int) -> None:
        """Copy keys and values of the tokens ``start`` to ``stop`` from a row of another cache of the model.

        Neither cache's lengths change, see `set_lengths`.
        """
        for target, tensor in zip(hosted(self.store), hosted(source.store), strict=True):
            target[:, :, row, :, start:stop] = tensor[:, :, source_row, :, start:stop]

    @led
    def reset(self) -> None:
        """Forget all rows."""
        self._used = [0] * self.batch
        for tensor in hosted(self.store):
            tensor.zero_()
        self.lengths.zero_()
        self.starts.zero_()

    @led
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        for tensor in hosted(self.store):
            for layer in tensor:
                # Layer by layer: a copy of one layer is all the memory that this takes.
                layer.copy_(layer.index_select(1, beam_idx.to(tensor.device)))
        for rows in (self.lengths, self.starts):
            rows.copy_(rows.index_select(0, beam_idx.to(rows.device)))
        if len(set(self._used)) > 1:
            self._used = [self._used[row] for row in beam_idx.tolist()]


def left_padding(mask: Tensor, *, allows_right: bool) -> Tensor:
    """int64 [batch], the zeros that each row of a padding mask [batch, tokens] begins with; waits for the GPU.

    Args:
        mask: zeros are padding.
        allows_right: whether a row may end with zeros, too: causal rows do not see what follows them.

    Raises:
        ConfigError: a row has zeros elsewhere.
    """
    is_token = mask != 0
    starts = (is_token.cumsum(1) == 0).sum(1)
    following = is_token.flip(1).cumsum(1).flip(1) if allows_right else torch.ones_like(mask)
    number = torch.arange(mask.shape[1], device=mask.device)
    holes = ~is_token & (number >= starts[:, None]) & (following != 0)
    if bool(holes.any()):
        row = int(holes.any(1).nonzero()[0])
        raise ConfigError(
            f"attention_mask, row {row}",
            found="".join(str(int(token)) for token in is_token[row].tolist()[:64]),
            expected="zeros at the left only" + (", or at the right" if allows_right else " (a cache has no holes)"),
            remedy="pad at the left, or pass a mask [batch, 1, new tokens, keys] of your own",
        )
    return starts


def _misfit(found: str, expected: str) -> ConfigError:
    remedy = "make one that fits with `bdlora_compile.make_cache(model, batch, length)`"
    return ConfigError("past_key_values", found=found, expected=expected, remedy=remedy)


def hosted(tensor: Tensor) -> Sequence[Tensor]:
    """The tensors that the hosted ranks hold in place of ``tensor``, which is the first hosted rank's."""
    peers: Sequence[Tensor] = getattr(tensor, "bdlora_peers", ())
    return (tensor, *peers)


def new_memory(shape: CacheShape, size: Size, number: Hashable) -> CacheMemory:
    """Memory of a new cache, all zeros. Its store has the number, by which recorded forwards know it."""
    batch, length = size
    store = _hosted_zeros((shape.num_layers, 2, batch, shape.local_heads, length, shape.head_dim), shape)
    store.bdlora_number = number  # type: ignore[attr-defined]  # read back by `step_graphs`
    lengths, starts = (torch.zeros(batch, dtype=torch.int64, device=shape.device) for _ in range(2))
    return CacheMemory(number, store, lengths, starts, (*hosted(store), lengths, starts))


def _hosted_zeros(size: Sequence[int], shape: CacheShape) -> Tensor:
    first, *peers = (torch.zeros(*size, dtype=shape.dtype, device=shape.device) for _ in range(shape.num_hosted))
    if peers:
        first.bdlora_peers = peers  # type: ignore[attr-defined]  # read back by `hosted`
    return first


def _mark_sizes_dynamic(cache: LocalCache) -> None:
    """Batch and length vary from call to call: one graph serves them all (a batch of one is a graph of its own)."""
    torch._dynamo.maybe_mark_dynamic(cache.store, [2, 4])
    torch._dynamo.maybe_mark_dynamic(cache.lengths, 0)
    torch._dynamo.maybe_mark_dynamic(cache.starts, 0)
