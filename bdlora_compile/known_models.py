"""Configurations of well-known models, for explanations without a download: arguments of transformers' own classes.

Sources: ``config.json`` of each model's repository; only what decides shapes, layers and rotary angles is here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from bdlora_compile.errors import ConfigError

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3 = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_parameters": _LLAMA3_ROPE,
    "tie_word_embeddings": False,
}
_LLAMA32 = _LLAMA3 | {"tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE | {"factor": 32.0}}

_KNOWN: Mapping[str, Mapping[str, Any]] = {
    "llama-3.1-8b": _LLAMA3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3.1-70b": _LLAMA3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "llama-3.1-405b": _LLAMA3
    | {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
    "llama-3.2-1b": _LLAMA32
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
    },
    "llama-3.2-3b": _LLAMA32
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32768,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
}


def known_models() -> Sequence[str]:
    """Names that `known_config` takes."""
    return list(_KNOWN)


def known_config(name: str) -> PretrainedConfig:
    """The configuration of a well-known model, in bfloat16.

    Raises:
        ConfigError: there is no such name.
    """
    if name.lower() not in _KNOWN:
        raise ConfigError(
            f"configuration {name!r}",
            found="neither a known name, nor a config.json, nor a model folder",
            expected=f"one of {', '.join(_KNOWN)}, or a path",
            remedy="choose one of them, or give the path of a config.json",
        )
    settings = dict(_KNOWN[name.lower()])
    return AutoConfig.for_model(settings.pop("model_type"), dtype="bfloat16", **settings)
