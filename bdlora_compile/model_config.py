"""A model's configuration and tokenizer, read by transformers; what it says of a wrong folder says what to do."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from bdlora_compile.errors import ConfigError, first_line


def read_model_config(model: str | Path) -> PretrainedConfig:
    """The configuration of a folder, a file, or an id on the hub.

    Raises:
        ConfigError: there is none of a model.
    """
    try:
        return AutoConfig.from_pretrained(model)
    except (ValueError, OSError) as error:
        if (Path(model) / "adapter_config.json").is_file():
            found = "an adapter's folder"
        else:
            found = f"no configuration of a model ({first_line(error)})"
        raise ConfigError(
            str(model),
            found=found,
            expected="a Hugging Face model folder, whose config.json names its model_type, or an id on the hub",
            remedy="give the base model here, and adapters by name",
        ) from error


def read_tokenizer(model: str | Path, **options: Any) -> Any:
    """The tokenizer of a model.

    Raises:
        ConfigError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(model, **options)
    except (ValueError, OSError) as error:
        raise ConfigError(
            str(model),
            found=f"no tokenizer ({first_line(error)})",
            expected="its files beside the model's",
            remedy="save it there with `tokenizer.save_pretrained(folder)`",
        ) from error
