"""Requests in OpenAI's form. Each field is honoured, or may only have the value that asks for nothing.

A field of OpenAI's that this server cannot honour is declared with `Only`: it names the values that change nothing,
and any other one is refused by the field's name. Fields that nobody declared are refused as well.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from bdlora_compile.serving.requests import MAX_LOGPROBS, SamplingParams

_MAX_N = 128
_MAX_STOPS = 16
_MAX_FIELDS = 64
"""More than any request has."""
_NAME = "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
"""As `AdapterSet` has it: names go into logs and metrics."""


def _only(*values: object) -> Any:
    """The annotation of a field that may have these values alone."""

    def check(value: object) -> object:
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values):
            allowed = " or ".join(repr(one) for one in values)
            raise ValueError(f"is not supported here; leave it out (allowed: {allowed})")
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": list(values)})]


class _Body(BaseModel):
    """An object of a request.

    One error is enough for who sent it: what is wrong a million times must not be told a million times, which takes
    minutes in which no other thread runs. So lists of unlimited length end with their first error (``fail_fast``).
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise ValueError(f"{len(value)} fields, of at most {_MAX_FIELDS}")
        return value


class StreamOptions(_Body):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: _only(False, None) = None  # type: ignore[valid-type]


class _Sampled(_Body):
    """What both kinds of request have in common."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=_MAX_N)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(fail_fast=True, max_length=_MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # vLLM's.
    top_k: int | None = Field(None, ge=-1)
    stop_token_ids: Annotated[list[int], Field(fail_fast=True, max_length=_MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    # Not honoured.
    frequency_penalty: _only(0, None) = None  # type: ignore[valid-type]
    presence_penalty: _only(0, None) = None  # type: ignore[valid-type]
    logit_bias: _only({}, None) = None  # type: ignore[valid-type]

    @property
    def choices(self) -> int:
        """Completions of each prompt."""
        return self.n or 1

    @property
    def is_streamed(self) -> bool:
        """Whether the answer comes as events."""
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        """Whether a streamed answer ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            # vLLM writes all tokens as -1 too.
            top_k=max(self.top_k or 0, 0),
            stop=tuple(stops),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            seed=self.seed,
            logprobs=logprobs,
            ignore_eos=bool(self.ignore_eos),
        )


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, min_length=1)]


class CompletionRequest(_Sampled):
    """Body of ``/v1/completions``."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | TokenIds
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True, min_length=1)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1)]
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: _only(1, None) = None  # type: ignore[valid-type]
    echo: _only(False, None) = None  # type: ignore[valid-type]
    suffix: _only("", None) = None  # type: ignore[valid-type]

    def sampling(self, max_length: int) -> SamplingParams:
        """For the engine; 16 tokens unless more are asked for, as OpenAI has it."""
        return self._sampling(self.max_tokens or 16, self.logprobs)


class TextPart(_Body):
    """A part of a message; text is the only kind."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None
    # What an assistant's message has beside its text when it is sent back.
    refusal: _only(None) = None  # type: ignore[valid-type]
    annotations: _only([], None) = None  # type: ignore[valid-type]
    audio: _only(None) = None  # type: ignore[valid-type]
    function_call: _only(None) = None  # type: ignore[valid-type]
    tool_calls: _only([], None) = None  # type: ignore[valid-type]

    def for_template(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        # Templates know the older name of this role.
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content} | ({} if self.name is None else {"name": self.name})


class ChatRequest(_Sampled):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    store: _only(False, None) = None  # type: ignore[valid-type]
    metadata: _only({}, None) = None  # type: ignore[valid-type]
    service_tier: _only("auto", "default", None) = None  # type: ignore[valid-type]
    modalities: _only(["text"], None) = None  # type: ignore[valid-type]
    response_format: _only({"type": "text"}, None) = None  # type: ignore[valid-type]
    tools: _only([], None) = None  # type: ignore[valid-type]
    tool_choice: _only("none", None) = None  # type: ignore[valid-type]
    functions: _only([], None) = None  # type: ignore[valid-type]
    function_call: _only("none", None) = None  # type: ignore[valid-type]
    audio: _only(None) = None  # type: ignore[valid-type]
    prediction: _only(None) = None  # type: ignore[valid-type]
    reasoning_effort: _only(None) = None  # type: ignore[valid-type]
    verbosity: _only(None) = None  # type: ignore[valid-type]
    web_search_options: _only(None) = None  # type: ignore[valid-type]

    def sampling(self, max_length: int) -> SamplingParams:
        """For the engine; as many tokens as there is room for unless fewer are asked for."""
        tokens = self.max_completion_tokens or self.max_tokens or max_length
        return self._sampling(tokens, (self.top_logprobs or 0) if self.logprobs else None)


class LoadRequest(_Body):
    """Body of ``/v1/load_lora_adapter``, as vLLM's: ``lora_path`` lies below an adapter root of the server."""

    lora_name: str = Field(pattern=_NAME)
    lora_path: str
    load_inplace: bool = False


class UnloadRequest(_Body):
    """Body of ``/v1/unload_lora_adapter``, as vLLM's."""

    lora_name: str
    lora_int_id: _only(None) = None  # type: ignore[valid-type]
