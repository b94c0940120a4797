"""Counters of the server in Prometheus' form, in a registry of its own: servers of a process share none."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """What is counted a request; the backend's own numbers are asked for when somebody looks."""

    def __init__(self, backend: Callable[[], Mapping[str, float]]) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by path and status.", ("path", "status"))
        self.tokens = self._counter("tokens", "Tokens read (prompt) and written (completion).", ("kind",))
        self.steered = self._counter(
            "steered", "Answers whose matrix was edited, or could not be.", ("outcome",)
        )
        self.left = self._counter("clients_gone", "Requests whose client left before the end.", ())
        self.seconds = Histogram(
            "gtalign_request_seconds",
            "From a request to its end.",
            ("path",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self.first = Histogram(
            "gtalign_first_text_seconds",
            "From a request to its first text.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.in_work = Gauge("gtalign_requests_in_work", "Requests in work.", registry=self._registry)
        self._registry.register(_Backend(backend))

    def text(self) -> bytes:
        """All of them as /metrics shows them."""
        return generate_latest(self._registry)

    def _counter(self, name: str, about: str, labels: Iterable[str]) -> Counter:
        return Counter(f"gtalign_{name}", about, tuple(labels), registry=self._registry)


class _Backend(Collector):
    def __init__(self, numbers: Callable[[], Mapping[str, float]]) -> None:
        self._numbers = numbers

    def collect(self) -> Iterable[Metric]:
        for name, value in self._numbers().items():
            yield GaugeMetricFamily(
                f"gtalign_{name}", f"The backend's {name.replace('_', ' ')}.", value=value
            )
