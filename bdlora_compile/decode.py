"""What ``bdlora run`` does on every rank: load, compile, decode one batch in which each row has its own adapter."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from bdlora_compile.commands.common import parse_adapters
from bdlora_compile.errors import BdloraError, ConfigError
from bdlora_compile.ir import Origin
from bdlora_compile.model import load, release_graphs, reports
from bdlora_compile.model_config import read_tokenizer
from bdlora_compile.report import Report
from bdlora_compile.runtime.adapters import AdapterSet
from bdlora_compile.strategy import Strategy
from bdlora_compile.timing import Workload


@dataclass(frozen=True, slots=True)
class Job:
    """One batch: every prompt with every adapter and with none.

    Attributes:
        model: folder or hub id.
        adapters: PEFT folders by name.
        prompts: texts of the user.
        new_tokens: tokens to generate for each row.
        strategy: layout of the LoRA sites.
        machine: what it runs on, None for the device's default.
        inner: what runs a rank's graph, None for the device's default.
        check: compare every token with PEFT's eager result.
    """

    model: str
    adapters: dict[str, str]
    prompts: Sequence[str]
    new_tokens: int
    strategy: Strategy
    machine: str | None
    inner: str | None
    check: bool

    @property
    def rows(self) -> list[tuple[str, str | None]]:
        """(prompt, adapter) of each row of the batch."""
        return [(prompt, name) for prompt in self.prompts for name in (None, *self.adapters)]


def decode(job: Job, console: Console) -> bool:
    """Run the job on this rank; True if every token is PEFT's (or nothing was to be checked)."""
    start = time.perf_counter()
    load_of_batch = Workload(len(job.rows), max(len(job.adapters), 1)) if job.strategy == "auto" else None
    model, adapters = load(job.model, job.adapters, strategy=job.strategy, workload=load_of_batch, machine=job.machine)
    model.compile(backend="bdlora", options={"inner": job.inner} if job.inner else None)
    try:
        return _decode(job, model, adapters, console, start)
    finally:
        # The process group ends after this.
        release_graphs(model)


def _decode(job: Job, model: PreTrainedModel, adapters: AdapterSet, console: Console, start: float) -> bool:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    console.print(f"{type(model).__name__} on {ranks} ranks, {len(adapters)} adapters: {', '.join(adapters.names)}")
    batch = _tokenize(job)
    console.print(f"compiling and decoding {len(job.rows)} rows of {job.new_tokens} tokens ...")
    with adapters.use([name for _, name in job.rows]), Progress(console=console, transient=True) as progress:
        steps = StoppingCriteriaList([_Steps(progress, job.new_tokens)])
        tokens = model.generate(**batch, max_new_tokens=job.new_tokens, do_sample=False, stopping_criteria=steps)
    new = tokens[:, batch["input_ids"].shape[1] :].cpu()
    console.print(f"done in {time.perf_counter() - start:.0f} s, compilation included")
    _show_answers(job, new, console)
    _show_collectives(reports(model), console)
    if job.strategy == "auto":
        for decision in reports(model)[0].decisions:
            console.print(decision.text(), markup=False)
    return not job.check or _agrees_with_peft(job, batch, new, model, console)


