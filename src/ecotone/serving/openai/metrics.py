"""What Prometheus scrapes: counts and times of requests as the server saw them, and the engine's own figures when asked.

Names are vLLM's behind `ecotone_` where vLLM has the same thing, so its dashboards need one word changed. The registry is
the server's own. Times to first token are counted from the end of the request's body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ecotone.decoding.engine import Measured
from ecotone.serving.openai.channel import Mark

__all__ = ["Metrics", "bubble_share"]

FIRST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
WHOLE_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
LENGTHS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """`measured` None: no engine, an embedder alone."""

    def __init__(self, model: str, measured: Callable[[], Measured] | None):
        self.registry = CollectorRegistry()
        self._model = model

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ecotone_{name}", text, ("model_name", *labels), registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"ecotone_{name}", text, ("model_name",), buckets=buckets, registry=self.registry)
            return made.labels(model)

        self._requests = counter("http_requests", "Requests by path and HTTP status; 499: the client went away.",
                                 "path", "status")  # fmt: skip
        self._finished = counter("request_success", "Choices that ended well.", "finished_reason")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.").labels(model)
        self._generated = counter("generation_tokens", "Tokens generated.").labels(model)
        self._first_s = histogram("time_to_first_token_seconds", "From the whole request to the first token.", FIRST_S)
        self._token_s = histogram("time_per_output_token_seconds", "Mean per choice, first token left out.", TOKEN_S)
        self._whole_s = histogram("e2e_request_latency_seconds", "From the whole request to its end.", WHOLE_S)
        self._prompt_length = histogram("request_prompt_tokens", "Tokens of a prompt.", LENGTHS)
        self._answer_length = histogram("request_generation_tokens", "Tokens of a choice.", LENGTHS)
        self.open_connections = Gauge("ecotone_open_connections", "HTTP connections.", registry=self.registry)
        if measured is not None:
            self.registry.register(_EngineCollector(model, measured))

    def answered(self, path: str, status: int) -> None:
        self._requests.labels(self._model, path, str(status)).inc()

    def prompted(self, tokens: int) -> None:
        self._prompt.inc(tokens)
        self._prompt_length.observe(tokens)

    def ended(self, reason: str | None, mark: Mark, begun_s: float, now_s: float) -> None:
        """A choice is over; `reason` None where it did not end well."""
        self._generated.inc(mark.num_tokens)
        if mark.num_tokens:
            self._first_s.observe(mark.first_s - begun_s)
        if mark.num_tokens > 1:
            self._token_s.observe((mark.last_s - mark.first_s) / (mark.num_tokens - 1))
        if reason is not None:
            self._finished.labels(self._model, reason).inc()
            self._whole_s.observe(now_s - begun_s)
            self._answer_length.observe(mark.num_tokens)

    def render(self) -> bytes:
        """The text format; asks the engine."""
        return generate_latest(self.registry)


def bubble_share(measured: Measured) -> float:
    """Share of the stages' time that is idle at the present number of frames in flight, from the fitted times.

    F frames go round in T each, or as fast as the slowest stage tau lets them: rate = min(F/T, 1/tau); stage i is busy
    rate * t_i of the time. 0 where nothing is in flight or measured.
    """
    times, flying = measured.stage_times_s, measured.num_flying
    if not flying or not measured.loop_s or not measured.stage_s:
        return 0.0
    rate = min(flying / measured.loop_s, 1 / measured.stage_s)
    return max(0.0, 1.0 - rate * sum(times) / len(times))


class _EngineCollector(Collector):
    def __init__(self, model: str, measured: Callable[[], Measured]):
        self._model, self._measured = model, measured

    def collect(self) -> Iterator[Metric]:
        measured = self._measured()
        used = measured.total_blocks - measured.free_blocks
        gauges = (
            ("num_requests_waiting", "Requests in the queue.", measured.num_waiting),
            ("num_requests_running", "Requests in the pipeline.", measured.num_active),
            ("num_frames_in_flight", "Frames in the pipeline.", measured.num_flying),
            ("kv_cache_usage_perc", "Share of key blocks in use, kept prefixes included.",
             used / measured.total_blocks if measured.total_blocks else 0.0),
            ("kv_blocks_used", "Key blocks in use.", used),
            ("kv_blocks_total", "Key blocks of the smallest stage.", measured.total_blocks),
            ("cached_sequences", "Sequences whose keys are kept.", measured.num_cached_sequences),
            ("spec_decode_acceptance", "Share of drafted tokens accepted.", measured.acceptance),
            ("loop_seconds", "A frame of one token there and back, waiting left out.", measured.loop_s),
            ("slowest_stage_seconds", "What the slowest device needs for it.", measured.stage_s),
            ("network_seconds_per_token", "What the network adds to it.", measured.network_s),
            ("frame_seconds", "What a frame takes of a full pipeline besides computing.", measured.frame_s),
            ("wait_seconds", "What frames wait in queues of stages.", measured.wait_s),
            ("pipeline_depth", "Frames that fill the pipeline.", measured.depth),
            ("pipeline_bubble_share", "Share of the stages' time that is idle.", bubble_share(measured)),
            ("pipeline_epoch", "Pipelines that there have been: one more with each loss or move.", measured.epoch),
        )  # fmt: skip
        for name, text, value in gauges:
            yield self._of(GaugeMetricFamily(f"ecotone_{name}", text, labels=["model_name"]), value)
        counts = measured.counts
        counters = (
            ("prefix_cache_queries", "Tokens of admitted prompts.", "prompt_tokens"),
            ("prefix_cache_hits", "Tokens of prompts whose keys were there.", "cached_tokens"),
            ("spec_decode_num_draft_tokens", "Drafted tokens judged.", "drafts_judged"),
            ("spec_decode_num_accepted_tokens", "Drafted tokens accepted.", "drafts_accepted"),
            ("num_preemptions", "Requests put back into the queue.", "put_back"),
            ("stage_losses", "Times that stages were lost.", "losses"),
            ("stage_moves", "Times that stages moved while requests went on.", "moves"),
        )
        for name, text, key in counters:
            yield self._of(CounterMetricFamily(f"ecotone_{name}", text, labels=["model_name"]), counts.get(key, 0))
        stages = GaugeMetricFamily("ecotone_stage_seconds", "A stage's time for one token.", labels=["model_name", "stage"])
        for index, seconds in enumerate(measured.stage_times_s):
            stages.add_metric([self._model, str(index)], seconds)
        yield stages
        events = CounterMetricFamily("ecotone_engine_events", "What the engine counts.", labels=["model_name", "event"])
        for name, count in sorted(counts.items()):
            events.add_metric([self._model, name], count)
        yield events

    def _of(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric([self._model], value)
        return family
