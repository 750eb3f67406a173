"""OpenAI's own client against our routes; the engine follows a script."""

import json
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError

import bdlora_compile as bd
from bdlora_compile.serving.http.protocol import ChatRequest, CompletionRequest
from tests.serving.http.fake import BASE, FakeServer, until

PROMPT = "<5>"


def test_models_have_the_base_as_parent(client: openai.OpenAI) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert set(models) == {BASE, "math", "code"}
    assert (models[BASE]["parent"], models["math"]["parent"], models["math"]["root"]) == (None, BASE, BASE)
    assert client.models.retrieve("code").id == "code"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_completions(client: openai.OpenAI, server: FakeServer) -> None:
    done = client.completions.create(model="math", prompt=PROMPT, max_tokens=3, logprobs=2, temperature=0)
    assert done.object == "text_completion"
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("<10><11><12>", "length")
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["<10>", "<11>", "<12>"]
    assert logprobs.text_offset == [0, 4, 8]
    assert logprobs.top_logprobs == [{f"<{token}>": -0.5, "<3>": -1.5} for token in (10, 11, 12)]
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (1, 3, 4)
    assert server.engine.submitted[0].adapter == "math"
    assert "digest-of-ma" in (done.system_fingerprint or "")


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [("<5>", [(5,)]), (["<5>", "<6>"], [(5,), (6,)]), ([5, 6], [(5, 6)]), ([[5], [6, 7]], [(5,), (6, 7)])],
)
def test_the_four_kinds_of_prompt(client: openai.OpenAI, server: FakeServer, prompt: Any, ids: Any) -> None:
    done = client.completions.create(model=BASE, prompt=prompt, n=2, seed=7)
    assert [choice.index for choice in done.choices] == list(range(2 * len(ids)))
    assert [request.prompt for request in server.engine.submitted] == [one for one in ids for _ in range(2)]
    # The second choice of a prompt has the next seed.
    assert [request.sampling.seed for request in server.engine.submitted] == [7, 8] * len(ids)
    assert done.choices[0].text != done.choices[1].text


def test_chat_and_its_logprobs(client: openai.OpenAI, server: FakeServer) -> None:
    done = client.chat.completions.create(
        model="code",
        messages=[{"role": "developer", "content": "<8>"}, {"role": "user", "content": [{"type": "text", "text": ""}]}],
        logprobs=True,
        top_logprobs=1,
        max_completion_tokens=2,
        stop="<11>",
    )
    assert server.engine.submitted[0].prompt == (8,)
    choice = done.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("<10>", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    first = choice.logprobs.content[0]
    assert (first.token, first.logprob, first.bytes) == ("<10>", -0.5, list(b"<10>"))
    assert [one.token for one in first.top_logprobs] == ["<10>"]


def test_streams_are_what_whole_answers_are(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "math", "messages": [{"role": "user", "content": PROMPT}], "n": 3, "seed": 1}
    whole = client.chat.completions.create(**asked)
    texts, reasons, usage = ["", "", ""], {}, None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        assert usage is None, "the usage is the last chunk"
        usage = chunk.usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == {0: "length", 1: "length", 2: "length"}
    assert usage == whole.usage


def test_events_on_the_wire(server: FakeServer) -> None:
    body = {"model": BASE, "prompt": PROMPT, "stream": True, "max_tokens": 1}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: {") for line in lines[:-1])
    assert lines[-1] == "data: [DONE]"
    assert not any('"usage"' in line for line in lines)


UNSUPPORTED = [
    ("completions", {"echo": True}),
    ("completions", {"best_of": 2}),
    ("completions", {"suffix": "x"}),
    ("completions", {"logit_bias": {"5": 1}}),
    ("completions", {"frequency_penalty": 0.5}),
    ("chat", {"presence_penalty": 1}),
    ("chat", {"tools": [{"type": "function"}]}),
    ("chat", {"response_format": {"type": "json_object"}}),
    ("chat", {"reasoning_effort": "low"}),
    ("chat", {"top_logprobs": 2}),
    ("chat", {"stream_options": {"include_usage": True}}),
    ("chat", {"min_p": 0.1}),
    ("chat", {"n": 0}),
    ("chat", {"n": 129}),
    ("chat", {"max_tokens": 0}),
    ("chat", {"temperature": -1}),
    ("chat", {"top_p": 0}),
    ("chat", {"stop": ["a"] * 17}),
    ("completions", {"stop": ""}),
    ("completions", {"prompt": []}),
    ("completions", {"prompt": [-1]}),
    ("completions", {"prompt": [128]}),
    ("completions", {"seed": 2**63}),
    ("completions", {"prompt": "\ud800"}),
    ("chat", {"messages": []}),
    ("chat", {"messages": [{"role": "tool", "content": "x"}]}),
]


@pytest.mark.parametrize(("kind", "field"), UNSUPPORTED, ids=str)
def test_what_cannot_be_honoured_is_refused_by_name(server: FakeServer, kind: str, field: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": BASE}
    asked |= {"prompt": PROMPT} if kind == "completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    path = "completions" if kind == "completions" else "chat/completions"
    # httpx would refuse half of a surrogate pair itself.
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/{path}", content=json.dumps(asked | field), headers=headers)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == next(iter(field))
    assert error["param"] in error["message"]


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("chat", {"messages": [{}] * 10_000}),
        ("chat", {"messages": [{"role": "user", "content": [{}] * 10_000}]}),
        ("completions", {"prompt": [""] * 10_000}),
        ("completions", {"prompt": [-1] * 10_000}),
        ("completions", {"prompt": [[]] * 10_000}),
        ("completions", dict.fromkeys(map(str, range(10_000)))),
    ],
    ids=["messages", "parts", "texts", "ids", "lists", "fields"],
)
def test_what_is_wrong_many_times_is_told_once(kind: str, field: dict[str, Any]) -> None:
    """Pydantic would tell it as often, in each branch of a union, for minutes in which no other thread runs."""
    body = ChatRequest if kind == "chat" else CompletionRequest
    asked = {"model": BASE, "prompt": PROMPT} if kind == "completions" else {"model": BASE}
    with pytest.raises(ValidationError) as refused:
        body.model_validate(asked | field)
    assert refused.value.error_count() < 16


def test_answers_of_too_many_logprobs_are_refused(server: FakeServer) -> None:
    """In one piece: it is written in one go. Events may be as many."""
    asked: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": PROMPT}]}
    asked |= {"logprobs": True, "top_logprobs": 20, "max_tokens": 2000, "n": 16}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "logprobs"
    assert "set max_tokens, ask for fewer, or set stream" in answer.json()["error"]["message"]


def test_values_that_ask_for_nothing_are_taken(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model=BASE,
        messages=[
            {"role": "user", "content": PROMPT},
            {"role": "assistant", "content": "x", "refusal": None, "tool_calls": []},
        ],
        frequency_penalty=0.0,
        presence_penalty=0,
        logit_bias={},
        response_format={"type": "text"},
        store=False,
        tools=[],
        user="somebody",
        extra_body={"top_k": -1, "ignore_eos": True, "stop_token_ids": [3]},
    )
    assert done.choices[0].finish_reason == "length"


def refusal(kind: type[bd.BdloraError]) -> bd.BdloraError:
    return kind("request", found="x", expected="y", remedy="do z")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (bd.UnknownAdapterError, openai.NotFoundError),
        (bd.RequestError, openai.BadRequestError),
        (bd.QueueFullError, openai.RateLimitError),
        (bd.EngineClosedError, openai.InternalServerError),
        (bd.LostRankError, openai.InternalServerError),
    ],
)
def test_what_the_engine_refuses(
    client: openai.OpenAI, server: FakeServer, kind: type[bd.BdloraError], expected: type[openai.APIStatusError]
) -> None:
    server.engine.refusal = refusal(kind)
    with pytest.raises(expected) as caught:
        client.completions.create(model=BASE, prompt=PROMPT)
    assert "do z" in caught.value.message
    if expected is openai.RateLimitError:
        assert caught.value.response.headers["retry-after"] == "1"


