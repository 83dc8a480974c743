"""Counts and times in Prometheus' text format."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PATHS = ("/", "/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/ready")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """What one server counts; every app has its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        path: dict[str, Any] = {"registry": self.registry, "labelnames": ["path", "status"]}
        model = path | {"labelnames": ["model"]}
        times = model | {"buckets": SECONDS}
        self.requests = Counter("octavo_requests", "Answers.", **path)
        self.read = Counter("octavo_read_tokens", "Prompt tokens read.", **model)
        told = "Prompt tokens that were there already."
        self.shared = Counter("octavo_shared_tokens", told, **model)
        self.written = Counter("octavo_written_tokens", "Tokens.", **model)
        self.queue = Gauge("octavo_queue", "Requests waiting.", **model)
        self.in_use = Gauge("octavo_slots_in_use", "Texts in work.", **model)
        told = "From a text's token, or several at once, to its next."
        self.between = Histogram("octavo_between_tokens_seconds", told, **times)
        told = "From a request to its text's first token."
        self.first = Histogram("octavo_first_token_seconds", told, **times)

    def count_request(self, path: str, status: int) -> None:
        """Note an answer; paths that are not ours are one."""
        self.requests.labels(path if path in PATHS else "other", status).inc()

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)


class ModelMetrics:
    """The metrics of one model by the names they have in `Metrics`."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.read = metrics.read.labels(model)
        self.shared = metrics.shared.labels(model)
        self.written = metrics.written.labels(model)
        self.queue = metrics.queue.labels(model)
        self.in_use = metrics.in_use.labels(model)
        self.between = metrics.between.labels(model)
        self.first = metrics.first.labels(model)
