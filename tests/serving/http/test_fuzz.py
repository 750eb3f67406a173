"""Requests that schemathesis makes up from our OpenAPI document: no 500, and answers as the document says."""

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from bdlora_compile.serving.http.app import build
from tests.serving.http.fake import ADMIN, fake_service

schema = schemathesis.openapi.from_asgi("/openapi.json", build(fake_service()[1]))
CHECKS = [
    schemathesis.checks.not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@schema.parametrize()
@settings(
    max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck)
)
def test_no_request_is_a_server_error(case: Any) -> None:
    case.call_and_validate(checks=CHECKS, headers={"Authorization": f"Bearer {ADMIN}"})
