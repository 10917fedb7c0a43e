"""Figures for Prometheus. TTFT, TPOT and ITL are by the gateway's clock: from the request's arrival to the tokens'."""

from collections.abc import Iterable

from msgspec import structs
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from messages.common import AbortReason, Role
from messages.router_to_gateway import ClusterState, WorkerState

LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
INTERVAL = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

WORKER_GAUGES = {
    "running": "sequences that run",
    "waiting": "sequences that wait",
    "assigned": "requests placed there and not finished",
    "steps": "engine steps",
    "prefill_rate": "prompt tokens a second, of late",
    "transfer_latency": "seconds of hand-overs from the computed prompt to the ack, whatever their size, of late",
    "transfer_rate": "KV bytes a second of them on top of that, 0 where bytes make no difference",
}
CACHE_COUNTERS = {
    "prefix_cache_queries": "tokens that were looked up in the prefix cache",
    "prefix_cache_hits": "tokens whose KV was found there",
    "preemptions": "times that a sequence had to make room for an older one",
}
"""Fields of ``WorkerState``."""


class Handovers:
    """The ``kv_transfer`` metrics of a page: of each worker, its end of its hand-overs."""

    def __init__(self) -> None:
        labels = ("worker", "role")

        def counter(name: str, text: str, *more: str) -> CounterMetricFamily:
            return CounterMetricFamily(f"baton_{name}", text, labels=(*labels, *more))

        self._bytes = counter("kv_transfer_bytes", "KV bytes moved between workers", "direction")
        self._ended = counter("kv_transfers", "hand-overs that were verified and acked")
        self._aborts = counter("kv_transfer_aborts", "hand-overs that were given up", "reason")
        self._counters = {
            "hidden_bytes": counter("kv_transfer_hidden_bytes", "KV bytes that left before their prompt was computed"),
            "seconds": counter("kv_transfer_seconds", "time of hand-overs: of bytes on their way, or until verified"),
            "repairs": counter("kv_transfer_repairs", "times that bad or missing blocks were asked for again"),
            "quarantine_seconds": counter("kv_quarantine_seconds", "time that transfers' blocks were in quarantine"),
        }
        self._gauges = {
            "in_flight": GaugeMetricFamily("baton_kv_transfers_in_flight", "hand-overs under way", labels=labels),
            "quarantined_blocks": GaugeMetricFamily(
                "baton_kv_quarantined_blocks", "KV blocks that a writer may still reach", labels=labels
            ),
        }

    def add(self, worker: WorkerState) -> None:
        """Another worker's figures."""
        labels, counts = [worker.worker, worker.role.value], worker.handovers
        self._bytes.add_metric([*labels, "sent"], worker.kv_bytes_sent)
        self._bytes.add_metric([*labels, "received"], worker.kv_bytes_received)
        self._ended.add_metric(labels, worker.transfers)
        for reason in AbortReason:
            self._aborts.add_metric([*labels, reason.value], getattr(counts.aborts, reason.value))
        for name, family in (self._counters | self._gauges).items():
            family.add_metric(labels, getattr(counts, name))

    def families(self) -> Iterable[Metric]:
        return [self._bytes, self._ended, self._aborts, *self._counters.values(), *self._gauges.values()]


class Metrics(Collector):
    """One gateway's figures, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.cluster: ClusterState | None = None
        """The router's last answer."""

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(f"baton_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"baton_{name}_seconds", text, buckets=buckets, registry=self.registry)

        self.responses = counter("http_responses", "HTTP responses", ("route", "code"))
        self.grpc_responses = counter("grpc_responses", "gRPC calls that have ended", ("method", "code"))
        self.finished = counter("sequences_finished", "sequences that ended well", ("reason",))
        self.failed = counter("sequences_failed", "sequences that ended with an error", ("code",))
        self.prompt_tokens = counter("prompt_tokens", "prompt tokens of sequences begun")
        self.generation_tokens = counter("generation_tokens", "tokens delivered")
        self.attempts = counter("attempts", "attempts to run a sequence")
        self.resumes = counter("resumes", "attempts after the first")
        self.late_chunks = counter("late_chunks", "token chunks of fenced attempts or ended requests, dropped")
        self.repeated_chunks = counter("repeated_chunks", "token chunks that came twice, dropped")
        self.bad_chunks = counter("bad_chunks", "token chunks that made no sense, dropped")
        self.ttft = histogram("time_to_first_token", "from the request's arrival to its first token", LATENCY)
        self.tpot = histogram("time_per_output_token", "mean time between a sequence's tokens", INTERVAL)
        self.itl = histogram("inter_token_latency", "time between two tokens", INTERVAL)
        self.e2e = histogram("request_latency", "from the request's arrival to its sequence's end", LATENCY)
        self.in_flight = Gauge("baton_sequences_in_flight", "sequences in flight", registry=self.registry)
        self.malformed = Gauge(
            "baton_malformed_frames", "frames in the mailbox that were no message", registry=self.registry
        )
        self.registry.register(self)

    def text(self) -> bytes:
        """The exposition format."""
        return bytes(generate_latest(self.registry))

    def collect(self) -> Iterable[Metric]:
        """The workers' gauges, from the router's last answer."""
        if self.cluster is None:
            return
        queued = GaugeMetricFamily("baton_router_queued", "requests that wait for a placement")
        queued.add_metric([], self.cluster.queued)
        yield queued
        decided = CounterMetricFamily(
            "baton_disaggregation_decisions",
            "prompts by who decided where they are computed, and why",
            labels=("decided_by", "reason"),
        )
        for by, decisions in [
            ("router", self.cluster.decisions),
            *((worker.worker, worker.decisions) for worker in self.cluster.workers if worker.role is Role.DECODE),
        ]:
            for reason, count in structs.asdict(decisions).items():
                decided.add_metric([by, reason], count)
        yield decided
        alive = GaugeMetricFamily("baton_worker_alive", "whether the worker reports", labels=("worker", "role"))
        blocks = GaugeMetricFamily("baton_kv_blocks", "KV blocks", labels=("worker", "role", "state"))
        caches = {
            name: CounterMetricFamily(f"baton_{name}", text, labels=("worker", "role"))
            for name, text in CACHE_COUNTERS.items()
        }
        handovers = Handovers()
        for worker in self.cluster.workers:
            labels = [worker.worker, worker.role.value]
            handovers.add(worker)
            alive.add_metric(labels, float(worker.alive))
            for name, counted in caches.items():
                counted.add_metric(labels, getattr(worker.cache, name))
            for state in ("free", "held", "cached", "total"):
                blocks.add_metric([*labels, state], getattr(worker.blocks, state))
        yield alive
        yield blocks
        yield from caches.values()
        yield from handovers.families()
        for name, text in WORKER_GAUGES.items():
            family = GaugeMetricFamily(f"baton_worker_{name}", text, labels=("worker", "role"))
            for worker in self.cluster.workers:
                family.add_metric([worker.worker, worker.role.value], getattr(worker, name))
            yield family
