"""One rank of a launch in which rank 0 drives: started by torchrun, from `test_follow`."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import TextIteratorStreamer

import bdlora_compile as bd
from bdlora_compile.serving.batch import Batch
from bdlora_compile.serving.engine import Engine
from bdlora_compile.serving.requests import Request, SamplingParams, Token
from tests.models import Reference, relative_error

IDS = torch.tensor([[5, 9, 33, 71], [8, 8, 100, 4]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


class Cases:
    """What rank 0 does as if it were alone."""

    def __init__(self, folder: Path, model: Any, adapters: bd.AdapterSet, tokenizer: Any) -> None:
        self.model, self.adapters, self.tokenizer = model, adapters, tokenizer
        self.paths = {name: folder / name for name in ("a", "b", "c")}
        self.reference = Reference(folder / "model", self.paths, torch.float64)

    def forward(self) -> None:
        """Logits, and a strided view as input."""
        with self.adapters.use(["a", None]), torch.no_grad():
            found = self.model(IDS).logits
            half = self.model(torch.cat([IDS, IDS], 1)[:, :4]).logits
        expected = self.reference.logits(IDS, ["a", None])
        assert relative_error(found, expected) < 2e-6
        assert relative_error(half, expected) < 2e-6

    def generate(self) -> None:
        """Greedy, sampled, beams (rows of the cache are reordered), and a streamer in a thread."""
        settings: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 5}
        with self.adapters.use(["b", "a"]):
            tokens = self.model.generate(IDS, do_sample=False, **settings)
            self.model.generate(IDS, do_sample=True, **settings)
            beams = self.model.generate(IDS, do_sample=False, num_beams=3, **settings)
        assert torch.equal(tokens[:, 4:], self.reference.generate(IDS, ["b", "a"], MASK, 5))
        peft = self.reference.model
        for row, name in enumerate(["b", "a"]):
            peft.set_adapter(name)
            own = {"input_ids": IDS[row : row + 1], "attention_mask": MASK[row : row + 1], "eos_token_id": None}
            assert torch.equal(beams[row], peft.generate(**own, num_beams=3, do_sample=False, max_new_tokens=5)[0])

    def streamer(self) -> None:
        """A streamer of transformers, in a thread with a choice of its own."""
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True)

        def work() -> None:
            with self.adapters.use("a"):
                self.model.generate(IDS[1:], streamer=streamer, do_sample=False, max_new_tokens=5)

        thread = threading.Thread(target=work)
        thread.start()
        text = "".join(streamer)
        thread.join()
        expected = self.reference.generate(IDS[1:], ["a"], torch.ones_like(IDS[1:]), 5)
        assert text == self.tokenizer.decode(expected[0])

    def errors(self) -> None:
        """What fails on all ranks is an error of the call, and the next one works."""
        with pytest.raises(bd.UnknownAdapterError), self.adapters.use("nobody"):
            pytest.fail("entered")
        with pytest.raises(bd.AdapterError):
            self.adapters.load("broken", self.paths["a"].parent / "nowhere")
        with self.adapters.use(["a"]), pytest.raises(bd.ConfigError, match=r"adapters\.use"):
            self.model(IDS)
        with pytest.raises(bd.ConfigError, match="cannot be sent"):
            self.model(IDS, output_hidden_states=lambda: None)
        self.forward()

    def loads(self) -> None:
        """Adapters come and go; three share a pool of two."""
        self.adapters.load("c", self.paths["c"])
        pending = self.adapters.begin_load("again", self.paths["a"])
        for rows in (["a", "b"], ["c", "b"], ["a", "c"]):
            with self.adapters.use(rows), torch.no_grad():
                assert relative_error(self.model(IDS).logits, self.reference.logits(IDS, list(rows))) < 2e-6
        assert pending.commit().version == self.adapters.version("a")
        self.adapters.unload("again")
        self.adapters.unload("c")

    def threads(self) -> None:
        """Four threads with a choice each; each gets its own adapter's logits, every time."""
        rows: list[list[str | None]] = [["a", "b"], ["b", None], [None, None], ["b", "a"]]
        errors: list[float] = []

        def work(names: list[str | None], expected: torch.Tensor) -> None:
            for _ in range(5):
                with self.adapters.use(names), torch.no_grad():
                    errors.append(relative_error(self.model(IDS).logits, expected))

        workers = [threading.Thread(target=work, args=(names, self.reference.logits(IDS, names))) for names in rows]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(errors) == 20
        assert max(errors) < 2e-6

    def engine(self) -> None:
        """The engine over followers, while adapters come and go and another thread generates.

        As on GPUs: tokens that the host has not read yet go from device to device.
        """
        Batch.runs_behind = True  # type: ignore[method-assign, assignment]
        with Engine(self.model, self.adapters, self.tokenizer, max_rows=3, max_length=40) as engine:
            engine.load_adapter("c", self.paths["c"])
            greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
            requests = [Request(tuple(range(3, 6 + i)), ["a", "b", "c", None][i % 4], greedy) for i in range(8)]
            streams = [engine.submit(request) for request in requests]
            self.forward()
            engine.check()
            for request, stream in zip(requests, streams, strict=True):
                ids = torch.tensor([request.prompt])
                expected = self.reference.generate(ids, [request.adapter], torch.ones_like(ids), 6)
                assert stream.result(60).ids == tuple(expected[0].tolist())
            engine.unload_adapter("c")
        assert all(self.adapters[name].references == 0 for name in self.adapters.names)


