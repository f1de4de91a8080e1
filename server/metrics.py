"""What an operator sees at `/metrics`. Units are in the names; every label has few values.

Label values: `endpoint` is a route's template, or unmatched for a path of no route, `side` input or output,
`action` none, refused, rolled_back or redrawn, `risk` request or response, `name` block, flag, or redraw where a
refusal may be drawn again.
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from model.config import SafetyConfig
from model.events import Event, Finish, Release
from model.policy import Mode
from model.request import GenerationRequest
from server.engine.engine import Engine
from server.exchange import Exchange

METRIC_NAMES = (
    "ballast_requests_total",
    "ballast_request_seconds",
    "ballast_requests_running",
    "ballast_requests_waiting",
    "ballast_kv_cache_usage",
    "ballast_evictions_total",
    "ballast_engine_restarts_total",
    "ballast_prompt_tokens_total",
    "ballast_completion_tokens_total",
    "ballast_time_to_first_token_seconds",
    "ballast_inter_token_seconds",
    "ballast_held_tokens",
    "ballast_request_risk",
    "ballast_response_risk",
    "ballast_safety_decisions_total",
    "ballast_withdrawn_tokens_total",
    "ballast_assessments_total",
    "ballast_head_failures_total",
    "ballast_safety_head_seconds",
    "ballast_safety_threshold",
    "ballast_head_info",
)

_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)
_HELD = (0, 2, 4, 6, 8, 10, 12, 16, 24, 32, 64)
_REQUEST_S = (0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 240, 480, 960)
_HEAD_S = (25e-6, 50e-6, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3, 0.0125, 0.025, 0.05)
_RISKS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)


class Metrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self._build_serving(engine)
        self._build_safety()
        self.registry.register(_EngineCounts(engine))

    def _build_serving(self, engine: Engine) -> None:
        at = self.registry
        labels = ("endpoint", "status", "finish_reason")
        self.requests = Counter("ballast_requests", "HTTP requests", labels, registry=at)
        self.request_s = Histogram(
            "ballast_request_seconds", "From arrival to the last byte", ("endpoint",), buckets=_REQUEST_S, registry=at
        )
        running = Gauge("ballast_requests_running", "Sequences being generated", registry=at)
        running.set_function(lambda: engine.stats().num_running)
        waiting = Gauge("ballast_requests_waiting", "Sequences in the queue", registry=at)
        waiting.set_function(lambda: engine.stats().num_waiting)
        usage = Gauge("ballast_kv_cache_usage", "Share of the cache of keys and values in use", registry=at)
        usage.set_function(lambda: engine.stats().cache_usage)
        self.prompt_tokens = Counter(
            "ballast_prompt_tokens", "Prompt tokens of requests whose generation began", registry=at
        )
        self.completion_tokens = Counter(
            "ballast_completion_tokens",
            "Released tokens; of an aborted request those released until then, without those held back",
            registry=at,
        )
        self.first_token_s = Histogram(
            "ballast_time_to_first_token_seconds",
            "From arrival to the first text that leaves, holdback included",
            buckets=_TOKEN_S,
            registry=at,
        )
        self.inter_token_s = Histogram(
            "ballast_inter_token_seconds",
            "Between two tokens of one choice; tokens that leave together share their wait evenly",
            buckets=_TOKEN_S,
            registry=at,
        )
        self.held_tokens = Histogram(
            "ballast_held_tokens", "Tokens that are held back each time that some leave", buckets=_HELD, registry=at
        )

    def _build_safety(self) -> None:
        at = self.registry
        self.request_risk = Histogram(
            "ballast_request_risk", "Risk of each request, once for all its choices", buckets=_RISKS, registry=at
        )
        self.response_risk = Histogram("ballast_response_risk", "Risk of each response", buckets=_RISKS, registry=at)
        self.decisions = Counter(
            "ballast_safety_decisions", "What the policy did on a side that is on", ("side", "action"), registry=at
        )
        self.withdrawn_tokens = Counter("ballast_withdrawn_tokens", "Tokens generated, never released", registry=at)
        self.head_s = Histogram(
            "ballast_safety_head_seconds",
            "Time of the head in one step, where it is not part of the pass",
            buckets=_HEAD_S,
            registry=at,
        )
        self.threshold = Gauge("ballast_safety_threshold", "Thresholds in force", ("risk", "name"), registry=at)
        self.head_info = Gauge(
            "ballast_head_info", "The signal that is served", ("base", "weights", "dtype", "licence"), registry=at
        )

    def describe(self, config: SafetyConfig | None) -> None:
        """Set the gauges that say which signal is served."""
        if config is None:
            return
        base = config.base
        self.head_info.labels(base.name, base.weights[:12], base.dtype, config.licence).set(1)
        for risk, thresholds in (("request", config.request), ("response", config.response)):
            self.threshold.labels(risk, "block").set(thresholds.block)
            self.threshold.labels(risk, "flag").set(thresholds.flag)
        if config.redraw_below > 0.0:
            self.threshold.labels("request", "redraw").set(config.redraw_below)

    def observe_request(self, endpoint: str, status: int, finish_reason: str, seconds: float) -> None:
        """Count one HTTP exchange."""
        self.requests.labels(endpoint, str(status), finish_reason).inc()
        self.request_s.labels(endpoint).observe(seconds)

    def render(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)


class _EngineCounts(Collector):
    """What the engine counts itself: scoring and aborted requests are in it, which no meter sees to their end."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the counters as they stand."""
        stats = self._engine.stats()
        head = stats.head
        yield CounterMetricFamily("ballast_assessments", "Evaluations of the signal", value=head.num_assessments)
        yield CounterMetricFamily(
            "ballast_head_failures", "Evaluations without a number, which count as unsafe", value=head.num_failures
        )
        yield CounterMetricFamily(
            "ballast_engine_restarts", "Faults of the engine after which it went on", value=stats.num_restarts
        )
        yield CounterMetricFamily(
            "ballast_evictions", "Sequences that were computed again for want of memory", value=stats.num_evictions
        )


