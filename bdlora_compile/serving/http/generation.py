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
        # Long texts take milliseconds to encode; other requests go on meanwhile.
        prompts = await asyncio.to_thread(_prompts, service.words, body)
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
    return Job(body.model, adapter, prompts, sampling, body.choices, body.is_streamed, body.wants_usage, form)


def _prompts(words: Words, body: CompletionRequest) -> list[tuple[int, ...]]:
    """Token ids of each prompt, whichever of OpenAI's four forms it has."""
    found = body.prompt
    several: list[Any] = [found] if isinstance(found, str) or isinstance(found[0], int) else list(found)
    return [words.encode(one) if isinstance(one, str) else tuple(one) for one in several]
