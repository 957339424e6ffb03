"""What Prometheus reads of the server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.running = Gauge("stf_jax_running", "Answers in the making", registry=registry)
        self.waiting = Gauge("stf_jax_waiting", "Requests without a slot", registry=registry)
        self.prefixes = Gauge(
            "stf_jax_prefix_cache_used",
            "Part of the prefix cache that is filled",
            registry=registry,
        )
        self.requests = Counter(
            "stf_jax_requests",
            "Requests by the status they ended with",
            ["status"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "stf_jax_prompt_tokens", "Tokens of prompts, images included", registry=registry
        )
        self.cached_tokens = Counter(
            "stf_jax_cached_tokens", "Those whose cache was there already", registry=registry
        )
        self.new_tokens = Counter("stf_jax_new_tokens", "Tokens of answers", registry=registry)
        self.first_token = Histogram(
            "stf_jax_time_to_first_token_seconds",
            "From the request to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.per_token = Histogram(
            "stf_jax_time_per_token_seconds",
            "Between the tokens of an answer, its mean",
            buckets=_SECONDS,
            registry=registry,
        )

    def text(self) -> bytes:
        """In Prometheus' form."""
        return generate_latest(self.registry)
