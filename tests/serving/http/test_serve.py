"""`bdlora serve` as users start it: SmolLM2 on three ranks, OpenAI's own client, answers equal to PEFT's alone.

One start serves all tests; the last one kills a rank.
"""

import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from peft import PeftModel
from smollm2 import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serving.http.fake import ADMIN
from tests.serving.http.process import REPOSITORY, address, ranks_of, started

pytestmark = pytest.mark.timeout(600)

ADAPTERS = REPOSITORY / "examples" / "adapters"
BASE = "smollm2"
QUESTIONS = ("What is the sun?", "Tell me about the sea.")
TOKENS = 8


@dataclass
class Served:
    """A running server, and what PEFT alone would answer.

    Attributes:
        process: of ``bdlora serve``.
        url: without a path.
        model: PEFT's, eager.
        tokenizer: of it.
    """

    process: subprocess.Popen[str]
    url: str
    model: Any
    tokenizer: Any
    known: dict[tuple[str, str], tuple[list[int], torch.Tensor]]

    @property
    def client(self) -> openai.OpenAI:
        """OpenAI's own."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=120)

    def alone(self, name: str, question: str) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens by PEFT, and the log-probability of each."""
        if (name, question) not in self.known:
            self.known[name, question] = self._alone(name, question)
        return self.known[name, question]

    def text(self, name: str, question: str) -> str:
        """The same as text."""
        text: str = self.tokenizer.decode(self.alone(name, question)[0], skip_special_tokens=True)
        return text

    def _alone(self, name: str, question: str) -> tuple[list[int], torch.Tensor]:
        chat = self.tokenizer.apply_chat_template(ask(question), add_generation_prompt=True, return_tensors="pt")
        ids = chat if isinstance(chat, torch.Tensor) else chat["input_ids"]
        settings = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if name == BASE:
            with self.model.disable_adapter():
                out = self.model.generate(**inputs, **settings, output_logits=True)
        else:
            self.model.set_adapter(name)
            out = self.model.generate(**inputs, **settings, output_logits=True)
        tokens = out.sequences[0, ids.shape[1] :]
        logprobs = torch.stack(out.logits)[:, 0].log_softmax(-1)
        return tokens.tolist(), logprobs.gather(1, tokens[:, None])[:, 0]


def ask(question: str) -> Any:
    """A conversation of one question."""
    return [{"role": "user", "content": question}]


def chat(served: Served, name: str, question: str, **more: Any) -> Any:
    """One greedy answer, unless ``more`` says otherwise."""
    settings: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0} | more
    return served.client.chat.completions.create(model=name, messages=ask(question), **settings)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = checkpoint(REPOSITORY / ".demo" / "SmolLM2-135M-Instruct")
    root = tmp_path_factory.mktemp("roots")
    shutil.copytree(ADAPTERS / "telegram", root / "telegram")
    log = root / "log"
    arguments: list[str | Path] = [model, "--tp", "3", "--adapter", f"pirate={ADAPTERS / 'pirate'}"]
    arguments += ["--adapter", f"json={ADAPTERS / 'json'}", "--adapter-root", root, "--served-name", BASE]
    arguments += ["--max-rows", "4", "--max-length", "128"]
    with started(arguments, log) as process:
        # The reference is made while the server compiles.
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        peft: Any = PeftModel.from_pretrained(plain, ADAPTERS / "pirate", adapter_name="pirate")
        for name in ("json", "telegram"):
            peft.load_adapter(ADAPTERS / name, adapter_name=name)
        url = address(process, log, 400)
        yield Served(process, url, peft.eval(), AutoTokenizer.from_pretrained(model), {})


