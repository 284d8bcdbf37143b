"""A stage end to end on tiny models: packed = unpacked, accumulation, resume bit for bit, what is refused, what is set
aside, what a checkpoint holds."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.made import made_data, made_recipe
from tests.runs import finish_run, run_both, start_run
from vistune import recipe as recipes
from vistune.train import learn, loop, metrics, stage
from vistune.train.keeping import checkpoint
from vistune.train.spreading import precision as precisions

pytestmark = pytest.mark.usefixtures("one_thread")


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics.read(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted((run / "model").glob("*.safetensors")) for k, v in load_file(file).items()}


def one_step_gradients(recipe: recipes.Recipe) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step, before clipping and update."""
    folder = stage.claim(recipe)
    loaded = stage.load_model(recipe)
    learned = learn.apply(loaded.model, loaded.family, recipe)
    read = stage.read_data(recipe, loaded, folder)
    made = stage.make_loop(recipe, folder, torch.device("cpu"), loaded, learned, read)
    batches = next(
        stage.load_batches(
            read.plan, read.readers, read.language, start_step=0, stop_step=1, packs_per_micro=recipe.train.micro_batch
        )
    )
    loss = made._backward(batches, sum(len(b.targets) for b in batches))
    return float(loss), {one.name: one.parameter.grad for one in learned}


def assert_same_step(one, other):
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


LEARN_ALL = {"connector": 1e-3, "language": 2e-4, "vision.layers.-2:": 1e-5}


def test_packed_equals_unpacked(start, data, tmp_path):
    """With and without images, one image or several per sample: loss and every gradient of one step."""
    packed = made_recipe(start, data, tmp_path / "a", learn=LEARN_ALL)
    unpacked = made_recipe(start, data, tmp_path / "b", learn=LEARN_ALL, data={"pack": False})
    assert_same_step(one_step_gradients(packed), one_step_gradients(unpacked))


def test_four_micro_batches_equal_one(start, data, tmp_path):
    """Supervised counts of the micro-batches are unequal; the denominator is the whole step's."""
    many = made_recipe(start, data, tmp_path / "a", data={"pack": False}, train={"batch": 4, "micro_batch": 1})
    one = made_recipe(start, data, tmp_path / "b", data={"pack": False}, train={"batch": 4, "micro_batch": 4})
    assert_same_step(one_step_gradients(many), one_step_gradients(one))


def test_activation_checkpointing_changes_nothing(start, data, tmp_path):
    plain = made_recipe(start, data, tmp_path / "a", learn=LEARN_ALL)
    saving = made_recipe(start, data, tmp_path / "b", learn=LEARN_ALL, train={"checkpointing": "full"})
    assert_same_step(one_step_gradients(plain), one_step_gradients(saving))


def test_head_multiplies_supervised_rows_only(start, data, tmp_path, monkeypatch):
    """Counts the rows of every product with the head's weight in one step, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    counted = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default and out.shape[-1] == vocabulary:
                counted.append(out.shape[0])
            return out

    recipe = made_recipe(start, data, tmp_path / "a", learn={"connector": 1e-3})
    vocabulary = json.loads((start / "config.json").read_text())["text_config"]["vocab_size"]
    with Count():
        one_step_gradients(recipe)
    index = stage.read_data(recipe, stage.load_model(recipe), tmp_path / "a")
    assert sum(counted) == index.plan.supervised(0) < index.plan.index.tokens(range(8)).sum() / 2


def test_only_what_is_named_changes_and_the_stock_class_opens_it(start, data, tmp_path):
    run = tmp_path / "run"
    summary = stage.run(made_recipe(start, data, run, learn={"connector": 1e-2}))
    before, after = load_file(start / "model.safetensors"), weights(run)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert before.keys() == after.keys() and changed and all("multi_modal_projector" in k for k in changed)
    assert summary["losses"][-1] < summary["losses"][0]
    model = AutoModelForImageTextToText.from_pretrained(run / "model")
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert "made" in (run / "model" / "README.md").read_text()


def test_a_connector_checkpoint_holds_only_the_connector(start, data, tmp_path):
    run = tmp_path / "run"
    stage.run(made_recipe(start, data, run, learn={"connector": 1e-3}, train={"steps": 2}))
    from torch.distributed.checkpoint import FileSystemReader

    folder = checkpoint.folders(run)[-1]
    names = FileSystemReader(folder).read_metadata().state_dict_metadata.keys()
    assert names and all("multi_modal_projector" in name for name in names)
    assert {name.split("/")[0] for name in names} == {"model", "optimizer"}
    assert sum(f.stat().st_size for f in folder.iterdir()) < 0.25 * (start / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "precision",
    [
        "fp32",
        pytest.param("bf16", marks=pytest.mark.slow),
        pytest.param("bf16_true", marks=pytest.mark.slow),
        pytest.param("fp16", marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_for_bit(start, data, tmp_path, precision, monkeypatch):
    """Stopped by a fault after step 3, taken up from the checkpoint of step 2."""
    monkeypatch.setattr(precisions, "has_bf16", lambda device: True)  # also on a CPU that only imitates it
    train = {"precision": precision, "batch": 4}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stage.run(made_recipe(start, data, whole, train=train))
    real = loop.Loop.step

    def failing(self, *args):
        if self.state.step == 3:
            raise RuntimeError("power cut")
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(loop.Loop, "step", failing)
        stage.run(made_recipe(start, data, broken, train=train))
    stage.run(made_recipe(start, data, broken, train=train))
    assert losses(broken) == losses(whole) and len(losses(whole)) == 6
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(broken)[name]), name


@pytest.mark.slow
def test_kill_at_random_moments(start, data, tmp_path):
    """kill -9 ten times, saves included (every step saves), then to the end: the same losses and weights."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    recipe = made_recipe(start, data, whole, train={"steps": 24, "batch": 4}, checkpoint={"every": 1})
    finish_run(start_run(recipe, tmp_path), tmp_path)
    draw = random.Random(1)
    kills = 0
    for _ in range(10):
        before = checkpoint.folders(killed)[-1:]
        process = start_run(recipe, tmp_path, f"run={killed}")
        while process.is_alive() and checkpoint.folders(killed)[-1:] == before:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.1)
        kills += process.is_alive()
        process.kill()
        process.join()
    finish_run(start_run(recipe, tmp_path, f"run={killed}"), tmp_path)
    assert kills >= 5
    assert losses(killed) == losses(whole)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(killed)[name]), name


