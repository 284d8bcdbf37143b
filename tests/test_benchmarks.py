"""The benchmark's own parts: data as announced, useful FLOPs, ratios; and one quick run of our side, without peers."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.mark.slow
def test_quick_run_measures_us_and_agrees_with_the_stock_loop(data, tmp_path):
    out = tmp_path / "quick.json"
    words = ["--quick", "--threads", "1", "--data", str(data), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert [run["cell"][0] for run in result["runs"]] == [2, "lora"]
    steps = [step for run in result["runs"] for step in run["steps"]]
    assert [len(step["rows"]) for step in steps] == [4, 4, 4, 4]
    assert all(step["cpu_s"] > 0 and step["tokens"] == step["positions"] for step in steps)
    # The counts come from the stock processor, read from the data folder; the run's from vistune's own tokenization.
    counts = json.loads((data / "quick" / "made.json").read_text())["counts"]["2"]
    for step in steps:
        assert step["tokens"] == sum(counts[row][0] for row in step["rows"])
        assert step["supervised"] == sum(counts[row][1] for row in step["rows"])
    assert len(result["parity"]) == 2
    for parity in result["parity"].values():
        assert parity["same_ids"] and parity["largest_relative_difference"] < 1e-4
        assert parity["last_loss"] < parity["first_loss"]
    assert "vistune" in out.with_suffix(".md").read_text()


@pytest.mark.slow
def test_a_profile_accounts_for_the_whole_step(data, tmp_path):
    """On the quick run's data; bf16 is computed as such even where it is imitated."""
    import profile_step

    out = tmp_path / "profile.json"
    words = ["--quick", "--stages", "2", "--precision", "bf16", "--dropped", "0", "--plain", "1", "--profiled", "1"]
    assert profile_step.main([*words, "--threads", "1", "--batch", "4", "--data", str(data), "--out", str(out)]) == 0
    (cell,) = json.loads(out.read_text())["cells"]
    took = {kind: work["seconds"] for kind, work in cell["kinds"].items()}
    assert 0.3 * cell["profiled_s"] < sum(took.values()) < 1.05 * cell["profiled_s"]
    assert min(took[kind] for kind in ("products", "attention", "optimizer", "copies")) > 0
    assert cell["kinds"]["products"]["flops"] > 0 and 0 < cell["mfu"] < 1
    assert "## Stage 2, bf16" in out.with_suffix(".md").read_text()


CONFIG = {
    "vision_feature_layer": -2,
    "vision_config": {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "image_size": 224,
        "patch_size": 14,
    },
    "text_config": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "vocab_size": 8064,
    },
}


@pytest.mark.parametrize(
    ("stage", "vocab", "mean", "published"),
    [(1, 8064, (290, 33, 1), 35.4), (1, 32064, (290, 33, 1), 38.2), (2, 8064, (436, 92, 0.932), 49.7)],
)
def test_flops_of_a_token_are_those_of_an_independent_count(stage, vocab, mean, published):
    from flops import step_flops

    config = {**CONFIG, "text_config": {**CONFIG["text_config"], "vocab_size": vocab}}
    per_token = step_flops(config, [mean], stage) / mean[0] / 1e6
    assert per_token == pytest.approx(published, rel=0.015)


def test_adapters_cost_a_forward_and_two_products_of_their_own_weights():
    """Counted on the real thing: peft's adapters beside every linear layer of a Llama of this size."""
    from flops import step_flops
    from peers.adapted import config
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict = {**CONFIG["text_config"]}
    with torch.device("meta"):
        language = nn.ModuleDict({"language_model": LlamaForCausalLM(LlamaConfig(**sizes)).model})
        adapted = get_peft_model(language, replace_config(config()))
    adapters = sum(p.numel() for name, p in adapted.named_parameters() if ".lora_" in name)
    sample = [(100, 30, 1)]
    assert step_flops(CONFIG, sample, "lora") - step_flops(CONFIG, sample, 1) == 6 * 100 * adapters > 0


def replace_config(said):
    """Without the connector and the task, which a bare stack of layers has not."""
    said.modules_to_save, said.task_type = None, None
    return said


