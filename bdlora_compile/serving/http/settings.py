"""What a server is told: by flags, by a file, and, for secrets alone, by the environment."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from bdlora_compile.errors import ConfigError
from bdlora_compile.strategy import Strategy


class ServeSettings(BaseModel):
    """Everything but secrets. A field that has a flag is named as the flag.

    Attributes:
        model: folder, or id on the hub.
        tp: ranks.
        adapters: PEFT folders by name.
        served_name: name of the base model in requests; that of its folder by default.
        host, port: where HTTP is served; port 0 takes a free one.
        adapter_roots: folders below which the admin routes find adapters.
        max_adapters, max_rank, max_local_rank, target_modules, pool_bytes, host_bytes, strategy: as in
            `bdlora_compile.load`.
        inner: "eager" or "inductor"; the device's default if None.
        max_rows, max_length, max_waiting, max_waiting_per_adapter: as in `serving.engine.Engine`.
        step_timeout: seconds after which a step counts as hung, and a rank that says nothing as lost.
        max_body_bytes: of a request.
        body_timeout: seconds that a client has for sending a request's body.
        request_timeout: seconds from a request's arrival to its last byte.
        drain_timeout: seconds that running requests have after SIGTERM.
        max_choices: completions of one request: prompts times n.
        health_seconds: how long the answer of `/health` is kept.
        metrics_adapters: adapters with time series of their own; all others share one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    tp: int = Field(1, ge=1)
    adapters: dict[str, str] = {}
    served_name: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    adapter_roots: tuple[str, ...] = ()
    max_adapters: int | None = Field(None, ge=1)
    max_rank: int | None = Field(None, ge=1)
    max_local_rank: int | None = Field(None, ge=1)
    target_modules: tuple[str, ...] | None = None
    pool_bytes: int | None = Field(None, ge=1)
    host_bytes: int | None = Field(None, ge=0)
    strategy: Strategy = "local"
    inner: str | None = Field(None, pattern="^(eager|inductor)$")
    max_rows: int = Field(16, ge=1)
    max_length: int = Field(2048, ge=2)
    max_waiting: int = Field(1024, ge=1)
    max_waiting_per_adapter: int = Field(256, ge=1)
    step_timeout: float = Field(20.0, gt=0)
    max_body_bytes: int = Field(4_000_000, ge=1)
    body_timeout: float = Field(30.0, gt=0)
    request_timeout: float = Field(600.0, gt=0)
    drain_timeout: float = Field(60.0, ge=0)
    max_choices: int = Field(128, ge=1)
    health_seconds: float = Field(2.0, ge=0)
    metrics_adapters: int = Field(100, ge=0)

    @property
    def base_name(self) -> str:
        """Name of the base model in requests. The folder's path is nobody's business."""
        if self.served_name is not None:
            return self.served_name
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model

    @model_validator(mode="after")
    def _names_differ(self) -> "ServeSettings":
        if self.base_name in self.adapters:
            raise ValueError(f"an adapter has the name of the base model, {self.base_name!r}; choose another one")
        return self

    @classmethod
    def of(cls, file: Path | None, flags: Mapping[str, Any]) -> "ServeSettings":
        """Settings of a TOML file with the flags that were given (not None) on top; adapters of both are joined.

        Raises:
            ConfigError: the file cannot be read, or a field is unknown or out of range.
        """
        found = _read(file) if file else {}
        given = {name: value for name, value in flags.items() if value is not None}
        adapters = {**_table(found.get("adapters")), **given.pop("adapters", {})}
        try:
            return cls.model_validate({**found, **given, "adapters": adapters})
        except ValidationError as error:
            raise _config_error("bdlora serve", error) from None


class Tokens(BaseSettings):
    """Secrets: they come from the environment (or from files of these names, with ``secrets_dir``), never from flags.

    Attributes:
        api_key: BDLORA_API_KEY: what requests to /v1 must bring; anybody may ask if it is not set.
        admin_token: BDLORA_ADMIN_TOKEN: opens the routes that load and unload adapters; there are none without it.
    """

    model_config = SettingsConfigDict(env_prefix="BDLORA_", frozen=True)

    api_key: SecretStr | None = Field(None, min_length=8)
    admin_token: SecretStr | None = Field(None, min_length=16)

    @model_validator(mode="after")
    def _differ(self) -> "Tokens":
        if self.admin_token is not None and self.admin_token == self.api_key:
            raise ValueError("the admin token is the key of all users; choose another one")
        return self

    @classmethod
    def of_environment(cls) -> "Tokens":
        """The tokens of this process.

        Raises:
            ConfigError: one is too short, or both are the same. The message does not hold them.
        """
        try:
            return cls()  # type: ignore[call-arg]  # fields come from the environment
        except ValidationError as error:
            raise _config_error("BDLORA_", error) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            str(file), found=str(error), expected="a TOML file with the names of flags", remedy="correct it"
        ) from None


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _config_error(where: str, error: ValidationError) -> ConfigError:
    first = error.errors(include_input=False, include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return ConfigError(
            f"{where} {field}",
            found="an unknown setting",
            expected=f"one of {', '.join(ServeSettings.model_fields)}",
            remedy="correct its name",
        )
    return ConfigError(
        f"{where} {field}".strip(),
        found="a value that cannot be honoured",
        expected=first["msg"],
        remedy="correct it, or leave it out for the default",
    )