def test_sigterm_saves_and_the_same_command_goes_on(start, data, tmp_path):
    run = tmp_path / "run"
    recipe = made_recipe(start, data, run, train={"steps": 30, "batch": 4}, checkpoint={"every": 1000})
    process = start_run(recipe, tmp_path)
    while not (run / "metrics.jsonl").exists() or not metrics.read(run):
        assert process.is_alive()
        time.sleep(0.01)
    process.terminate()
    output = finish_run(process, tmp_path, code=143)
    assert 0 < int(checkpoint.folders(run)[-1].name.split("-")[1]) < 30 and "goes on from there" in output
    finish_run(start_run(recipe, tmp_path), tmp_path)
    assert len(losses(run)) == 30


def test_ctrl_c_with_workers_saves_once(start, data, tmp_path):
    """A terminal sends SIGINT to the data workers too; only the run itself listens."""
    run = tmp_path / "run"
    recipe = made_recipe(start, data, run, data={"workers": 2}, train={"steps": 200, "batch": 4})
    process = start_run(recipe, tmp_path)
    while not (run / "metrics.jsonl").exists() or not metrics.read(run):
        assert process.is_alive()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output = finish_run(process, tmp_path, code=130)
    assert output.count("saving after this step") == 1 and checkpoint.folders(run)


@pytest.mark.slow
def test_two_ranks_equal_one(start, data, tmp_path):
    """The samples of every step are the same set and order; losses agree to 1e-5; a run of one goes on as two."""
    one, two, more = tmp_path / "one", tmp_path / "two", tmp_path / "more"
    recipe = made_recipe(start, data, one, checkpoint={"every": 3, "keep": 9})
    finish_run(start_run(recipe, tmp_path), tmp_path)
    run_both(recipe, tmp_path, f"run={two}")
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    counts = [
        [[row[k] for k in ("tokens", "supervised", "samples")] for row in metrics.read(run)] for run in (one, two)
    ]
    assert counts[0] == counts[1]
    shutil.copytree(one, more, ignore=shutil.ignore_patterns("model", "summary.json", "step-00000006"))
    assert "step 3 of 6" in run_both(recipe, tmp_path, f"run={more}")
    assert losses(more) == pytest.approx(losses(one), abs=1e-5)


def test_another_recipe_is_named_and_refused(start, data, tmp_path):
    run = tmp_path / "run"
    stage.run(made_recipe(start, data, run, train={"steps": 2}))
    with pytest.raises(ValueError, match=r"train\.batch: 8 -> 4.*May|train\.batch: 8 -> 4"):
        stage.run(made_recipe(start, data, run, train={"steps": 2, "batch": 4}))
    stage.run(made_recipe(start, data, run, train={"steps": 2}, log={"every": 2}, checkpoint={"keep": 1}))


