"""What all routes share: the engine, the names of models, the tokenizer, the settings, the metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bdlora_compile.errors import BdloraError, UnknownAdapterError
from bdlora_compile.runtime.adapter_roots import AdapterRoots
from bdlora_compile.runtime.adapter_version import AdapterInfo
from bdlora_compile.serving.http.errors import ApiError, printable
from bdlora_compile.serving.http.metrics import Metrics
from bdlora_compile.serving.http.settings import ServeSettings, Tokens
from bdlora_compile.serving.http.words import Words
from bdlora_compile.serving.requests import Request
from bdlora_compile.serving.stats import EngineStats
from bdlora_compile.serving.stream import Stream
from bdlora_compile.version import __version__


class Serves(Protocol):
    """What the routes need of `serving.engine.Engine`."""

    @property
    def failed(self) -> BdloraError | None: ...
    def submit(self, request: Request) -> Stream: ...
    def check(self, timeout: float | None = None) -> float: ...
    def stats(self) -> EngineStats: ...
    def load_adapter(self, name: str, path: str | Path) -> AdapterInfo: ...
    def unload_adapter(self, name: str) -> None: ...


class KnowsAdapters(Protocol):
    """What the routes need of `AdapterSet`."""

    @property
    def names(self) -> tuple[str, ...]: ...
    def __contains__(self, name: object) -> bool: ...
    def __getitem__(self, name: str) -> AdapterInfo: ...
    def version(self, name: str) -> str: ...
    def stats(self) -> Any: ...


@dataclass(slots=True)
class Service:
    """One served model.

    Attributes:
        engine: runs requests.
        adapters: known adapters.
        words: text and token ids.
        settings, tokens: what the operator said.
        metrics: what is counted.
        created: Unix time of the start.
        is_draining: whether the server was told to end.
    """

    engine: Serves
    adapters: KnowsAdapters
    words: Words
    settings: ServeSettings
    tokens: Tokens
    metrics: Metrics
    created: int
    is_draining: bool = False
    loaded: dict[str, int] = field(default_factory=dict)
    """Unix time of each load that a request asked for."""

    @property
    def roots(self) -> AdapterRoots:
        """Where the admin routes find adapters."""
        return AdapterRoots(*self.settings.adapter_roots)

    def adapter_of(self, model: str) -> str | None:
        """The adapter of a model's name; None for the base model.

        Raises:
            ApiError: 404.
        """
        if model == self.settings.base_name:
            return None
        if model in self.adapters:
            return model
        shown = printable(model[:80])
        raise ApiError(404, f"The model `{shown}` does not exist.", param="model", code="model_not_found")

    def fingerprint(self, adapter: str | None) -> str:
        """OpenAI's system_fingerprint: with the same one, and the same seed, the same tokens are drawn."""
        if adapter is None:
            return f"bdlora-{__version__}"
        try:
            return f"bdlora-{__version__}-{self.adapters.version(adapter)[:12]}"
        except UnknownAdapterError:
            raise ApiError(
                404, f"The model `{adapter}` does not exist.", param="model", code="model_not_found"
            ) from None

    def submit_all(self, requests: Sequence[Request]) -> list[Stream]:
        """Queue all requests, or none of them.

        Raises:
            BdloraError: the engine refused one.
        """
        streams: list[Stream] = []
        try:
            for request in requests:
                streams.append(self.engine.submit(request))
        except BaseException:
            cancel_all(streams)
            raise
        return streams


def cancel_all(streams: Sequence[Stream]) -> None:
    """End what nobody reads any more."""
    for stream in streams:
        stream.cancel()


def model_card(name: str, parent: str | None, base: str, created: int) -> Mapping[str, object]:
    """An entry of ``/v1/models``. Adapters have the base model as parent; paths of the machine are not told."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "bdlora_compile",
        "root": base,
        "parent": parent,
    }