def test_a_refused_choice_takes_the_others_along(server: FakeServer, client: openai.OpenAI) -> None:
    """All completions of a request run, or none."""
    server.engine.is_held = True
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=BASE, prompt=[[5], [200]])
    assert all(stream.is_cancelled for stream in server.engine.held)


def test_an_error_while_streaming_is_an_event(client: openai.OpenAI, server: FakeServer) -> None:
    server.engine.ending = refusal(bd.LostRankError)
    chunks = client.completions.create(model=BASE, prompt=PROMPT, stream=True)
    with pytest.raises(openai.APIError, match="do z"):
        list(chunks)
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model=BASE, prompt=PROMPT)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_hangs_up_cancels(server: FakeServer, is_streamed: bool) -> None:
    server.engine.is_held = True
    body = {"model": BASE, "prompt": [[5], [6]], "stream": is_streamed}
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=0.3) as answer,
    ):
        list(answer.iter_lines())
    until(lambda: len(server.engine.held) == 2 and all(stream.is_cancelled for stream in server.engine.held))


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_request_that_takes_too_long_is_ended(server: FakeServer, is_streamed: bool) -> None:
    server.engine.is_held = True
    body = {"model": BASE, "prompt": PROMPT, "stream": is_streamed}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=20)
    assert answer.status_code == (200 if is_streamed else 504)
    assert '"code":"timeout"' in answer.text
    assert server.engine.held[0].is_cancelled


def test_health_runs_a_step_and_tells_of_the_end(server: FakeServer) -> None:
    before = server.engine.checks
    assert [httpx.get(f"{server.url}/health").status_code for _ in range(3)] == [200] * 3
    assert server.engine.checks <= before + 1, "the answer is kept for a while"
    server.service.is_draining = True
    answer = httpx.get(f"{server.url}/health")
    assert (answer.status_code, answer.json()) == (503, {"status": "draining"})
    refused = httpx.post(f"{server.url}/v1/completions", json={"model": BASE, "prompt": PROMPT})
    assert refused.status_code == 503
    server.engine.failed = refusal(bd.LostRankError)
    assert httpx.get(f"{server.url}/health").json() == {"status": "failed"}
