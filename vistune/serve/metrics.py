"""What a server counts and times, in Prometheus' words. Numbers and names of models alone, never what was asked.

Knows nothing of HTTP; whoever answers tells it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

from vistune import __version__

if TYPE_CHECKING:
    from vistune.serve.work import State  # which brings torch, and the process in front of workers has none

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0)
"""A picture of a small model on a GPU takes 5 ms, a full page of tiles on a CPU a minute."""
_GAP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0)
_DECODE = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Metrics:
    """All of one server, in a registry of its own. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._make_counts()
        self._make_times()
        self._make_states()
        Info("vistune_build", "What serves.", registry=self.registry).info({"version": __version__})
        ProcessCollector(registry=self.registry)

    def _make_counts(self) -> None:
        model, here = ("model",), self.registry
        self._requests = Counter("vistune_requests", "Answers by how they ended.", ("model", "reason"), registry=here)
        self._refused = Counter("vistune_refused", "Requests with an error.", ("status", "code"), registry=here)
        self._prompt = Counter("vistune_prompt_tokens", "Tokens of prompts, pictures' too.", model, registry=here)
        self._drawn = Counter("vistune_generation_tokens", "Tokens of answers.", model, registry=here)
        self._open = Gauge("vistune_requests_in_flight", "Requests that wait, run or are sent.", model, registry=here)

    def _make_times(self) -> None:
        def timed(name: str, said: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ("model",)) -> Histogram:
            return Histogram(name, said, labels, registry=self.registry, buckets=buckets)

        self._first = timed("vistune_time_to_first_token_seconds", "From a request to its first token.", _FIRST)
        self._gap = timed("vistune_inter_token_latency_seconds", "Between the tokens of an answer.", _GAP)
        self._whole = timed("vistune_e2e_request_latency_seconds", "From a request to its answer's end.", _WHOLE)
        self._length = timed("vistune_request_prompt_tokens", "Tokens of a prompt, pictures' too.", _TOKENS)
        self._decode = timed("vistune_picture_decode_seconds", "Bytes of a picture to pixels.", _DECODE, ())

    def _make_states(self) -> None:
        def state(name: str, said: str) -> Gauge:
            return Gauge(f"vistune_{name}", said, ("model",), registry=self.registry)

        self._states = {
            "running": state("requests_running", "Requests that have a row."),
            "waiting": state("requests_waiting", "Requests that wait for a row."),
            "kv_tokens": state("kv_cache_tokens", "Tokens that keys and values have room for."),
            "kv_used": state("kv_cache_tokens_used", "Tokens of keys and values that are reserved."),
            "pictures_held": state("pictures_held_bytes", "Encoded pictures that are remembered."),
            "pictures_seen": state("pictures_encoded", "Pictures encoded since the start."),
            "pictures_again": state("pictures_reused", "Pictures that were encoded already, since the start."),
            "prefix_tokens": state("prefix_cache_tokens", "Tokens of prompts that are remembered."),
            "tokens_again": state("prefix_cache_reused_tokens", "Tokens of prompts not read again, since the start."),
            "alive": state("engine_up", "1 while the engine's loop is alive."),
            "idle": state("engine_last_turn_seconds", "Seconds since the engine's loop last turned."),
        }
        self._usage = state("kv_cache_usage_ratio", "Share of keys and values that is reserved.")

    def refused(self, status: int, code: str) -> None:
        """A request got an error for an answer. `code`: a word of ours, never of a request."""
        self._refused.labels(str(status), code).inc()

    def began(self, model: str) -> None:
        """A request for a model that is there has been read. `ended` comes for each, whatever becomes of it."""
        self._open.labels(model).inc()

    def first(self, model: str, seconds: float) -> None:
        """The first token is there, `seconds` after the request came."""
        self._first.labels(model).observe(seconds)

    def gap(self, model: str, seconds: float) -> None:
        """Another token is there, `seconds` after the one before."""
        self._gap.labels(model).observe(seconds)

    def ended(self, model: str, reason: str, prompt_tokens: int, tokens: int, seconds: float) -> None:
        """The end of a request that began; `reason` as in `vistune.serve.work.Ended`."""
        self._open.labels(model).dec()
        self._requests.labels(model, reason).inc()
        self._prompt.labels(model).inc(prompt_tokens)
        self._drawn.labels(model).inc(tokens)
        self._whole.labels(model).observe(seconds)
        self._length.labels(model).observe(prompt_tokens)

    def picture(self, seconds: float) -> None:
        """A picture was decoded."""
        self._decode.observe(seconds)

    def text(self, states: Mapping[str, State]) -> bytes:
        """All of it for a scrape (`CONTENT_TYPE`); `states`: what the engines say now, by their names."""
        with self._lock:
            for gauge in (*self._states.values(), self._usage):
                gauge.clear()
            for model, state in states.items():
                for field, gauge in self._states.items():
                    gauge.labels(model).set(float(getattr(state, field)))
                self._usage.labels(model).set(state.kv_used / max(state.kv_tokens, 1))
            return generate_latest(self.registry)