class _Steps(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped for mypy
    """Moves a bar with every token; stops nothing."""

    def __init__(self, progress: Progress, new_tokens: int) -> None:
        self._progress = progress
        # The first token waits for the prompt's graph, the second for that of one token.
        self._task = progress.add_task("compiling", total=new_tokens)
        self._done = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row ends here: never."""
        self._done += 1
        description = "compiling" if self._done < 2 else "decoding"
        self._progress.update(self._task, advance=1, description=description)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _tokenize(job: Job) -> dict[str, Tensor]:
    tokenizer = read_tokenizer(job.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [_chat(tokenizer, prompt) for prompt, _ in job.rows]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=tokenizer.chat_template is None)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}


def _chat(tokenizer: Any, prompt: str) -> str:
    if tokenizer.chat_template is None:
        return prompt
    message = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def _show_answers(job: Job, new: Tensor, console: Console) -> None:
    tokenizer = read_tokenizer(job.model)
    table = Table("prompt", "adapter", "answer", title="one batch, every row with its own adapter", show_lines=True)
    for (prompt, name), tokens in zip(job.rows, new, strict=True):
        table.add_row(prompt, name or "(base)", tokenizer.decode(tokens, skip_special_tokens=True).strip())
    console.print(table)


def _show_collectives(graphs: Sequence[Report], console: Console) -> None:
    table = Table("graph", "stage", "base", "LoRA", "outside layers", title="collectives per decoder layer")
    for report in graphs:
        for name in ("partition", "localize"):
            census = report.stage(name).census
            base, lora = census.per_layer(Origin.BASE), census.per_layer(Origin.LORA)
            outside = census.total() - sum(base) - sum(lora)
            graph = "one token" if report.inputs[0].endswith(" 1]") else "prompt"
            table.add_row(graph, name, _range(base), _range(lora), str(outside))
    console.print(table)


def _range(counts: Sequence[int]) -> str:
    if not counts:
        return "0"
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"


def _agrees_with_peft(
    job: Job, batch: dict[str, Tensor], new: Tensor, model: PreTrainedModel, console: Console
) -> bool:
    """Compare with PEFT's own eager result on rank 0, row by row of the same prompt and adapter."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return True
    from peft import PeftModel  # only the check needs PEFT

    console.print("checking every token against PEFT's eager result ...")
    plain: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=model.dtype).to(new.device).eval()
    wrapped: Any = plain
    for loaded, path in job.adapters.items():
        if isinstance(wrapped, PeftModel):
            wrapped.load_adapter(path, adapter_name=loaded)
        else:
            wrapped = PeftModel.from_pretrained(plain, path, adapter_name=loaded)
    differences = 0
    for row, (prompt, name) in enumerate(job.rows):
        expected = _reference(wrapped, name, {key: value[row : row + 1].cpu() for key, value in batch.items()}, job)
        own = new[row, : expected.shape[0]]
        if not torch.equal(own, expected):
            differences += 1
            console.print(f"row {row} ({name or 'base'}, {prompt!r}) differs: {own.tolist()} != {expected.tolist()}")
    verdict = "all equal" if not differences else f"{differences} rows differ"
    console.print(f"{len(job.rows)} rows x {job.new_tokens} tokens against PEFT: {verdict}")
    return differences == 0


def _reference(wrapped: Any, name: str | None, row: dict[str, Tensor], job: Job) -> Tensor:
    """Greedy tokens of one row by PEFT, without the row's padding."""
    ids = row["input_ids"][row["attention_mask"].bool()][None]
    settings: dict[str, Any] = {"max_new_tokens": job.new_tokens, "do_sample": False}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name is None and hasattr(wrapped, "disable_adapter"):
        with wrapped.disable_adapter():
            out = wrapped.generate(**inputs, **settings)
    else:
        if name is not None:
            wrapped.set_adapter(name)
        out = wrapped.generate(**inputs, **settings)
    tokens: Tensor = out[0, ids.shape[1] :]
    return tokens


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of one rank's process, started by torchrun."""
    job = _parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        # Ranks of one machine share its cores.
        torch.set_num_threads(max((os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", 1)), 1))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    console = Console(quiet=dist.is_initialized() and dist.get_rank() != 0)
    try:
        return 0 if decode(job, console) else 1
    except BdloraError as error:
        # One line, from the first rank that the others agree with; the trace would say where in the library.
        console.file = sys.stderr
        console.print(f"error: {error}", markup=False, style="red")
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _parse(arguments: Sequence[str] | None) -> Job:
    parser = argparse.ArgumentParser(prog="bdlora_compile.decode", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--strategy", choices=get_args(Strategy), default="local")
    parser.add_argument("--machine", default=None)
    parser.add_argument("--inner", choices=("eager", "inductor"), default=None)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    try:
        adapters = {name: str(path) for name, path in parse_adapters(options.adapter).items()}
    except ConfigError as error:
        parser.error(str(error))
    model = str(Path(options.model)) if Path(options.model).is_dir() else options.model
    settings = (options.new_tokens, options.strategy, options.machine, options.inner, options.check)
    return Job(model, adapters, options.prompt, *settings)


if __name__ == "__main__":
    sys.exit(main())