@pytest.mark.parametrize("name", [BASE, "pirate", "json"])
def test_answers_are_those_of_the_adapter_alone(served: Served, name: str) -> None:
    done = chat(served, name, QUESTIONS[0], logprobs=True, top_logprobs=2)
    ids, logprobs = served.alone(name, QUESTIONS[0])
    assert done.choices[0].message.content == served.text(name, QUESTIONS[0])
    assert done.usage.completion_tokens == len(ids)
    content = done.choices[0].logprobs.content
    found = torch.tensor([token.logprob for token in content])
    # float32 sums in another order: 1e-5 was measured, the next adapter is above 0.1 away.
    assert torch.allclose(found, logprobs, atol=1e-3)
    assert all(token.top_logprobs[0].logprob == token.logprob for token in content)
    streamed = chat(served, name, QUESTIONS[0], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == served.text(name, QUESTIONS[0])


def test_seeds_and_choices(served: Served) -> None:
    def texts(**more: Any) -> list[str]:
        # The adapters are too sure of themselves to answer in two ways.
        done = chat(served, BASE, QUESTIONS[0], temperature=2, **more)
        return [choice.message.content for choice in done.choices]

    three = texts(n=3, seed=11)
    assert len(set(three)) > 1
    assert texts(n=3, seed=11) == three
    assert texts(seed=12) == [three[1]], "the second choice has the next seed"


def test_stop_texts(served: Served) -> None:
    whole = served.text("pirate", QUESTIONS[0])
    stop = whole[len(whole) // 2 :][:3]
    done = chat(served, "pirate", QUESTIONS[0], stop=[stop])
    assert done.choices[0].message.content == whole[: whole.index(stop)]
    assert done.choices[0].finish_reason == "stop"


def test_completions_of_token_ids(served: Served) -> None:
    """The other route: the ids of the conversation instead of its messages, streamed."""
    conversation = served.tokenizer.apply_chat_template(ask(QUESTIONS[1]), add_generation_prompt=True, tokenize=False)
    ids = served.tokenizer(conversation, add_special_tokens=False)["input_ids"]
    asked: dict[str, Any] = {"model": "json", "prompt": ids, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    chunks = list(served.client.completions.create(**asked, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == served.text("json", QUESTIONS[1])
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == len(ids)


def test_load_use_unload(served: Served) -> None:
    """Refused without a token, used as soon as it is loaded, gone after."""

    def call(route: str, token: str = ADMIN, **asked: str) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.post(f"{served.url}/v1/{route}_lora_adapter", json=asked, headers=headers, timeout=60).status_code

    with pytest.raises(openai.NotFoundError):
        chat(served, "telegram", QUESTIONS[0])
    assert call("load", "wrong", lora_name="telegram", lora_path="telegram") == 401
    assert call("load", lora_name="telegram", lora_path="../telegram") == 400
    assert call("load", lora_name="telegram", lora_path="telegram") == 200
    assert "telegram" in [model.id for model in served.client.models.list()]
    assert chat(served, "telegram", QUESTIONS[0]).choices[0].message.content == served.text("telegram", QUESTIONS[0])
    assert call("unload", lora_name="telegram") == 200
    with pytest.raises(openai.NotFoundError):
        chat(served, "telegram", QUESTIONS[0])


def test_concurrent_mixes(served: Served) -> None:
    """Twelve requests at once over four rows, with and without adapters."""
    asked = [((BASE, "pirate", "json")[index % 3], QUESTIONS[index % 2]) for index in range(12)]
    expected = [served.text(*one) for one in asked]
    assert len(set(expected)) == 6, "adapters must differ, or this test shows nothing"
    with ThreadPoolExecutor(12) as pool:
        done = list(pool.map(lambda one: chat(served, *one), asked))
    assert [one.choices[0].message.content for one in done] == expected


def test_health_and_metrics(served: Served) -> None:
    assert httpx.get(f"{served.url}/health", timeout=30).json() == {"status": "ok"}
    text = httpx.get(f"{served.url}/metrics").text
    assert 'running_lora_adapters="json,pirate"' in text
    assert 'bdlora_request_seconds_count{adapter="pirate"}' in text


def test_a_killed_rank_ends_all(served: Served) -> None:
    """Clients get an error event, `/health` turns 503, all processes exit, within 30 s each."""
    ranks = ranks_of(served.process)
    assert len(ranks) == 3
    stream = chat(served, "pirate", QUESTIONS[0], max_tokens=100, stream=True, extra_body={"ignore_eos": True})
    for _ in range(4):
        next(stream)
    ranks[2].kill()
    killed = time.monotonic()
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert not isinstance(caught.value, openai.APIConnectionError), "an event, not a connection that breaks"
    assert time.monotonic() - killed < 30
    assert httpx.get(f"{served.url}/health", timeout=10).status_code == 503
    assert served.process.wait(30) != 0
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
