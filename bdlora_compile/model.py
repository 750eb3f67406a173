"""Load a model and its adapters for the backend, or attach a model that is in memory."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from bdlora_compile import attention
from bdlora_compile.deploying import Setup, deploy, needed_sites, offered_sites, served_sites
from bdlora_compile.errors import ConfigError
from bdlora_compile.hollow import materialize_buffers
from bdlora_compile.machine import Machine
from bdlora_compile.model_config import read_model_config
from bdlora_compile.ranks import Ranks
from bdlora_compile.report import Report
from bdlora_compile.runtime.adapter_capacity import Capacity
from bdlora_compile.runtime.adapter_file import adapter_from_tensors
from bdlora_compile.runtime.adapters import AdapterSet
from bdlora_compile.runtime.all_reduce import Wanted
from bdlora_compile.runtime.cache import LocalCache
from bdlora_compile.runtime.staging import read_together
from bdlora_compile.runtime.store import MemorySource, SafetensorsSource, WeightSource
from bdlora_compile.served import ServedModel
from bdlora_compile.strategy import Choice, Strategy
from bdlora_compile.timing import Workload


def load(
    path_or_id: str | Path,
    adapters: Mapping[str, str | Path] | None = None,
    *,
    max_adapters: int | None = None,
    max_rank: int | None = None,
    max_local_rank: int | None = None,
    target_modules: str | Collection[str] | None = None,
    pool_bytes: int | None = None,
    host_bytes: int | None = None,
    strategy: Strategy = "local",
    workload: Workload | None = None,
    machine: Machine | str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    strict: bool = True,
    vocabulary_lora: bool | None = None,
    max_tokens: int = 65536,
    all_reduce: Wanted = "auto",
    ranks: Ranks | None = None,
) -> tuple[PreTrainedModel, AdapterSet]:
    """Make an ordinary Hugging Face model whose weights stay on disk, and the set of its adapters.

    The model has the right shapes and no weights; ``model.compile(backend="bdlora")`` reads this rank's slices.

    Args:
        path_or_id: a folder, or an id on the Hugging Face hub.
        adapters: PEFT folders by name.
        max_adapters: adapters that can be resident at once, of any number that can be known; as many as given, and at
            least 8; with ``pool_bytes`` as many block-diagonal ones of rank ``max_rank`` as these bytes hold.
        max_rank: largest adapter rank R; that of the given adapters, or 16. Together with ``max_adapters`` it sizes the
            pool: that many ordinary adapters of that rank fit, and more block-diagonal ones.
        max_local_rank: largest rank of an adapter's factors on one rank, ``max_rank`` by default. Where all are
            block-diagonal in N blocks or a multiple of N, ``max_rank`` / N is enough: the pool is smaller and faster
            kernels serve. An adapter that exceeds it is refused.
        target_modules: linear layers that adapters may change, by name or end of a name as in PEFT (``["q_proj",
            "v_proj"]``); all of the decoder's by default. Layers that read one input are one product: naming one of q,
            k and v admits all three. With fewer the pool is smaller, and other layers cost what they cost without
            adapters. An adapter that changes others is refused.
        pool_bytes: bytes of a rank's pool, instead of that size.
        host_bytes: bytes of host memory for a rank's copies of adapters, pinned on GPUs; four times the pool. Adapters
            beyond it are read from their folders when they are used.
        strategy: "local" (no LoRA collective) or "slora" (S-LoRA's collectives) for every site, or "auto": the cheaper
            one for each group of sites, by the cost model. The reasons are in ``reports(model)[0].decisions``.
        workload: with "auto", the load to choose for; 16 tokens of 16 adapters by default.
        machine: what it runs on: a name of the shipped table, a file that ``bdlora calibrate`` wrote, or a `Machine`;
            by default "h200-nvlink" on H200s, "h100-nvlink" on other GPUs and "cpu-gloo" on CPUs. "auto" chooses for
            it, and it says up to which sizes GPUs sum through symmetric memory.
        dtype: of weights and factors; the checkpoint's own by default.
        device: this process's GPU where there is one, else the CPU.
        strict: a gather that nobody asked for is an error; False runs it and reports it.
        vocabulary_lora: whether adapters may change the embedding and the logits (embed_tokens, lm_head): the pool
            and the graphs then have room for it. None: if one of the given adapters does.
        max_tokens: tokens that one forward may have.
        all_reduce: what sums over the ranks: "symmetric" (PyTorch's symmetric memory, for the sizes where ``machine``
            says that it is the fastest), "nccl" (the process group's own), or "auto": symmetric memory where all ranks
            can have it. ``reports(model)[0].all_reduce`` says which, and why.
        ranks: the mesh; by default the default process group, or this process alone.

    Returns:
        The model and its adapters.

    Raises:
        ConfigError: the folder or an argument cannot be honoured, or torchrun's processes have no process group.
        PlacementError: the number of ranks does not divide the model.
        AdapterError: an adapter cannot be served.
        AgreementError: with "auto", a rank came to another choice.
    """
    attention.register()
    _check_dtype(dtype)
    _check_adapters(adapters)
    choice = Choice.parse(strategy, workload, machine)
    ranks = ranks or Ranks.of_process_group()
    folder = _folder_of(path_or_id)
    config = read_model_config(folder)
    attention.require_plain_scores(config)
    dtype = dtype or config.dtype or torch.float32
    target = torch.device(device) if device is not None else _default_device()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    materialize_buffers(model, target)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    source = SafetensorsSource(folder)
    _check_weights(model, source, str(folder))
    layers = served_sites(model, ranks.mesh, strict)
    offered = offered_sites(model, layers, vocabulary_lora, target_modules)
    base_model = config.name_or_path or str(path_or_id)
    found = read_together(adapters or {}, offered, base_model, ranks.agreement)
    sites = needed_sites(offered, [adapter.factors for adapter in found.values()], vocabulary_lora)
    capacity = Capacity.choose(
        list(found.values()), max_adapters, max_rank, max_local_rank, max_tokens, pool_bytes, host_bytes
    )
    setup = Setup(ranks, choice, dtype, target, strict, capacity, base_model, all_reduce)
    return model, deploy(model, layers, sites, source, found, setup)


def attach(
    model: nn.Module,
    adapters: Mapping[str, str | Path] | None = None,
    *,
    max_adapters: int | None = None,
    max_rank: int | None = None,
    max_local_rank: int | None = None,
    target_modules: str | Collection[str] | None = None,
    pool_bytes: int | None = None,
    host_bytes: int | None = None,
    strategy: Strategy = "local",
    workload: Workload | None = None,
    machine: Machine | str | Path | None = None,
    strict: bool = True,
    vocabulary_lora: bool | None = None,
    max_tokens: int = 65536,
    all_reduce: Wanted = "auto",
    ranks: Ranks | None = None,
) -> tuple[PreTrainedModel, AdapterSet]:
    """Make a model that is in memory ready for the backend; arguments as for `load`.

    The model gives up its weights: each rank keeps the slices that it needs. A PEFT model is taken apart into its base
    model, which is returned, and its loaded adapters, which are in the set under their own names.

    Raises:
        ConfigError: not a Hugging Face causal language model, a PEFT model with merged adapters, or as for `load`.
        PlacementError, AdapterError: as for `load`.
    """
    attention.register()
    _check_adapters(adapters)
    choice = Choice.parse(strategy, workload, machine)
    # What is refused is refused before the model is taken apart.
    ranks = ranks or Ranks.of_process_group()
    base, peft_adapters = _take_apart(model)
    attention.require_plain_scores(base.config)
    base.set_attn_implementation(attention.NAME)
    base.eval()
    parameter = next(base.parameters())
    source = MemorySource(dict(base.named_parameters()))
    layers = served_sites(base, ranks.mesh, strict)
    offered = offered_sites(base, layers, vocabulary_lora, target_modules)
    base_model = base.config.name_or_path or None
    found = {
        name: adapter_from_tensors(config, tensors, offered, source=f"adapter {name!r}", base_model=base_model)
        for name, (config, tensors) in peft_adapters.items()
    }
    found |= read_together(adapters or {}, offered, base_model, ranks.agreement)
    sites = needed_sites(offered, [adapter.factors for adapter in found.values()], vocabulary_lora)
    capacity = Capacity.choose(
        list(found.values()), max_adapters, max_rank, max_local_rank, max_tokens, pool_bytes, host_bytes
    )
    setup = Setup(ranks, choice, parameter.dtype, parameter.device, strict, capacity, base_model, all_reduce)
    return base, deploy(base, layers, sites, source, found, setup)


def make_cache(model: PreTrainedModel, batch: int, length: int) -> LocalCache:
    """A cache of this rank's heads: ``batch`` rows of up to ``length`` tokens, for ``model(past_key_values=...)``."""
    if not isinstance(model, ServedModel):
        raise ConfigError(
            "make_cache",
            found=f"a plain {type(model).__name__}",
            expected="a model from `bdlora_compile.load` or `attach`",
            remedy="load the model with `bdlora_compile.load`",
        )
    return model.new_cache(batch, length)


def _check_dtype(dtype: object) -> None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    raise ConfigError(
        "dtype",
        found=repr(dtype),
        expected="a floating-point torch.dtype, or None for the checkpoint's own",
        remedy="pass one like torch.bfloat16",
    )


def _check_adapters(adapters: object) -> None:
    if adapters is None or isinstance(adapters, Mapping):
        return
    raise ConfigError(
        "adapters",
        found=f"a {type(adapters).__name__}",
        expected="folders by name",
        remedy="pass a dict like {'math': 'adapters/math'}",
    )


def _default_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # torchrun's name for this process's place on its machine.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


def _folder_of(path_or_id: str | Path) -> Path:
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    if isinstance(path_or_id, Path) or str(path_or_id).count("/") > 1 or str(path_or_id).startswith((".", "~", "/")):
        raise ConfigError(
            str(path_or_id),
            found="no such folder",
            expected="a Hugging Face model folder, or an id on the hub",
            remedy="check the path",
        )
    from huggingface_hub import snapshot_download  # only this branch touches the network

    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=["*.safetensors", "*.json", "tokenizer*"]))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            str(path_or_id),
            found=f"no such folder, and nothing on the hub ({type(error).__name__}: {reason})",
            expected="a Hugging Face model folder, or an id on the hub",
            remedy="check the name and that the hub can be reached, or download the model and pass its folder",
        ) from error


