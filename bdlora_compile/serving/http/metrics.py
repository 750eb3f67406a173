"""Prometheus metrics: what gateways route by, and latencies of each adapter with a bounded number of labels.

The names with ``vllm:`` are those that Kubernetes' Gateway API Inference Extension reads ("model server protocol").
"""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from bdlora_compile.serving.requests import Event, Finished
from bdlora_compile.serving.stats import EngineStats

BASE_LABEL = "(base)"
OTHER_LABEL = "(other)"
"""No adapter can have these names: theirs have no parentheses."""

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """What one server counts.

    Args:
        stats: the engine's counts at this moment.
        resident: (adapters that can be resident, names of those that are).
        max_adapters: adapters with a label of their own; later ones share "(other)".
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        resident: Callable[[], tuple[int, list[str]]],
        max_adapters: int,
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineState(stats, resident))
        self._max_adapters = max_adapters
        self._labels: set[str] = set()
        self._series = (
            self._histogram("time_to_first_token_seconds", "From a request's arrival to its first token", _FIRST_TOKEN),
            self._histogram("time_per_output_token_seconds", "Between tokens, mean of a request", _PER_TOKEN),
            self._histogram("request_seconds", "From a request's arrival to its last token", _WHOLE),
        )
        self._ended = Counter(
            "bdlora_requests", "Requests that ended", ["adapter", "finished_reason"], registry=self._registry
        )

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def meter(self, adapter: str | None) -> "Meter":
        """Measures one request from now on."""
        return Meter(self, self._label(adapter))

    def forget(self, adapter: str) -> None:
        """An adapter was unloaded: its series go, and another one may have its label."""
        if adapter not in self._labels:
            return
        self._labels.discard(adapter)
        for histogram in self._series:
            histogram.remove(adapter)
        self._ended.remove_by_labels({"adapter": adapter})

    def observe(self, label: str, seconds: tuple[float | None, ...], reason: str) -> None:
        """A request ended; (first token, per token, whole) in seconds, None where there is none."""
        if label not in (BASE_LABEL, *self._labels):
            # Its adapter was unloaded meanwhile, and another one may have the place.
            label = OTHER_LABEL
        for histogram, value in zip(self._series, seconds, strict=True):
            # Made by `labels`, so that all series of a label come and go together.
            child = histogram.labels(label)
            if value is not None:
                child.observe(value)
        self._ended.labels(label, reason).inc()

    def _label(self, adapter: str | None) -> str:
        if adapter is None:
            return BASE_LABEL
        if adapter not in self._labels and len(self._labels) >= self._max_adapters:
            return OTHER_LABEL
        self._labels.add(adapter)
        return adapter

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"bdlora_{name}", text, ["adapter"], buckets=buckets, registry=self._registry)


class Meter:
    """Times the events of one request. ``label`` is that of its adapter, known when the request was accepted."""

    def __init__(self, metrics: Metrics, label: str) -> None:
        self._metrics = metrics
        self._label = label
        self._start = time.monotonic()
        self._first: float | None = None
        self._tokens = 0

    def see(self, event: Event) -> None:
        """Take note of an event; the last one is counted."""
        now = time.monotonic()
        if not isinstance(event, Finished):
            self._first = now if self._first is None else self._first
            self._tokens += 1
            return
        to_first = None if self._first is None else self._first - self._start
        per_token = None if self._first is None or self._tokens < 2 else (now - self._first) / (self._tokens - 1)
        self._metrics.observe(self._label, (to_first, per_token, now - self._start), event.reason)


class _EngineState(Collector):
    """The engine's own counts, read when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats], resident: Callable[[], tuple[int, list[str]]]) -> None:
        self._stats = stats
        self._resident = resident

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """One sample of each."""
        stats = self._stats()
        slots, resident = self._resident()
        yield _gauge("vllm:num_requests_running", "Requests that have a row", sum(stats.running.values()))
        yield _gauge("vllm:num_requests_waiting", "Requests that wait for a row", sum(stats.waiting.values()))
        yield _gauge(
            "vllm:kv_cache_usage_perc", "Rows in use, 1 is all of them", stats.rows_in_use / max(stats.rows, 1)
        )
        yield self._adapters(stats, slots, resident)
        yield CounterMetricFamily("bdlora_prompt_tokens", "Tokens of prompts", value=stats.prompt_tokens)
        yield CounterMetricFamily("bdlora_generated_tokens", "Tokens generated", value=stats.generated_tokens)
        yield CounterMetricFamily("bdlora_decode_steps", "Forwards of one token a row", value=stats.decode_steps)
        yield CounterMetricFamily("bdlora_step_seconds", "Seconds in all steps", value=stats.step_seconds)
        yield CounterMetricFamily("bdlora_refused_requests", "Requests refused by a full queue", value=stats.refused)

    def _adapters(self, stats: EngineStats, slots: int, resident: list[str]) -> GaugeMetricFamily:
        """One series whose labels are lists of names and whose value is the time, as the gateway wants it."""
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters on the device and adapters that requests wait for; the value is the time",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        running = sorted({name for name in stats.running if name is not None} | set(resident))
        waiting = sorted({name for name in stats.waiting if name is not None} - set(running))
        family.add_metric([str(slots), ",".join(running), ",".join(waiting)], time.time())
        return family


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
