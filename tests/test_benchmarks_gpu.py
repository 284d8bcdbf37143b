"""The benchmark of real shapes, run with tiny ones on the CPU; its budget, its table, its data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_path():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


RUN = ("7b_stage2_lora", "onevision_4b_stage1", "fastvlm_1_5b_stage2")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The command itself: every family, with adapters and without; each job in a process forked from this one."""
    import gpu

    folder = tmp_path_factory.mktemp("gpu")
    words = ["--tiny", "--profile", "--cases", ",".join(RUN), "--minutes", "5"]
    code = gpu.main([*words, "--work", str(folder / "work"), "--out", str(folder / "tiny.json")])
    return folder, code, json.loads((folder / "tiny.json").read_text()), (folder / "tiny.md").read_text()


@pytest.mark.slow
def test_every_case_runs_end_to_end(ran):
    from gpu_cases import CASES

    _, code, result, page = ran
    assert code == 0 and not [row["failed"] for row in result["rows"] if "failed" in row]
    run = [case for case in CASES if case.name in RUN]
    wanted = [(case.name, who) for case in run for who in (("vistune", "stock") if case.padded else ("vistune",))]
    assert sorted((row["case"], row["who"]) for row in result["rows"]) == sorted(wanted)
    for row in result["rows"]:
        assert row["tokens"] > row["supervised"] > 0 and row["seconds"] > 0 and row["steps"] == 2
        assert row["useful_flops"] > row["tokens"] > 0
    assert all(case.says in page for case in run) and "tiny shapes: no figure counts" in page


@pytest.mark.slow
def test_both_stacks_see_the_same_samples_and_lose_the_same(ran):
    by = {(row["case"], row["who"]): row for row in ran[2]["rows"]}
    pairs = [(by[case, "vistune"], stock) for (case, who), stock in by.items() if who == "stock"]
    assert len(pairs) == 1
    for ours, stock in pairs:
        assert ours["tokens"] == stock["tokens"] and ours["images"] == stock["images"]
        assert ours["supervised"] == stock["supervised"] and ours["useful_flops"] == stock["useful_flops"]
        assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-5)
        assert len(ours["losses"]) == 3 and len(set(ours["losses"])) == 3
        assert ours["positions"] <= stock["positions"]


@pytest.mark.slow
def test_the_slowest_case_is_profiled(ran):
    told = ran[2]["profile"]
    assert told["kinds"]["products"] > 0 and told["kinds"]["attention"] > 0
    assert sum(told["kinds"].values()) == pytest.approx(told["busy_s"])
    assert "## Profile" in ran[3]


@pytest.mark.slow
def test_real_shapes_have_the_published_parameters(ran, tmp_path):
    """Counts of tests/models/test_llava_sizes.py and test_onevision_sizes.py, without any weight being drawn."""
    from gpu_cases import SHAPES
    from gpu_made import make_data, make_folder, weights

    made = make_data(ran[0] / "work" / "data", 64, tiny=True)  # there already
    wanted = {"llava-7b": 7_063_427_072, "llava-13b": 13_351_494_656, "onevision-4b": 4_741_610_528}
    templates = {"llava": "v1", "onevision15": "qwen2-vl", "fastvlm": "qwen_2"}
    for name, shape in SHAPES.items():
        folder = make_folder(tmp_path / name, shape, made, templates[shape.family])
        entries = weights(folder, torch.device("cpu"), torch.bfloat16)
        count = sum(torch.Size(entry.shape).numel() for entry in entries.values())
        assert count == wanted.get(name, count) > 1e9
        assert not list(folder.glob("*.safetensors"))


def test_a_drawn_weight_follows_from_its_name():
    from gpu_made import drawn

    cpu = torch.device("cpu")
    one, other = (drawn(name, (64, 256), cpu, torch.float32) for name in ("a.weight", "b.weight"))
    assert torch.equal(one, drawn("a.weight", (64, 256), cpu, torch.float32)) and not torch.equal(one, other)
    assert one.std() == pytest.approx(1 / 16, rel=0.05)
    assert drawn("norm.weight", (8,), cpu, torch.float32).eq(1).all()
    assert drawn("x.bias", (8,), cpu, torch.float32).eq(0).all()


class Pool:
    """Answers jobs from a list, in time that a clock is told."""

    def __init__(self, answers, clock, cost):
        self.answers, self.clock, self.cost, self.jobs = answers, clock, cost, []

    def run(self, job, name, limit):
        self.jobs.append(job)
        self.clock.now += self.cost
        return dict(self.answers(job))

    def behind(self, job):
        raise AssertionError("rows without a recipe are not predicted")

    def close(self, seconds): ...


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