def _check_weights(model: nn.Module, source: WeightSource, where: str) -> None:
    """Every parameter is in the checkpoint with its shape."""
    stored = set(source.names())
    missing = [name for name, _ in model.named_parameters() if name not in stored]
    if missing:
        raise ConfigError(
            where,
            found=f"no tensor for {', '.join(missing[:5])}" + (f" and {len(missing) - 5} more" if missing[5:] else ""),
            expected=f"the parameters of {type(model).__name__}",
            remedy="check that the folder holds this model's complete checkpoint",
        )
    for name, parameter in model.named_parameters():
        if source.shape(name) != tuple(parameter.shape):
            raise ConfigError(
                f"{where}: {name}",
                found=f"shape {list(source.shape(name))}",
                expected=f"{list(parameter.shape)} as config.json says",
                remedy="check that config.json and the weights belong together",
            )


def _take_apart(model: Any) -> tuple[PreTrainedModel, dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]]:
    """The base model, and the adapters of a PEFT model by name."""
    if isinstance(model, ServedModel):
        raise ConfigError(
            "attach",
            found="a model that is attached already",
            expected="a plain Hugging Face or PEFT model",
            remedy="use the adapters that `load` or `attach` gave, or load the model again",
        )
    if hasattr(model, "peft_config") and hasattr(model, "unload"):
        from peft import get_peft_model_state_dict  # the model is PEFT's, so it is installed

        _refuse_merged(model)
        taken = {
            # The base model comes along: whole weights of its embeddings would say nothing new.
            name: (
                config.to_dict(),
                get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False),
            )
            for name, config in model.peft_config.items()
        }
        return model.unload(), taken
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ConfigError(
            "attach",
            found=f"a {type(model).__name__}",
            expected="a Hugging Face causal language model, or a PEFT model around one",
            remedy="pass the whole model, not a part of it",
        )
    return model, {}