class ChoiceMeter:
    """Measures one choice of a chat completion while its events pass.

    Args:
        metrics: where to.
        request: what is generated; sides that are off are not counted as decisions.
        exchange: the HTTP request that asks for it, and perhaps for other choices too; its tokens are noted there.
    """

    def __init__(self, metrics: Metrics, request: GenerationRequest, exchange: Exchange) -> None:
        self._metrics = metrics
        self._request = request
        self._exchange = exchange
        self._last = exchange.started
        self._has_text = False

    def see(self, event: Event) -> None:
        """Take note of an event."""
        if not self._exchange.prompt_tokens:
            self._see_beginning()
        if isinstance(event, Finish):
            self._see_finish(event)
        else:
            self._see_release(event)

    def _see_beginning(self) -> None:
        prompt = self._request.prompt
        self._exchange.prompt_tokens = len(prompt.request) + len(prompt.prefill)
        self._metrics.prompt_tokens.inc(self._exchange.prompt_tokens)

    def _see_release(self, release: Release) -> None:
        if release.head.seconds:  # on a GPU the heads may be part of the pass
            self._metrics.head_s.observe(release.head.seconds)
        now, num_tokens = time.perf_counter(), len(release.tokens)
        self._exchange.completion_tokens += num_tokens
        self._metrics.completion_tokens.inc(num_tokens)
        if num_tokens:
            self._metrics.held_tokens.observe(release.num_held)
        if self._has_text and num_tokens:
            for _ in range(num_tokens):
                self._metrics.inter_token_s.observe((now - self._last) / num_tokens)
            self._last = now
        elif release.text and not self._has_text:
            self._metrics.first_token_s.observe(now - self._last)
            self._has_text, self._last = True, now

    def _see_finish(self, finish: Finish) -> None:
        metrics = self._metrics
        metrics.withdrawn_tokens.inc(finish.num_withdrawn_tokens)
        if finish.request_risk is not None and self._request.choice == 0:  # the same for every choice
            metrics.request_risk.observe(finish.request_risk)
        if finish.response_risk is not None:
            metrics.response_risk.observe(finish.response_risk)
        if self._request.input is not Mode.OFF:
            redrawn = "redrawn" if finish.is_redrawn else "none"
            metrics.decisions.labels("input", "refused" if finish.action == "refused" else redrawn).inc()
        if self._request.output is not Mode.OFF:
            metrics.decisions.labels("output", "rolled_back" if finish.action == "rolled_back" else "none").inc()
