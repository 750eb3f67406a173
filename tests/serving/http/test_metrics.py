"""What Prometheus and Kubernetes' gateway read."""

import openai
from prometheus_client.parser import text_string_to_metric_families

from bdlora_compile.serving.http.metrics import BASE_LABEL, OTHER_LABEL, Metrics
from bdlora_compile.serving.requests import Finished, Token, Usage
from tests.serving.http.fake import BASE, FakeServer, fake_service


def samples(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Values of a metric by its labels' values."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if sample.name == name
    }


def run_one(metrics: Metrics, adapter: str | None) -> None:
    meter = metrics.meter(adapter)
    for token in range(3):
        meter.see(Token(token, "x"))
    meter.see(Finished("stop", Usage(1, 3)))


def test_labels_are_bounded() -> None:
    """A thousand adapters make as many series as two do."""
    _, service = fake_service(metrics_adapters=2)
    for name in [None, *(f"adapter-{index}" for index in range(1000))]:
        run_one(service.metrics, name)
    found = samples(service.metrics, "bdlora_request_seconds_count")
    assert found == {(BASE_LABEL,): 1, ("adapter-0",): 1, ("adapter-1",): 1, (OTHER_LABEL,): 998}
    assert samples(service.metrics, "bdlora_requests_total")[(OTHER_LABEL, "stop")] == 998


def test_an_unloaded_adapter_gives_its_label_back() -> None:
    _, service = fake_service(metrics_adapters=1)
    for index in range(50):
        run_one(service.metrics, f"adapter-{index}")
        service.metrics.forget(f"adapter-{index}")
    service.metrics.forget("never-seen")
    run_one(service.metrics, "last")
    assert samples(service.metrics, "bdlora_request_seconds_count") == {("last",): 1}
    assert samples(service.metrics, "bdlora_requests_total") == {("last", "stop"): 1}


def test_requests_that_outlive_their_adapter_take_no_label() -> None:
    """Its rows finish after the unload, when another one may have the place; a name that comes back has its own."""
    _, service = fake_service(metrics_adapters=1)
    late = service.metrics.meter("old")
    service.metrics.forget("old")
    late.see(Finished("stop", Usage(1, 0)))
    run_one(service.metrics, "new")
    assert samples(service.metrics, "bdlora_requests_total") == {(OTHER_LABEL, "stop"): 1, ("new", "stop"): 1}


def test_latencies_are_counted(client: openai.OpenAI, server: FakeServer) -> None:
    metrics = server.service.metrics
    before = samples(metrics, "bdlora_time_to_first_token_seconds_count").get(("math",), 0)
    client.completions.create(model="math", prompt="<5>", n=2)
    list(client.completions.create(model="math", prompt="<5>", stream=True))
    for name in ("time_to_first_token", "time_per_output_token", "request"):
        assert samples(metrics, f"bdlora_{name}_seconds_count")[("math",)] == before + 3


def test_what_the_gateway_routes_by(client: openai.OpenAI, server: FakeServer) -> None:
    """One series: its labels are lists of names, its value is the time."""
    server.engine.is_held = True
    stream = client.completions.create(model="code", prompt="<5>", stream=True)
    found = samples(server.service.metrics, "vllm:lora_requests_info")
    # Adapters on the device and those with a row; then those that requests wait for.
    assert list(found) == [("4", "code,math", "late")]
    assert next(iter(found.values())) > 1.7e9
    assert samples(server.service.metrics, "vllm:num_requests_waiting") == {(): 3}
    assert samples(server.service.metrics, "vllm:num_requests_running") == {(): 1}
    assert samples(server.service.metrics, "vllm:kv_cache_usage_perc") == {(): 0.25}
    stream.close()
    assert BASE not in server.service.metrics.text().decode().replace(BASE_LABEL, "")