def run_cases(cases: Cases) -> None:
    """All of them, each once."""
    work: list[Callable[[], None]] = [cases.forward, cases.generate, cases.streamer, cases.errors]
    for case in (*work, cases.loads, cases.threads, cases.engine):
        case()
        print(f"case: {case.__name__}", flush=True)


def lose_a_rank(cases: Cases) -> None:
    """The other rank is killed while a request streams: the stream ends with an error, the engine has failed."""
    engine = Engine(cases.model, cases.adapters, cases.tokenizer, max_rows=2, max_length=512, step_timeout=20)
    engine.start()
    stream = engine.submit(Request((5, 9), "a", SamplingParams(max_tokens=500, ignore_eos=True)))
    other = int(dist.distributed_c10d._get_default_store().get("pid of 1"))
    for number, event in enumerate(stream):
        if number == 3:
            os.kill(other, signal.SIGKILL)
        if not isinstance(event, Token):
            print(f"ended: {event.reason} {type(event.error).__name__}", flush=True)
    with pytest.raises(bd.EngineClosedError):
        engine.submit(Request((5, 9)))
    assert isinstance(engine.failed, bd.LostRankError)
    engine.close()
    with pytest.raises(bd.LostRankError):
        cases.model(IDS)
    print("case: lost", flush=True)
    os._exit(3)


def main() -> None:
    """Entry of a rank."""
    torch.set_num_threads(1)
    # So many kinds of forwards (beams, batches of one, with and without masks) no server has.
    torch._dynamo.config.recompile_limit = 16
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    store = dist.distributed_c10d._get_default_store()
    store.set(f"pid of {dist.get_rank()}", str(os.getpid()))
    paths = {name: folder / name for name in ("a", "b")}
    model, adapters = bd.load(folder / "model", paths, dtype=torch.float64, max_adapters=2, max_rank=4)
    model.compile(backend="bdlora")
    model.generation_config.eos_token_id = None
    with bd.follow(model, adapters, timedelta(seconds=20)) as drives:
        if drives:
            from tests.serving.conftest import tokenizer_of

            cases = Cases(folder, model, adapters, tokenizer_of(128))
            run_cases(cases) if kind == "cases" else lose_a_rank(cases)
    print(f"rank {dist.get_rank()} left", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