GOOD = {
    "tokens": 100,
    "supervised": 30,
    "positions": 100,
    "seconds": 1.0,
    "steps": 2,
    "waited_s": 0.0,
    "useful_flops": 5e9,
    "forward_flops": 1e9,
    "matmul_peak": 1e10,
    "peak_bytes": 8e9,
    "losses": [2.0, 1.0],
    "checkpointing": "none",
    "compile": False,
    "precision": "bf16",
    "device": "made up",
    "order": [[0, 1]],
    "flops": [1.0],
}


def bench(monkeypatch, tmp_path, answers, *, minutes, cost, words=()):
    import gpu

    clock = Clock()
    monkeypatch.setattr(gpu, "time", clock)
    monkeypatch.setattr(gpu.gpu_made, "make_data", lambda *given: None)
    monkeypatch.setattr(
        gpu.Bench,
        "job",
        lambda self, name, who, seconds: {
            "case": name,
            "who": who,
            "seconds": seconds,
            "checkpointing": self.levels.get((name, who)),
        },
    )
    asked = gpu.arguments(["--tiny", "--minutes", str(minutes), "--out", str(tmp_path / "x.json"), *words])
    asked.rounds = 3
    made = gpu.Bench(asked, tmp_path)
    made.pool = Pool(answers, clock, cost)
    made.all()
    return made


def test_repeats_are_dropped_before_cases(monkeypatch, tmp_path):
    made = bench(monkeypatch, tmp_path, lambda job: GOOD, minutes=9, cost=50.0)
    assert [row["round"] for row in made.result["rows"]] == [1] * 10
    assert {drop["round"] for drop in made.result["dropped"]} == {2, 3}
    made = bench(monkeypatch, tmp_path, lambda job: GOOD, minutes=9, cost=20.0)
    assert [row["round"] for row in made.result["rows"]].count(1) == 10 < len(made.result["rows"])
    assert all(3.0 <= job["seconds"] <= 20.0 for job in made.pool.jobs)


def test_what_does_not_fit_is_tried_again_with_more_recomputation(monkeypatch, tmp_path):
    def answer(job):
        fits = job["checkpointing"] == "full" or job["who"] == "stock"
        return GOOD | {"checkpointing": "full"} if fits else {"failed": "out of memory: 80 GB were not enough"}

    made = bench(monkeypatch, tmp_path, answer, minutes=60, cost=1.0, words=["--cases", "7b_stage2"])
    ours = [job["checkpointing"] for job in made.pool.jobs if job["who"] == "vistune"]
    assert ours == [None, "selective", "full", "full", "full"]  # remembered in the repeats
    assert not [row for row in made.result["rows"] if "failed" in row]


def test_a_case_that_fails_costs_its_row_alone(monkeypatch, tmp_path):
    from gpu_table import markdown

    answer = lambda job: {"failed": "ended with code -11; x"} if job["case"] == "7b_stage2" else GOOD  # noqa: E731
    made = bench(monkeypatch, tmp_path, answer, minutes=60, cost=1.0)
    page = markdown(made.result)
    assert "ended with code -11" in page and page.count("1.00x") == 3
    assert len([row for row in made.result["rows"] if "failed" not in row]) == 3 * 8


def test_the_table_counts_what_is_computed_twice_apart():
    from gpu_table import hfu, mfu, summary

    once, twice = GOOD, GOOD | {"checkpointing": "full"}
    assert mfu(once) == hfu(once) == mfu(twice) == pytest.approx(0.5) and hfu(twice) == pytest.approx(0.6)
    assert hfu(GOOD | {"checkpointing": "selective"}) is None
    rows = [
        GOOD | {"case": "a", "who": "vistune", "round": 1, "tokens": 300},
        GOOD | {"case": "a", "who": "vistune", "round": 2, "tokens": 100},
        GOOD | {"case": "a", "who": "stock", "round": 1, "losses": [2.5, 1.0]},
    ]
    ours, stock = summary(rows)
    assert ours["tokens_per_s"] == 200 and stock["ratio"] == 2.0 and stock["first_loss_difference"] == 0.5


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "products"),
        ("aten::addmm", "products"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_NNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("vistune::packed_attention", "attention"),
        ("aten::_fused_adamw_", "optimizer"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("aten::copy_", "copies"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("aten::mul", "norms and elementwise"),
        ("triton_red_fused_add_mean_mul_pow_rsqrt_3", "norms and elementwise"),
        ("aten::_log_softmax", "loss"),
        ("ncclDevKernel_AllGather_RING_LL", "collectives"),
        ("cudnn::cnn::implicit_convolve_sgemm", "convolutions"),
        ("something new", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(name, kind):
    import kinds

    assert kinds.kind(name) == kind
