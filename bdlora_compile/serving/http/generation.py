"""The routes that generate: ``/v1/completions`` and ``/v1/chat/completions``."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from bdlora_compile.serving.http.answers import Job, answer
from bdlora_compile.serving.http.errors import RESPONSES, ApiError
from bdlora_compile.serving.http.forms import ChatForm, CompletionForm
from bdlora_compile.serving.http.protocol import ChatRequest, CompletionRequest
from bdlora_compile.serving.http.service import Service
from bdlora_compile.serving.http.words import Words
from bdlora_compile.serving.requests import SamplingParams

_MAX_WHOLE_LOGPROBS = 1 << 18
"""Two seconds of a CPU core."""

_ANSWERS: dict[int | str, dict[str, Any]] = {
    **RESPONSES,
    200: {
        "description": "A whole answer, or events of one.",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
}


def router(service: Service) -> APIRouter:
    """The routes over a service."""
    routes = APIRouter()

    @routes.post("/v1/completions", responses=_ANSWERS, response_model=None)
    async def complete(body: CompletionRequest, http: Request) -> Response:
        """Continue one or several prompts."""
        adapter = _admit(service, body)
        several = _several(body)
        _check_choices(len(several), body.choices, service.settings.max_choices)
        # Long texts take seconds to encode; other requests go on meanwhile.
        prompts = await asyncio.to_thread(_encoded, service.words, several)
        form = CompletionForm(service.words, body.logprobs is not None)
        return await answer(service, http, _job(service, body, adapter, prompts, form))

    @routes.post("/v1/chat/completions", responses=_ANSWERS, response_model=None)
    async def chat(body: ChatRequest, http: Request) -> Response:
        """Continue a conversation."""
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: found without logprobs; set logprobs to true", param="top_logprobs")
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise ApiError(400, "max_tokens: differs from max_completion_tokens; give one of them", param="max_tokens")
        adapter = _admit(service, body)
        _check_choices(1, body.choices, service.settings.max_choices)
        messages = [message.for_template() for message in body.messages]
        prompt = await asyncio.to_thread(service.words.encode_chat, messages)
        form = ChatForm(service.words, bool(body.logprobs))
        return await answer(service, http, _job(service, body, adapter, [prompt], form))

    return routes


def _admit(service: Service, body: CompletionRequest | ChatRequest) -> str | None:
    """The adapter of a request; checks that say no before the prompt is encoded."""
    if service.is_draining:
        raise ApiError(503, "the server shuts down; send the request to another replica", code="unavailable")
    if body.stream_options is not None and not body.is_streamed:
        raise ApiError(400, "stream_options: found without stream; set stream to true", param="stream_options")
    return service.adapter_of(body.model)


def _job(
    service: Service,
    body: CompletionRequest | ChatRequest,
    adapter: str | None,
    prompts: list[tuple[int, ...]],
    form: CompletionForm | ChatForm,
) -> Job:
    sampling = body.sampling(service.settings.max_length)
    if not body.is_streamed:
        _check_size(len(prompts) * body.choices, sampling)
    return Job(body.model, adapter, prompts, sampling, body.choices, body.is_streamed, body.wants_usage, form)


def _check_choices(prompts: int, each: int, limit: int) -> None:
    if prompts * each > limit:
        raise ApiError(
            400,
            f"n: found {prompts} prompts times {each}, expected at most {limit} completions; send several requests",
            param="n",
            code="invalid_value",
        )


def _check_size(choices: int, sampling: SamplingParams) -> None:
    """An answer in one piece is written in one go, in which no other thread runs."""
    if sampling.logprobs is None:
        return
    most = choices * sampling.max_tokens * (sampling.logprobs + 1)
    if most > _MAX_WHOLE_LOGPROBS:
        raise ApiError(
            400,
            f"logprobs: found up to {most} of them in one answer ({choices} completions of {sampling.max_tokens} "
            f"tokens), expected at most {_MAX_WHOLE_LOGPROBS}; set max_tokens, ask for fewer, or set stream",
            param="logprobs",
        )


def _several(body: CompletionRequest) -> list[Any]:
    """The prompts, whichever of OpenAI's four forms they have."""
    found = body.prompt
    return [found] if isinstance(found, str) or isinstance(found[0], int) else list(found)


def _encoded(words: Words, several: list[Any]) -> list[tuple[int, ...]]:
    """Token ids of each prompt."""
    return [words.encode(one) if isinstance(one, str) else tuple(one) for one in several]
