"""One answer from several streams: whole, or as server-sent events."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fastapi.responses import JSONResponse
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bdlora_compile.serving.http.errors import ApiError, failed_request
from bdlora_compile.serving.http.service import Service
from bdlora_compile.serving.http.streams import ClientGone, merged, while_connected
from bdlora_compile.serving.requests import Event, Finished, Request, SamplingParams, Token, Usage
from bdlora_compile.serving.stream import Stream

_LOG = logging.getLogger("bdlora_compile.http")
_DONE = b"data: [DONE]\n\n"
_HUNG_UP = 499
"""Written into the log for a client that hung up; nobody receives it."""


class Form(Protocol):
    """How tokens look in one of OpenAI's two kinds of answer. Indices are those of choices."""

    prefix: str
    whole_object: str
    chunk_object: str

    def begin(self, index: int) -> Mapping[str, Any] | None:
        """The choice of the first chunk, where there is one before any token."""

    def part(self, index: int, token: Token) -> Mapping[str, Any]:
        """The choice of a chunk with one token."""

    def end(self, index: int, reason: str) -> Mapping[str, Any]:
        """The choice of the last chunk."""

    def whole(self, index: int, tokens: Sequence[Token], reason: str) -> Mapping[str, Any]:
        """A choice of a whole answer."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a request asks for.

    Attributes:
        model: as the client named it.
        adapter: None for the base model.
        prompts: token ids of each.
        sampling: of all completions.
        choices: completions of each prompt.
        is_streamed: whether events are wanted.
        wants_usage: whether these end with the usage.
        form: OpenAI's kind of answer.
    """

    model: str
    adapter: str | None
    prompts: Sequence[tuple[int, ...]]
    sampling: SamplingParams
    choices: int
    is_streamed: bool
    wants_usage: bool
    form: Form

    def requests(self) -> list[Request]:
        """For the engine; the choices of a prompt with a seed have this seed and those that follow it."""
        return [
            Request(prompt, self.adapter, self._seeded(number))
            for prompt in self.prompts
            for number in range(self.choices)
        ]

    def _seeded(self, number: int) -> SamplingParams:
        seed = self.sampling.seed
        if seed is None or not number:
            return self.sampling
        return replace(self.sampling, seed=(seed + number + 2**63) % 2**64 - 2**63)


async def answer(service: Service, http: HttpRequest, job: Job) -> Response:
    """The answer to a request that was understood; nothing of it is left in the engine, however it ends.

    Raises:
        ApiError, BdloraError: it is refused, or failed before its first byte was sent.
    """
    fingerprint = service.fingerprint(job.adapter)
    streams = service.submit_all(job.requests())
    run = Run(service, job, streams, fingerprint)
    if job.is_streamed:
        return EventStream(run)
    return await _whole(run, http)


class Run:
    """Streams of one request while they are read.

    Args:
        service: whose engine they come from.
        job: what was asked for.
        streams: one for each choice.
        fingerprint: of what computes them.
    """

    def __init__(self, service: Service, job: Job, streams: Sequence[Stream], fingerprint: str) -> None:
        self.job = job
        self.streams = streams
        self.seconds = service.settings.request_timeout
        self._head = {"id": f"{job.form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": job.model}
        self._fingerprint = fingerprint
        self._meters = [service.metrics.meter(job.adapter) for _ in streams]
        self._ends: dict[int, Finished] = {}
        self._start = time.monotonic()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Events of all choices.

        Raises:
            ApiError: one ended with an error.
        """
        async for index, event in merged(self.streams):
            self._meters[index].see(event)
            if isinstance(event, Finished):
                self._ends[index] = event
                if event.reason in ("error", "cancelled"):
                    raise failed_request(event.error)
            yield index, event

    def document(self, kind: str, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """An answer, or a chunk of one."""
        return {**self._head, "object": kind, "system_fingerprint": self._fingerprint, "choices": choices, **more}

    def usage(self) -> dict[str, int]:
        """Tokens of all choices; a prompt counts once."""
        prompt = sum(len(prompt) for prompt in self.job.prompts)
        completion = sum(end.usage.completion_tokens for end in self._ends.values())
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def close(self, status: int) -> None:
        """Leave nothing in the engine, and one line in the log. Only names of known models come here."""
        for index, stream in enumerate(self.streams):
            if index not in self._ends:
                stream.cancel()
                self._meters[index].see(Finished("cancelled", Usage(len(stream.request.prompt), 0)))
        usage = self.usage()
        _LOG.info(
            "%s %s model=%s choices=%d prompt_tokens=%d completion_tokens=%d seconds=%.3f",
            self._head["id"],
            status,
            self.job.model,
            len(self.streams),
            usage["prompt_tokens"],
            usage["completion_tokens"],
            time.monotonic() - self._start,
        )


async def _whole(run: Run, http: HttpRequest) -> Response:
    tokens: list[list[Token]] = [[] for _ in run.streams]
    reasons: dict[int, str] = {}

    async def read() -> None:
        async for index, event in run.events():
            if isinstance(event, Token):
                tokens[index].append(event)
            else:
                reasons[index] = event.reason

    status = _HUNG_UP
    try:
        await while_connected(http.receive, read(), run.seconds)
        form = run.job.form

        def written() -> Response:
            choices = [form.whole(index, tokens[index], reasons[index]) for index in range(len(tokens))]
            return JSONResponse(run.document(form.whole_object, choices, usage=run.usage()))

        # Long ones take seconds; other requests are answered meanwhile.
        response = await asyncio.to_thread(written)
        status = 200
        return response
    except ClientGone:
        # Nobody reads this.
        return Response(status_code=status)
    except ApiError as error:
        status = error.status
        raise
    except TimeoutError:
        status = 504
        raise _too_slow(run.seconds) from None
    finally:
        run.close(status)


class EventStream(Response):
    """Server-sent events of a run. An error after the first byte is an event, as OpenAI's clients expect it.

    Args:
        run: what is streamed.
    """

    media_type = "text/event-stream"

    def __init__(self, run: Run) -> None:
        # Proxies must pass events on as they come.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, or stop when the client is gone."""

        async def body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async def send_all() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for chunk in self._chunks():
                    await body(_event(chunk))
            except ApiError as error:
                await body(_event(error.body.model_dump()))
            await body(_DONE, more=False)

        status = _HUNG_UP
        try:
            await while_connected(receive, send_all(), self._run.seconds)
            status = 200
        except TimeoutError:
            status = 504
            # A client that reads nothing does not read this either.
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await body(_event(_too_slow(self._run.seconds).body.model_dump()))
                    await body(_DONE, more=False)
        except (ClientGone, OSError):
            pass  # nobody reads any more
        finally:
            self._run.close(status)

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        run, form = self._run, self._run.job.form
        # OpenAI's chunks have the field if the last one is to have a value.
        usage: dict[str, Any] = {"usage": None} if run.job.wants_usage else {}
        for index in range(len(run.streams)):
            first = form.begin(index)
            if first is not None:
                yield run.document(form.chunk_object, [first], **usage)
        async for index, event in run.events():
            if isinstance(event, Finished):
                yield run.document(form.chunk_object, [form.end(index, event.reason)], **usage)
            elif event.text or event.logprob is not None:
                yield run.document(form.chunk_object, [form.part(index, event)], **usage)
        if run.job.wants_usage:
            yield run.document(form.chunk_object, [], usage=run.usage())


def _event(document: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _too_slow(seconds: float) -> ApiError:
    return ApiError(504, f"the request was not done after {seconds:g} s and was cancelled", code="timeout")
