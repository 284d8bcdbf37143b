"""The page for Prometheus: read by its own parser, gauges follow the engines, nothing is left over."""

from __future__ import annotations

import threading

from prometheus_client.parser import text_string_to_metric_families

from vistune.serve.metrics import Metrics
from vistune.serve.work import State


def values(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def of(model: str, **more: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"model": model, **more}.items()))


def test_counts_and_times() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.began("m")
    metrics.first("m", 0.02)
    metrics.gap("m", 0.004)
    metrics.picture(0.002)
    metrics.ended("m", "stop", 40, 7, 0.5)
    metrics.ended("m", "left", 2, 1, 70.0)
    metrics.refused(429, "queue_full")
    now = values(metrics.text({}))
    assert now["vistune_requests_in_flight", of("m")] == 1
    assert now["vistune_requests_total", of("m", reason="stop")] == 1
    assert now["vistune_prompt_tokens_total", of("m")] == 42
    assert now["vistune_generation_tokens_total", of("m")] == 8
    assert now["vistune_refused_total", (("code", "queue_full"), ("status", "429"))] == 1
    assert now["vistune_time_to_first_token_seconds_bucket", of("m", le="0.025")] == 1
    assert now["vistune_time_to_first_token_seconds_bucket", of("m", le="0.01")] == 0
    assert now["vistune_inter_token_latency_seconds_sum", of("m")] == 0.004
    assert now["vistune_e2e_request_latency_seconds_count", of("m")] == 2
    assert now["vistune_picture_decode_seconds_count", ()] == 1
    metrics.ended("m", "error", 0, 0, 0.1)
    assert values(metrics.text({}))["vistune_requests_in_flight", of("m")] == 0


def test_gauges_are_the_engines_states() -> None:
    metrics = Metrics()
    state = State(running=3, waiting=2, kv_used=50, kv_tokens=200, pictures_held=1 << 20)
    now = values(metrics.text({"m": state, "n": State(alive=False)}))
    assert now["vistune_requests_running", of("m")] == 3
    assert now["vistune_requests_waiting", of("m")] == 2
    assert now["vistune_kv_cache_usage_ratio", of("m")] == 0.25
    assert now["vistune_pictures_held_bytes", of("m")] == 1 << 20
    assert now["vistune_engine_up", of("m")] == 1
    assert now["vistune_engine_up", of("n")] == 0
    later = values(metrics.text({"m": State(kv_tokens=200)}))
    assert all(later[f"vistune_{name}", of("m")] == 0 for name in ("requests_running", "kv_cache_usage_ratio"))
    assert ("vistune_engine_up", of("n")) not in later  # an engine that is gone leaves nothing behind


def test_two_servers_in_a_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.refused(404, "model_not_found")
    assert not [key for key in values(other.text({})) if key[0] == "vistune_refused_total"]


def test_names_of_models_are_escaped() -> None:
    name = 'a"b\\c\nd'
    assert values(Metrics().text({name: State(running=1)}))["vistune_requests_running", of(name)] == 1


def test_many_threads() -> None:
    metrics = Metrics()

    def count() -> None:
        for at in range(200):
            metrics.began("m")
            if at % 50 == 0:
                metrics.text({"m": State(running=1)})
            metrics.ended("m", "stop", 1, 1, 0.1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    now = values(metrics.text({}))
    assert now["vistune_requests_in_flight", of("m")] == 0
    assert now["vistune_requests_total", of("m", reason="stop")] == 800
