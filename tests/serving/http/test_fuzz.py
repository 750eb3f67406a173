"""Requests that schemathesis makes up from our OpenAPI document: no 500, and answers as the document says."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from bdlora_compile.serving.engine import Engine
from bdlora_compile.serving.http.app import build
from bdlora_compile.serving.http.server import service_of
from bdlora_compile.serving.http.settings import ServeSettings, Tokens
from tests.serving.conftest import SPEC, World, tokenizer_of
from tests.serving.http.fake import ADMIN, BASE, TEMPLATE, fake_service

schema = schemathesis.openapi.from_asgi("/openapi.json", build(fake_service()[1]))
CHECKS = [
    schemathesis.checks.not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


as_usual = settings(
    max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck)
)


@schema.parametrize()
@as_usual
def test_no_request_is_a_server_error(case: Any) -> None:
    case.call_and_validate(checks=CHECKS, headers={"Authorization": f"Bearer {ADMIN}"})


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_no_request_ends_the_engine(shared_engine: Engine, world: World, route: str) -> None:
    """Over the real engine: whatever is accepted is computed. All name its model, so that they come that far."""
    options = ServeSettings.of(None, {"model": "unused", "served_name": BASE, "request_timeout": 20})
    tokenizer = tokenizer_of(SPEC.vocabulary)
    tokenizer.chat_template = TEMPLATE
    service = service_of(shared_engine, world.adapters, tokenizer, options, Tokens.model_validate({}))
    operation = schemathesis.openapi.from_asgi("/openapi.json", build(service))[f"/v1/{route}"]["POST"]

    @settings(as_usual, max_examples=12)
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body["model"] = BASE
        case.call_and_validate(checks=CHECKS)
        assert shared_engine.failed is None

    before = shared_engine.stats().generated_tokens
    ask()
    assert shared_engine.stats().generated_tokens > before, "all were refused"