def test_goals_and_aims_are_told_apart():
    from summary import goal, mfu

    row = {"stage": 1, "vocab": "8k", "precision": "bf16", "who": "trl", "speed": 2.7, "memory": 0.72}
    assert goal(row, "speed") == " (>= 2.5: yes, aim >= 3: NO)"
    assert goal(row, "memory") == " (<= 0.75: yes, aim <= 0.7: NO)"
    assert goal({**row, "stage": "lora"}, "speed") == " (aim >= 2.5: yes)"
    assert goal({**row, "precision": "fp32"}, "speed") == ""
    assert mfu({"who": "vistune", "mfu": 0.41, "computed": "bf16"}) == "41.0% of bf16 (aim >= 40%: yes)"
    assert mfu({"who": "trl", "mfu": 0.41, "computed": "fp32"}) == "41.0% of fp32"


def test_a_run_is_measured_against_the_peak_of_what_it_computed_in():
    from summary import summarise

    mine = run_of("vistune", 0, [1.0] * 3, 1) | {"computed": "fp32"}
    rows = {row["who"]: row for row in summarise([mine, run_of("trl", 0, [1.0] * 3, 1)], dropped=0)}
    assert rows["vistune"]["mfu"] == pytest.approx(0.5) and rows["trl"]["mfu"] == pytest.approx(5.0)


PEAKS = {"fp32": 1e10, "bf16": 1e9}


def run_of(who: str, turn: int, cpu: list[float], peak: int, foreign: float = 0.0) -> dict:
    step = {"tokens": 100, "positions": 125, "supervised": 20, "wall_s": 1.0, "flops": 5e9, "loss": 2.0}
    steps = [{**step, "cpu_s": seconds, "foreign_cores": foreign} for seconds in cpu]
    return {
        "who": who,
        "round": turn,
        "cell": [2, "8k", "bf16"],
        "steps": steps,
        "peak_bytes": peak,
        "matmul_peak": PEAKS,
    }


def test_ratios_are_taken_round_by_round_and_the_first_steps_do_not_count():
    from summary import goal, summarise

    runs = [
        run_of("trl", 0, [99.0, 4.0, 4.0, 4.0], 1000),
        run_of("vistune", 0, [50.0, 1.0, 1.0, 1.0], 700),
        run_of("trl", 1, [99.0, 8.0, 8.0, 8.0], 1000),  # a slower round, for both
        run_of("vistune", 1, [50.0, 4.0, 4.0, 4.0], 900),
    ]
    rows = {row["who"]: row for row in summarise(runs, dropped=1)}
    assert rows["trl"]["speed"] == pytest.approx((4.0 + 2.0) / 2)
    assert rows["trl"]["memory"] == pytest.approx(0.8)
    assert rows["vistune"]["tokens_per_cpu_s"] == pytest.approx((100 + 25) / 2)
    assert rows["vistune"]["mfu"] == pytest.approx(5.0) and rows["trl"]["padding"] == pytest.approx(0.2)
    assert "(>= 3: yes" in goal(rows["trl"], "speed") and "<= 0.75: NO" in goal(rows["trl"], "memory")


def test_contended_steps_are_left_out_where_clean_ones_remain():
    from summary import steps_that_count

    clean, busy = run_of("trl", 0, [1.0] * 3, 1), run_of("trl", 0, [7.0] * 3, 1, foreign=0.5)
    mixed = {**clean, "steps": busy["steps"][:2] + clean["steps"] + busy["steps"][2:]}
    steps, contended = steps_that_count(mixed, dropped=0)
    assert [s["cpu_s"] for s in steps] == [1.0] * 3 and not contended
    assert steps_that_count(busy, dropped=0) == (busy["steps"], True)


def test_parity_sees_other_ids_and_the_largest_difference_but_no_order_within_a_step():
    from summary import parity

    def run(losses, ids):
        return {"steps": [{"loss": x, "ids": i, "labels": i} for x, i in zip(losses, ids, strict=True)]}

    ours = run([2.0, 1.001], [[[1, 2], [3]], [[4]]])
    found = parity(ours, run([2.0, 1.0], [[[3], [1, 2]], [[4]]]))
    assert found["same_ids"] and found["largest_relative_difference"] == pytest.approx(1e-3)
    found = parity(ours, run([2.0, 1.0], [[[3], [1, 2]], [[5]]]))
    assert not found["same_ids"] and found["first_other_ids"] == 2


def test_peak_memory_is_counted_from_the_baseline():
    from measure import Memory

    memory = Memory()
    if not memory.how.startswith("VmHWM"):
        pytest.skip("this system does not let a process set back its high-water mark")
    with mmap.mmap(-1, 40_000_000) as block:  # not from the heap, whose free top would not count
        block[::4096] = bytes(len(range(0, len(block), 4096)))
    assert 38e6 < memory.peak() < 80e6