def _refuse_merged(model: nn.Module) -> None:
    """A merged adapter is part of the base weights: unloading PEFT's layers would leave it there, for every row."""
    merged = {name for module in model.modules() for name in getattr(module, "merged_adapters", ())}
    if merged:
        raise ConfigError(
            "attach",
            found=f"adapters merged into the base weights: {', '.join(sorted(merged))}",
            expected="a PEFT model whose adapters are apart from the base weights",
            remedy="call `model.unmerge_adapter()` first",
        )


def reports(model: PreTrainedModel) -> Sequence[Report]:
    """What the compiler did to each graph of a loaded model, oldest first."""
    return model.bdlora.reports if isinstance(model, ServedModel) else ()


def release_graphs(model: PreTrainedModel) -> None:
    """Let go of the CUDA graphs of a loaded model, and of ended caches' memory; a later forward is recorded anew.

    Call it before ``torch.distributed.destroy_process_group()`` on GPUs: that waits for recorded collectives to go, and
    so for ever for those of a model that is still there (https://github.com/pytorch/pytorch/issues/115388). No other
    thread may be in a forward, unless it waits for a rank that is lost.
    """
    # Without the lock that a forward holds: one that waits for a lost rank would keep it for ever.
    if isinstance(model, ServedModel):
        for steps in list(model.bdlora.step_graphs):
            steps.forget()
        model.bdlora_memories.forget()
