"""What a loaded model adds to its Hugging Face class: a cache of own heads, and errors where it cannot do a thing."""

import inspect
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from bdlora_compile.errors import ConfigError, HollowError
from bdlora_compile.known_steps import KnownSteps
from bdlora_compile.runtime.cache import CacheShape, LocalCache, left_padding, new_memory
from bdlora_compile.runtime.cache_memory import CacheMemories
from bdlora_compile.runtime.deployment import Deployment
from bdlora_compile.runtime.leading import Leader, led
from bdlora_compile.runtime.selection import Selection
from bdlora_compile.tracing import own_errors

_CACHE_STEP = 64
"""Cache lengths are rounded up to a multiple of this, so that calls of similar length allocate alike."""


class ServedModel(PreTrainedModel):  # type: ignore[misc]  # transformers is untyped for mypy
    """Mixed into the class of a loaded model. ``model.bdlora`` is its `Deployment`."""

    bdlora: Deployment
    bdlora_cache_shape: CacheShape
    bdlora_memories: CacheMemories
    bdlora_known_steps: KnownSteps

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward; sizes of inputs may vary from call to call without compiling again."""
        if torch.compiler.is_dynamo_compiling():
            # Dynamo traces this call; inputs can be marked from outside a graph only. `is_compiling` is also true while
            # another thread compiles.
            return super().__call__(*args, **kwargs)
        if args:
            # Of a method the function, which is the same object at every step; its first parameter is the model.
            function = getattr(self.forward, "__func__", None)
            names = _parameters_of(self.forward) if function is None else _parameters_of(function)[1:]
            kwargs = {**dict(zip(names[: len(args)], args, strict=True)), **kwargs}
        return self._run(self.bdlora.selection, **kwargs)

    @property
    def leader(self) -> Leader | None:
        """See `runtime.leading`."""
        return self.bdlora.leader

    @led
    def _run(self, /, selection: Selection, **kwargs: Any) -> Any:
        # One forward at a time: Dynamo's tables, the slots of the tokens and the ranks' collectives are one each.
        with self.bdlora.step, self.bdlora.chosen(selection), self._room_in_cache(**kwargs):
            kwargs = self._with_padding(kwargs)
            known = self.bdlora_known_steps.find(self, kwargs)
            if known is not None:
                output = known.take(kwargs, kwargs["past_key_values"])
                # Nobody reads it: it would keep the results until the next forward.
                self.bdlora.last_step = None
                return output
            # Models with several kinds of layers take their masks in a dictionary.
            for value in tree_leaves(kwargs):
                if isinstance(value, Tensor) and value.ndim > 1:
                    # Batch, sequence and key lengths; a hidden size is the same in each call and stays known.
                    last = value.ndim - 1 if value.is_floating_point() and value.ndim == 3 else value.ndim
                    torch._dynamo.maybe_mark_dynamic(value, list(range(last)))
            forward, stand_ins = partial(self._call_compiled, **kwargs), self.bdlora.stand_ins
            output = forward() if stand_ins is None else stand_ins.run(forward)
            launched, self.bdlora.last_step = self.bdlora.last_step, None
            if launched is not None:
                self.bdlora_known_steps.note(self, kwargs, launched, output)
            return output

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`torch.nn.Module.compile`; what was recorded by an earlier one is forgotten."""
        self.bdlora_known_steps.forget()
        super().compile(*args, **kwargs)

    def _with_padding(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Check a padding mask, and let the cache remember it: a graph of rows of a cache reads no mask.

        What a forward gets as its mask then: the cache's ``starts``, or the padding mask where there is no cache of
        ours. Masks of other kinds pass as they are.
        """
        mask, cache, tokens = kwargs.get("attention_mask"), kwargs.get("past_key_values"), _tokens((), kwargs)
        padding = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if tokens is None or mask is not padding:
            return kwargs
        if isinstance(cache, LocalCache):
            if padding is not None:
                cache.pad_left(padding, tokens.shape[1])
            return {**kwargs, "attention_mask": cache.starts}
        if padding is not None:
            left_padding(padding, allows_right=True)
        elif cache is None and kwargs.get("position_ids") is None:
            # transformers would look for several prompts in a row, which only position_ids can tell.
            mask = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
        return {**kwargs, "attention_mask": mask}

    @contextmanager
    def _room_in_cache(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Check that the forward fits its cache before anything is written, and count its tokens after it ran.

        One that fails leaves the rows as long as they were, wherever it failed: the next one may be the same again.
        """
        cache, tokens = kwargs.get("past_key_values"), _tokens(args, kwargs)
        if not isinstance(cache, LocalCache) or tokens is None:
            yield
            return
        batch, seq = tokens.shape[:2]
        cache.require_room(self.bdlora_cache_shape, batch, seq)
        try:
            yield
        except BaseException:
            # A device that is lost takes nothing any more; the error that is on its way says so.
            with suppress(RuntimeError):
                cache.write_lengths()
            raise
        cache.advance(seq)

    def _call_compiled(self, *args: Any, **kwargs: Any) -> Any:
        with own_errors():
            return super().__call__(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``; sampling draws the same tokens on every rank, following rank 0's seed.

        While other ranks follow (`bdlora_compile.follow`), rank 0 alone generates, with any streamer, stopping criteria
        and logits processors: the others take part in its forwards.
        """
        if kwargs.get("compile_config") is not None:
            raise ConfigError(
                "generate(compile_config=...)",
                found="a second way to compile",
                expected="a model compiled by `model.compile(backend='bdlora')`",
                remedy="leave compile_config out",
            )
        with self._same_random_numbers(), self.bdlora.chosen(self.bdlora.selection):
            return super().generate(*args, **kwargs)

    @contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        """Draw from rank 0's random numbers on every rank: logits are gathered, so tokens are then equal too."""
        shared = int(torch.randint(2**62, ()).item())
        if self.leader is None:
            shared = int(self.bdlora.agreement.exchange("seed", str(shared))[0])
        device = self.bdlora.plan.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(shared)
            yield

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Beams and several returned sequences repeat rows: the rows' adapters are repeated with them."""
        repeats = kwargs.get("expand_size", args[0] if args and isinstance(args[0], int) else 1)
        self.bdlora.repeat_rows(repeats)
        return super()._expand_inputs_for_generation(*args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return
        if generation_config.cache_implementation is not None:
            raise ConfigError(
                f"generate(cache_implementation={generation_config.cache_implementation!r})",
                found="a cache that holds all heads",
                expected="the cache of this rank's heads",
                remedy="leave cache_implementation out",
            )
        repeats = max(generation_config.num_beams, generation_config.num_return_sequences)
        length = -(-max_cache_length // _CACHE_STEP) * _CACHE_STEP
        model_kwargs["past_key_values"] = self.new_cache(batch_size * repeats, length)

    def new_cache(self, batch: int, length: int, number: Hashable = None) -> LocalCache:
        """A cache of ``batch`` rows of up to ``length`` tokens; ``number``: as on rank 0, if the other ranks follow."""
        size, memories = (batch, length), self.bdlora_memories
        memory = memories.take(size, number)
        cache = LocalCache(self.bdlora_cache_shape, batch, length, memory)
        weakref.finalize(cache, memories.give, size, memory).atexit = False
        return cache

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """Never: ``generate`` would compile the model a second time with another backend."""
        return False

    # --- what a hollow model cannot do ------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> NoReturn:
        _refuse(self, "to() / half() / cuda()", "load it again with `bdlora_compile.load(..., dtype=, device=)`")

    def to(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: dtype and device are chosen at load."""
        _refuse(self, "to()", "load it again with `bdlora_compile.load(..., dtype=, device=)`")

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the weights are where they were loaded from."""
        _refuse(self, "state_dict()", "read the weights from the folder that the model was loaded from")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the backend reads shards from the folder."""
        _refuse(self, "load_state_dict()", "save the new weights to a folder and load that")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the weights are where they were loaded from."""
        _refuse(self, "save_pretrained()", "copy the folder that the model was loaded from")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the weights are where they were loaded from."""
        _refuse(self, "push_to_hub()", "push the folder that the model was loaded from")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: resize before loading."""
        _refuse(self, "resize_token_embeddings()", "resize and save the plain model, then load that")

    def __deepcopy__(self, memo: object) -> NoReturn:
        _refuse(self, "deepcopy()", "load the model a second time")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        _refuse(self, "pickling", "load the model in the other process")


@lru_cache(maxsize=64)
def _parameters_of(function: Callable[..., Any]) -> Sequence[str]:
    """Names, in order; looked up at every step."""
    return [*inspect.signature(function).parameters]


def _tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The forward's ids [batch, seq] or embeddings [batch, seq, hidden]; None if it has neither."""
    ids, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
    tokens = ids if embeds is None else embeds
    return tokens if isinstance(tokens, Tensor) else None


def serve(model: PreTrainedModel, deployment: Deployment, cache_shape: CacheShape) -> None:
    """Mix `ServedModel` into the model's class, under the class's own name."""
    cls = type(model)
    # No auto-made caches in plain forwards: they would hold all heads. `generate` asks for a cache by itself.
    model.config.use_cache = False
    if model.generation_config is not None:
        model.generation_config.use_cache = True
    model.bdlora = deployment
    model.bdlora_cache_shape = cache_shape
    model.bdlora_memories = CacheMemories(partial(new_memory, cache_shape), deployment.follow_forwards)
    model.bdlora_known_steps = KnownSteps()
    model.__class__ = type(cls.__name__, (ServedModel, cls), {"__module__": cls.__module__})


def _refuse(model: PreTrainedModel, call: str, remedy: str) -> NoReturn:
    raise HollowError(
        f"{type(model).__name__}.{call}",
        found="a model whose weights live in the ranks' shards",
        expected="a call that needs no whole weights",
        remedy=remedy,
    )
