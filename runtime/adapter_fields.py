"""Which fields of ``adapter_config.json`` are refused and which are harmless; words for errors about an adapter."""

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from bdlora_compile.errors import AdapterError

LFS_POINTER: Final = b"version https://git-lfs"
"""First bytes of the small text file that git leaves in place of a large one that was not downloaded."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that cannot be honoured.

    Attributes:
        off: the values that switch the feature off; any other is refused.
        meaning: what the feature does to the model.
        remedy: what to do instead, an imperative.
    """

    off: tuple[object, ...]
    meaning: str
    remedy: str


_MERGE: Final = "merge it into the base model with PEFT's merge_and_unload, or train again without it"

REFUSED: Final[Mapping[str, Refusal]] = MappingProxyType(
    {
        "use_dora": Refusal((None, False), "DoRA rescales every output by a trained magnitude", _MERGE),
        "use_qalora": Refusal((None, False), "QALoRA pools the input of A by groups", "train again without it"),
        "lora_bias": Refusal((None, False), "B gets a trained bias", _MERGE),
        "bias": Refusal(("none",), "biases of the base model were trained", _MERGE),
        "fan_in_fan_out": Refusal(
            (None, False),
            "it declares base weights stored transposed, which no Llama has",
            "write false (PEFT itself ignores it for nn.Linear)",
        ),
        "modules_to_save": Refusal(
            (None, []), "whole layers of the base model were trained", "train again with LoRA on these layers only"
        ),
        "trainable_token_indices": Refusal((None, [], {}), "rows of the embedding were trained", _MERGE),
        "layer_replication": Refusal(
            (None, []), "layers of the base model are repeated", "build and serve the deeper model as a base of its own"
        ),
        "target_parameters": Refusal(
            (None, []), "LoRA acts on bare parameters", "train again with target_modules instead"
        ),
        "alora_invocation_tokens": Refusal(
            (None, []), "aLoRA switches the adapter on at given tokens of the prompt", "train again without it"
        ),
        "arrow_config": Refusal(
            (None,), "Arrow routes each token between adapters", "serve the adapters it routes between one by one"
        ),
        "kasa_config": Refusal(
            (None,), "KaSA truncates the base weights and puts a diagonal between A and B", "train again without it"
        ),
        "monteclora_config": Refusal((None,), "MonteCLoRA samples the factors", "train again without it"),
        "megatron_config": Refusal(
            (None, {}), "factors of Megatron's parallel layers lie otherwise", "convert it to Hugging Face's layers"
        ),
    }
)

HARMLESS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "task_type": "names the head that PEFT wraps; a head with weights of its own is refused by its tensors",
        "auto_mapping": "names the class of the base model",
        "peft_version": "names the writer",
        "inference_mode": "switches gradients",
        "lora_dropout": "acts while training only",
        "megatron_core": "names a Python module, used with megatron_config only",
        "loftq_config": "used with init_lora_weights='loftq' only, which is refused",
        "eva_config": "chooses first values of A; the ranks it chose are in rank_pattern",
        "corda_config": "used with init_lora_weights='corda' only, which is refused",
        "lora_ga_config": "used with init_lora_weights='lora_ga' only, which is refused",
        "velora_config": "compresses activations for the backward pass only",
        "qalora_group_size": "used with use_qalora only, which is refused",
        "runtime_config": "never saved by PEFT, and ignored by it when found",
    }
)


def short(value: object) -> str:
    """``repr`` of a value from a file, cut to a length that fits a message; newlines are escaped."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 80
    return brief.repr(value)


def config_error(source: str, field: str, *, found: str, expected: str, remedy: str) -> AdapterError:
    """An error about one field of the configuration of the adapter ``source``."""
    return AdapterError(f"{source}: adapter_config field {field!r}", found=found, expected=expected, remedy=remedy)


def some(items: Iterable[str], limit: int = 5) -> str:
    """The first ``limit`` items, and how many more there are."""
    listed = list(items)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
