"""Decode loops as a user writes them: this compiler's model, and transformers' tensor parallelism as the baseline."""

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache
from transformers.distributed import DistributedConfig

import bdlora_compile as bd
from bdlora_compile.backend import bdlora
from bdlora_compile.census import Census
from bdlora_compile.ir import Origin
from bdlora_compile.placement import local_shape
from bdlora_compile.strategy import Strategy
from benchmarks.decode.pricing import step_census

ROOM = 128
"""Tokens that a cache holds beyond the context: steps are measured inside it."""


class DecodeLoop(ABC):
    """A model and a batch of rows that hold a context and go on from there, one token a step."""

    model: Any

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache: Any = None
        self.tokens = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.positions = self.tokens
        self.context = 0

    @abstractmethod
    def new_cache(self, batch: int, length: int) -> Any:
        """A cache for ``batch`` rows of up to ``length`` tokens."""

    @abstractmethod
    def fill_cache(self, context: int) -> None:
        """Make every row hold ``context`` tokens with random keys and values."""

    def prepare(self, batch: int, context: int) -> None:
        """Rows that hold a context; the next step adds a token to each."""
        self.cache = None
        self.cache = self.new_cache(batch, context + ROOM)
        self.context = context
        self.rewind()

    def rewind(self) -> None:
        """Back to the context."""
        batch = self.tokens.shape[0] if self.cache is None else self.batch_of(self.cache)
        self.fill_cache(self.context)
        self.tokens = torch.full((batch, 1), 7, dtype=torch.int64, device=self.device)
        self.positions = torch.full((batch, 1), self.context, dtype=torch.int64, device=self.device)

    @abstractmethod
    def batch_of(self, cache: Any) -> int:
        """Rows of a cache."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [batch, seq, vocabulary]."""
        logits: Tensor = self.model(input_ids=tokens, position_ids=positions, past_key_values=self.cache).logits
        return logits

    def prefill(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [batch, 1, vocabulary] of the last token of prompts [batch, seq]."""
        inputs: dict[str, Any] = {"input_ids": tokens, "position_ids": positions, "past_key_values": self.cache}
        logits: Tensor = self.model(**inputs, logits_to_keep=1).logits
        return logits

    def load(self, paths: Mapping[str, Path]) -> float:
        """Make exactly these adapters resident; returns the seconds that it took. A loop without LoRA has none."""
        assert not paths, "no LoRA"
        return 0.0

    def chosen(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        """The adapters of the rows inside a block; without names the base model."""
        assert not any(names), "no LoRA"
        return nullcontext()

    @abstractmethod
    def release(self) -> None:
        """Let go of recorded graphs: a process group does not end before they are gone."""

    def run(self, steps: int, *, read: bool) -> None:
        """Greedy steps; with ``read`` the tokens are read after each, as who streams them does."""
        for _ in range(steps):
            logits = self.forward(self.tokens, self.positions)
            self.tokens = logits[:, -1:].argmax(-1)
            self.positions = self.positions + 1
            if read:
                self.tokens.tolist()


class OurLoop(DecodeLoop):
    """A model of this compiler."""

    def __init__(
        self,
        folder: Path,
        strategy: Strategy,
        machine: bd.Machine,
        dtype: torch.dtype,
        device: torch.device,
        inner: str,
        capacity: Mapping[str, Any],
    ) -> None:
        super().__init__(device)
        torch._dynamo.reset()
        options: dict[str, Any] = {"dtype": dtype, "device": device, "strategy": strategy, "machine": machine}
        self.model, self.adapters = bd.load(folder, host_bytes=2 << 30, max_tokens=8192, **options, **capacity)
        # The function, not its name: a checkout that was not installed has no entry point.
        self.model.compile(backend=bdlora, options={"inner": inner})

    def fill_weights(self) -> None:
        """Random numbers for all weights that the ranks here hold, in place; norms are ones."""
        for rank in self.model.bdlora.ranks:
            for tensor in rank.store.tensors():
                if tensor.ndim == 1:
                    tensor.fill_(1)
                else:
                    tensor.normal_(std=self.model.config.initializer_range)

    def load(self, paths: Mapping[str, Path]) -> float:
        start = time.perf_counter()
        for name in self.adapters.names:
            self.adapters.unload(name)
        for name, path in paths.items():
            self.adapters.load(name, path)
        return time.perf_counter() - start

    def chosen(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        return self.adapters.use(names) if any(names) else nullcontext()

    def new_cache(self, batch: int, length: int) -> Any:
        return bd.make_cache(self.model, batch, length)

    def fill_cache(self, context: int) -> None:
        self.cache.reset()
        self.cache.store.normal_()
        self.cache.lengths.fill_(context)
        self.cache.advance(context)

    def batch_of(self, cache: Any) -> int:
        return int(cache.batch)

    def release(self) -> None:
        bd.release_graphs(self.model)

    def logits(self, ids: Tensor, names: Sequence[str | None], steps: int) -> Tensor:
        """Logits of the last token of a prompt and of ``steps`` given tokens after it, by decode steps."""
        self.cache = self.new_cache(ids.shape[0], ids.shape[1] + ROOM)
        positions = torch.arange(ids.shape[1], device=self.device).expand_as(ids).contiguous()
        start = ids.shape[1] - steps
        with self.chosen(names):
            found = [self.prefill(ids[:, :start].contiguous(), positions[:, :start].contiguous())]
            for place in range(start, ids.shape[1]):
                token = slice(place, place + 1)
                found.append(self.forward(ids[:, token].contiguous(), positions[:, token].contiguous()))
        return torch.cat(found, dim=1)

    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step reads on this rank: all but the embedding's."""
        plan = self.model.bdlora.plan
        sizes = {
            name: torch.Size(local_shape(tuple(parameter.shape), plan.placement_of(name))).numel()
            for name, parameter in self.model.named_parameters()
        }
        unread = 0 if self.model.config.tie_word_embeddings else sizes["model.embed_tokens.weight"]
        return (sum(sizes.values()) - unread) * int(plan.dtype.itemsize)

    def cache_bytes(self) -> int:
        """Bytes of keys and values that a step reads on this rank at the context."""
        return int(self.cache.store.nbytes * self.context / self.cache.length)

    def census(self, batch: int, *, with_lora: bool) -> Census:
        """The collectives of a step."""
        return step_census(bd.reports(self.model), batch, with_lora=with_lora)

    def collectives(self, batch: int, *, with_lora: bool) -> tuple[int, int]:
        """Of a step: base and LoRA collectives of a layer."""
        census = self.census(batch, with_lora=with_lora)
        return max(census.per_layer(Origin.BASE), default=0), max(census.per_layer(Origin.LORA), default=0)

    def report_text(self) -> str:
        """What the compiler did to the last graph, and what became of its steps."""
        return bd.reports(self.model)[-1].summary()


class TransformersLoop(DecodeLoop):
    """transformers' own tensor parallelism under ``torch.compile(mode="reduce-overhead")``, without LoRA."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(device)
        torch._dynamo.reset()
        size = dist.get_world_size() if dist.is_initialized() else 1
        parallel: dict[str, Any] = {"distributed_config": DistributedConfig(tp_size=size)} if size > 1 else {}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **parallel).to(device).eval()
        self.model.config.use_cache = True
        self._eager = self.model.forward
        mode = "reduce-overhead" if device.type == "cuda" else None
        self._compiled = torch.compile(self.model.forward, mode=mode)

    def new_cache(self, batch: int, length: int) -> Any:
        return StaticCache(config=self.model.config, max_cache_len=length)

    def fill_cache(self, context: int) -> None:
        batch = self.tokens.shape[0]
        ids = torch.full((batch, context), 7, dtype=torch.int64, device=self.device)
        self.cache.reset()
        self._eager(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def prepare(self, batch: int, context: int) -> None:
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        super().prepare(batch, context)

    def batch_of(self, cache: Any) -> int:
        return self.tokens.shape[0]

    def release(self) -> None:
        torch._dynamo.reset()
        importlib.import_module("torch._inductor.cudagraph_trees").reset_cudagraph_trees()

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        out = self._compiled(input_ids=tokens, position_ids=positions, past_key_values=self.cache, use_cache=True)
        logits = out.logits
        return logits.full_tensor() if hasattr(logits, "full_tensor") else logits  # type: ignore[no-any-return]
