"""The main job: a real model and real block-diagonal adapters on three ranks, every token checked against PEFT."""

import sys
import time
from pathlib import Path

from smollm2 import checkpoint

from bdlora_compile.commands.common import launch

HERE = Path(__file__).parent
PROMPTS = ("What is the capital of France?", "Tell me about the sea.")


def main() -> int:
    """Prepare the weights, start three processes, show what they answer; 1 if a token differs from PEFT's."""
    start = time.perf_counter()
    model = checkpoint(HERE.parent / ".demo" / "SmolLM2-135M-Instruct")
    arguments = [str(model), "--new-tokens", "24", "--check"]
    for folder in sorted(path for path in (HERE / "adapters").iterdir() if path.is_dir()):
        arguments += ["--adapter", f"{folder.name}={folder}"]
    for prompt in PROMPTS:
        arguments += ["--prompt", prompt]
    # The model has nine heads and an intermediate size of 1,536: it runs on one or three ranks.
    status = launch("bdlora_compile.decode", arguments, 3)
    print(f"demo took {time.perf_counter() - start:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
