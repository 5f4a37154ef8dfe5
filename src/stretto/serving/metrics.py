"""``/metrics``: vLLM's names, so that its dashboards read them, and stretto's own. Fed by the front alone."""

from __future__ import annotations

from typing import Any

from stretto.errors import MissingExtraError

__all__ = ["Metrics"]

SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def _steps(limit: int) -> list[int]:
    """1, 2, 5, 10, ... up to ``limit``."""
    out, power = [], 1
    while power <= limit:
        out += [m * power for m in (1, 2, 5) if m * power <= limit]
        power *= 10
    return out


class Metrics:
    """One registry a server. ``labels``: model_name and engine."""

    def __init__(self, model: str, max_model_len: int):
        try:
            import prometheus_client as p
        except ImportError:
            raise MissingExtraError("prometheus-client", "serve") from None
        self._p, self.registry = p, p.CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        names, steps = tuple(self._labels), _steps(max_model_len)

        def gauge(name: str, text: str) -> Any:
            return p.Gauge(name, text, names, registry=self.registry).labels(**self._labels)

        def counter(name: str, text: str) -> Any:
            return p.Counter(name, text, names, registry=self.registry).labels(**self._labels)

        def histogram(name: str, text: str, buckets: Any) -> Any:
            found = p.Histogram(name, text, names, buckets=buckets, registry=self.registry)
            return found.labels(**self._labels)

        self.running = gauge("vllm:num_requests_running", "Choices that run.")
        self.waiting = gauge("vllm:num_requests_waiting", "Choices that wait.")
        self.usage = gauge("vllm:kv_cache_usage_perc", "Share of the cache slots that are used, 0 to 1.")
        self.queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.hits = counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.preemptions = counter("vllm:num_preemptions", "Requests whose cache was taken away.")
        self.prompt = counter("vllm:prompt_tokens", "Prompt tokens of finished requests.")
        self.generated = counter("vllm:generation_tokens", "Tokens generated.")
        self.drafts = counter("vllm:spec_decode_num_drafts", "Forwards of methods that drafted.")
        self.drafted = counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted.")
        self.accepted = counter("vllm:spec_decode_num_accepted_tokens", "Drafted tokens accepted.")
        self.ttft = histogram("vllm:time_to_first_token_seconds", "Time to the first token.", SECONDS)
        self.tpot = histogram("vllm:time_per_output_token_seconds", "Mean time per further token.", GAPS)
        self.itl = histogram("vllm:inter_token_latency_seconds", "Time between two tokens.", GAPS)
        self.e2e = histogram("vllm:e2e_request_latency_seconds", "Time of a whole request.", WHOLE)
        self.queue = histogram("vllm:request_queue_time_seconds", "Time before a request's first forward.", WHOLE)
        self.inference = histogram("vllm:request_inference_time_seconds", "Time from admission to the end.", WHOLE)
        self.prefill = histogram("vllm:request_prefill_time_seconds", "Time from admission to the first token.", WHOLE)
        self.decode = histogram("vllm:request_decode_time_seconds", "Time from the first token to the last.", WHOLE)
        self.prompts = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", steps)
        self.outputs = histogram("vllm:request_generation_tokens", "Tokens generated for a choice.", steps)
        self.limits = histogram("vllm:request_params_max_tokens", "max_tokens of requests.", steps)
        self.iteration = histogram("vllm:iteration_tokens_total", "Rows of a forward.", ROWS)
        self.forwards = counter("stretto:forwards", "Forwards of the engine.")
        self.rows = counter("stretto:rows", "Rows evaluated in forwards.")
        self.starts = gauge("stretto:engine_starts", "How often the engine process was started.")
        self.prefix_slots = gauge("stretto:prefix_slots", "Cache slots that the prefix cache holds.")
        self.refused = p.Counter(
            "stretto:requests_refused", "Requests refused, by status.", (*names, "status"), registry=self.registry
        )
        self.finished = p.Counter(
            "vllm:request_success", "Choices finished, by reason.", (*names, "finished_reason"), registry=self.registry
        )
        self.per_forward = p.Histogram(
            "stretto:tokens_per_forward", "Tokens per forward of a choice, by method.", (*names, "method"),
            buckets=(1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 16, 32), registry=self.registry,
        )
        self._seen: dict[str, float] = {}

    def page(self) -> tuple[bytes, str]:
        """The page, and its content type."""
        return self._p.generate_latest(self.registry), self._p.CONTENT_TYPE_LATEST

    def refuse(self, status: int) -> None:
        self.refused.labels(**self._labels, status=str(status)).inc()

    def state(self, stats: dict[str, Any]) -> None:
        """The engine's numbers of this moment; its counters start again when it does."""
        self.running.set(stats["running"])
        self.waiting.set(stats["waiting"])
        self.usage.set(stats["used"] / stats["slots"])
        self.prefix_slots.set(stats["prefix"])
        counters = (("preemptions", self.preemptions), ("prefix_queries", self.queries), ("prefix_hits", self.hits),
                    ("forwards", self.forwards), ("rows", self.rows))
        forwards, rows = self._more("forwards", stats["forwards"]), self._more("rows", stats["rows"])
        if forwards:
            self.iteration.observe(rows / forwards)
        for name, counter in counters:
            counter.inc(self._more(name, stats[name]))
            self._seen[name] = stats[name]

    def forget(self) -> None:
        """A new engine counts from nothing."""
        self._seen.clear()

    def start(self, prompt: int, limit: int, n: int) -> None:
        self.prompt.inc(prompt)
        self.prompts.observe(prompt)
        for _ in range(n):
            self.limits.observe(limit)

    def end(self, cost: dict[str, Any], reason: str) -> None:
        """A choice is finished."""
        self.finished.labels(**self._labels, finished_reason=reason).inc()
        self.generated.inc(cost["tokens"])
        self.outputs.observe(cost["tokens"])
        self.e2e.observe(cost["seconds"])
        self.ttft.observe(cost["ttft"])
        self.queue.observe(cost["queued"])
        self.prefill.observe(max(0.0, cost["ttft"] - cost["queued"]))
        self.inference.observe(max(0.0, cost["seconds"] - cost["queued"]))
        rest = max(0.0, cost["seconds"] - cost["ttft"])
        self.decode.observe(rest)
        if cost["tokens"] > 1:
            self.tpot.observe(rest / (cost["tokens"] - 1))
        if cost["drafted"]:
            self.drafts.inc(cost["forwards"])
            self.drafted.inc(cost["drafted"])
            self.accepted.inc(cost["accepted"])
        self.per_forward.labels(**self._labels, method=cost["method"]).observe(cost["tokens_per_forward"])

    def _more(self, name: str, now: float) -> float:
        return max(0.0, now - self._seen.get(name, 0.0))