@pytest.mark.slow
def test_steps_may_grow_under_a_constant_schedule(start, data, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    constant = {"schedule": "constant", "warmup": 0}
    stage.run(made_recipe(start, data, run, optimizer=constant, train={"steps": 2}))
    assert stage.run(made_recipe(start, data, run, optimizer=constant, train={"steps": 4}))["steps"] == 4
    stage.run(made_recipe(start, data, whole, optimizer=constant, train={"steps": 4}))
    assert losses(run) == losses(whole)


def test_changed_data_is_refused(start, tmp_path):
    data = made_data(tmp_path / "data")
    run = tmp_path / "run"
    constant = {"schedule": "constant", "warmup": 0}
    stage.run(made_recipe(start, data, run, optimizer=constant, train={"steps": 2}))
    rows = json.loads(data.read_text())
    rows[0]["conversations"][1]["value"] += " And more."
    data.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="the data, its tokenizer, its template"):
        stage.run(made_recipe(start, data, run, optimizer=constant, train={"steps": 4}))


def test_a_picture_that_breaks_after_the_index_goes_to_the_ledger(start, tmp_path):
    data = made_data(tmp_path / "data")
    run = tmp_path / "run"
    picture = data.parent / "images" / "0_0.png"
    picture.write_bytes(picture.read_bytes()[:60])  # a header and no pixels: only decoding shows it
    summary = stage.run(made_recipe(start, data, run, train={"steps": 3}))
    rows = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert [(r["row"], r["code"]) for r in rows] == [(0, "image_broken")] and rows[0]["path"] == str(picture)
    assert summary["quarantined"] == 1 and len(summary["losses"]) == 3
    with pytest.raises(ValueError, match=r"data\.strict.*data\.json:0.*image_broken"):
        stage.run(made_recipe(start, data, tmp_path / "strict", data={"strict": True}))


def test_above_the_cap_the_run_stops_with_exit_code_2(start, tmp_path):
    data = made_data(tmp_path / "data", rows=40)
    for picture in sorted((data.parent / "images").iterdir())[:20]:
        picture.unlink()
    recipe = made_recipe(start, data, tmp_path / "run")
    output = finish_run(start_run(recipe, tmp_path), tmp_path, code=2)
    assert "more than the 10 that data.quarantine_cap allows" in output and "Traceback" not in output


def test_non_finite_steps_are_skipped_then_stop_with_the_samples(start, data, tmp_path, monkeypatch):
    real = loop.Loop._backward
    monkeypatch.setattr(loop.Loop, "_backward", lambda self, *a: real(self, *a) * float("nan"))
    with pytest.raises(ValueError, match=r"not finite, 3 steps in a row.*\(source, row\): \[\(0, "):
        stage.run(made_recipe(start, data, tmp_path / "run", train={"nonfinite_limit": 3}))
    rows = metrics.read(tmp_path / "run")
    assert [row["nonfinite"] for row in rows] == [1, 2]


def test_lora_trains_saves_and_merges(start, data, tmp_path):
    run = tmp_path / "run"
    learn_lora = {"connector": 1e-3, "language": 1e-2}
    stage.run(made_recipe(start, data, run, learn=learn_lora, lora={"r": 4, "alpha": 8}, train={"steps": 3}))
    before, after = load_file(start / "model.safetensors"), weights(run)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert before.keys() == after.keys()
    assert any("q_proj" in k and "language" in k for k in changed)
    assert not any("vision" in k or "lm_head" in k or "norm" in k for k in changed)
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert adapter and all(".lora_" in k and "vision" not in k for k in adapter)


def test_a_folder_that_is_something_else_is_not_touched(start, data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no run of vistune"):
        stage.run(made_recipe(start, data, tmp_path / "mine"))


def test_unknown_learn_keys(start, data, tmp_path):
    for key, message in (
        ("visoin", "no part 'visoin'"),
        ("vision.blocks", "layers.N"),
        ("vision.layers.9", "3 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            stage.run(made_recipe(start, data, tmp_path / key, learn={key: 1e-3}))


@pytest.mark.parametrize(
    ("precision", "kind", "has", "dtype"),
    [
        ("bf16", "cuda", True, torch.bfloat16),
        ("bf16", "cuda", False, torch.float16),
        ("bf16_true", "cpu", True, torch.bfloat16),
        ("bf16", "cpu", False, torch.float32),
        ("fp16", "cuda", True, torch.float16),
        ("fp32", "cuda", True, torch.float32),
    ],
)
def test_a_device_without_bf16_gets_another_type_and_says_so(precision, kind, has, dtype, monkeypatch, capsys):
    monkeypatch.setattr(precisions, "has_bf16", lambda device: has)
    assert precisions.compute_dtype(precision, torch.device(kind)) == dtype
    assert ("has no bf16 instructions" in capsys.readouterr().err) == (not has)


def test_a_mistake_that_rank_0_finds_ends_both_with_one_sentence(start, data, tmp_path):
    run = tmp_path / "run"
    recipe = made_recipe(start, data, run, train={"steps": 2})
    stage.run(recipe)
    output = run_both(recipe, tmp_path, "train.batch=4", code=2)
    assert output.count("train.batch: 8 -> 4") == 1
    assert (tmp_path / "output-1.txt").read_text().count("error") == 0
