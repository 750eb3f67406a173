"""Forwards that were taken before go straight to the program: Dynamo's guards and transformers' code are passed by.

A forward is known by all that its graph depends on and that can change between calls: names, shapes and types of the
arguments, the shape of the cache, torch's modes, and the model's configuration. What is left out is the code and the
submodules of a loaded model: these are not looked at again once a forward has been recorded.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from bdlora_compile.runtime.cache import LocalCache
from bdlora_compile.runtime.program import Launched

_LIMIT = 64
_CACHE_TENSORS = ("store", "lengths", "starts")
_NO_FIELDS = {field.name: None for field in fields(CausalLMOutputWithPast)}


@dataclass(frozen=True, slots=True)
class KnownStep:
    """How to take a step again.

    Attributes:
        launched: the program and the arguments it was given; those of a call are replaced.
        from_call: positions of arguments that are keyword arguments of the call, with their names.
        from_cache: positions of arguments that are tensors of the cache, with their names.
        logits: which result the logits are.
        gives_cache: whether the output holds the cache.
        config: what the model's configuration held.
    """

    launched: Launched
    from_call: Mapping[int, str]
    from_cache: Mapping[int, str]
    logits: int
    gives_cache: bool
    config: Mapping[str, Any]

    def take(self, kwargs: Mapping[str, Any], cache: LocalCache) -> CausalLMOutputWithPast:
        """Run the program for a call like the one that was recorded."""
        args = list(self.launched.args)
        for position, name in self.from_call.items():
            args[position] = kwargs[name]
        for position, name in self.from_cache.items():
            args[position] = getattr(cache, name)
        results = self.launched.program(*args)
        return _output(results[self.logits], cache if self.gives_cache else None)


class KnownSteps:
    """The steps of one model; empty where none is recorded."""

    def __init__(self) -> None:
        self._steps: OrderedDict[Hashable, KnownStep] = OrderedDict()

    def find(self, model: PreTrainedModel, kwargs: Mapping[str, Any]) -> KnownStep | None:
        """A step like this call, if one was recorded and the configuration is what it was."""
        if not self._steps:
            return None
        key = _key(model, kwargs)
        known = self._steps.get(key)
        if known is None or known.config != model.config.__dict__:
            return None
        self._steps.move_to_end(key)
        return known

    def note(self, model: PreTrainedModel, kwargs: Mapping[str, Any], launched: Launched, output: Any) -> None:
        """Keep how a call went, if all that its program read is known to come from the call, its cache or the model."""
        cache = kwargs.get("past_key_values")
        key = _key(model, kwargs)
        if key is None or type(output) is not CausalLMOutputWithPast or not isinstance(cache, LocalCache):
            return
        extra = [
            name for name, value in output.items() if name not in ("logits", "past_key_values") and value is not None
        ]
        places = [place for place, result in enumerate(launched.results) if result is output.logits]
        sources = _sources(model, kwargs, cache, launched)
        if extra or len(places) != 1 or sources is None:
            return
        if len(self._steps) >= _LIMIT:
            self._steps.popitem(last=False)
        # Results and the caller's tensors are not kept alive.
        from_call, from_cache = sources
        args = [
            None if place in from_call or place in from_cache else value for place, value in enumerate(launched.args)
        ]
        gives_cache = output.past_key_values is not None
        kept = Launched(launched.program, args, ())
        self._steps[key] = KnownStep(kept, from_call, from_cache, places[0], gives_cache, dict(model.config.__dict__))

    def forget(self) -> None:
        """Forget all steps: the model is compiled anew."""
        self._steps.clear()


def _output(logits: Tensor, cache: LocalCache | None) -> CausalLMOutputWithPast:
    """What the class's constructor makes of the same; that takes a quarter of a step's Python."""
    held = {"logits": logits} if cache is None else {"logits": logits, "past_key_values": cache}
    made = CausalLMOutputWithPast.__new__(CausalLMOutputWithPast)
    made.__dict__.update(_NO_FIELDS, **held)
    for name, value in held.items():
        OrderedDict.__setitem__(made, name, value)
    return made


def _sources(
    model: PreTrainedModel, kwargs: Mapping[str, Any], cache: LocalCache, launched: Launched
) -> tuple[dict[int, str], dict[int, str]] | None:
    """Where the program's tensors come from; None if one is neither of the call, of its cache, nor of the model."""
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    call = {id(value): name for name, value in kwargs.items() if isinstance(value, Tensor)}
    of_cache = {id(getattr(cache, name)): name for name in _CACHE_TENSORS}
    from_call, from_cache = {}, {}
    for place, value in enumerate(launched.args):
        if id(value) in of_cache:
            from_cache[place] = of_cache[id(value)]
        elif id(value) in call:
            from_call[place] = call[id(value)]
        elif isinstance(value, Tensor) and id(value) not in own:
            return None
    return from_call, from_cache


def _key(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> Hashable:
    """What a graph depends on; None for calls without ids, or that hold something unusual."""
    tokens = kwargs.get("input_ids")
    if not isinstance(tokens, Tensor):
        return None
    parts: list[Hashable] = [
        model.training,
        len(model._forward_hooks),
        len(model._forward_pre_hooks),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(tokens.device.type),
        torch._C._len_torch_function_stack(),
    ]
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            parts.append((name, value.shape, value.stride(), value.dtype, value.device, value.requires_grad))
        elif isinstance(value, LocalCache):
            parts.append((name, value.store.shape, value.store.dtype, value.store.device))
        elif value is None or isinstance(value, (bool, int, float, str)):
            parts.append((name, type(value), value))
        else:
            return None
    return tuple(parts)
