"""One stage, top to bottom: recipe -> model, data, plan -> steps -> run folder -> model folder.

The table of contents of training; every line of `run` is a room of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vistune import console, inputs, ranks
from vistune.data.batch import Batch
from vistune.data.index import Index
from vistune.data.loader import load as load_batches
from vistune.data.plan import Plan
from vistune.inputs import Data
from vistune.models import filling
from vistune.models import load as models
from vistune.recipe import Recipe, dump
from vistune.train import adapters, evaluating, learn, metrics
from vistune.train.guarding import lock
from vistune.train.guarding.quarantine import Ledger
from vistune.train.guarding.watchdog import Watchdog
from vistune.train.keeping import checkpoint, export, record
from vistune.train.keeping.saving import Saver
from vistune.train.learn import Learned
from vistune.train.loop import Loop, State, line
from vistune.train.measuring.rounds import Rounds
from vistune.train.spreading import parallel, precision
from vistune.train.step import StepModule
from vistune.train.updating.optimizer import Optimizer


def run(recipe: Recipe) -> dict[str, Any]:
    """Run the stage that `recipe` describes, or the rest of it if `recipe.run` holds checkpoints of it.

    Returns the summary that is also written to `summary.json`: steps, losses, seconds, the model folder.
    Raises ValueError for what the user can mend, Interrupted after a signal.
    """
    device = ranks.start(recipe.train.device, recipe.parallel.timeout, group=recipe.parallel.offload)
    try:
        with Watchdog(recipe.parallel.timeout) as watch, lock.alone(Path(recipe.run)):
            return _run(recipe, device, watch)
    finally:
        ranks.stop()


def _run(recipe: Recipe, device: torch.device, watch: Watchdog) -> dict[str, Any]:
    precision.allow_tf32(recipe.train.tf32, device)
    folder = claim(recipe)
    loaded = load_model(recipe)
    learned = learn.apply(loaded.model, loaded.family, recipe)
    show_parts(loaded, learned)
    data = read_data(recipe, loaded, folder)
    asked = evaluating.read(recipe, loaded, folder)
    loop = make_loop(recipe, folder, device, loaded, learned, data)
    record.write_environment(folder, recipe, data.index, loop)
    if done := record.finished(folder, loop):
        return done
    be_watched(watch, recipe, folder, data, loop)
    train(recipe, folder, loaded, learned, data, loop, asked)
    watch.beat(loop.state.step, "finish", [])
    return finish(recipe, folder, loaded, data, loop)


def claim(recipe: Recipe) -> Path:
    """The run folder, made or found again. Raises ValueError if it holds another recipe's run, or something else."""
    folder = Path(recipe.run)
    ranks.on_first(lambda: _claim(folder, recipe))
    return folder


def _claim(folder: Path, recipe: Recipe) -> None:
    lock.refuse_foreign(folder)
    with checkpoint.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.clean(folder)
    if saved := checkpoint.folders(folder):
        _refuse_other(recipe, saved[-1])
    with checkpoint.disk_errors(folder):
        record.write(folder / "recipe.toml", dump(recipe))


def _refuse_other(recipe: Recipe, saved: Path) -> None:
    differ = checkpoint.differences(checkpoint.read_state(saved)["recipe"], recipe)
    if differ:
        raise ValueError(
            f"{saved} is of another recipe: {'; '.join(differ[:6])}{' ...' if len(differ) > 6 else ''}. "
            "Give the old values to go on, or another folder with run=DIR to start anew. "
            f"These may differ: {', '.join(checkpoint.MAY_DIFFER)}, ranks, and train.steps under a constant schedule."
        )


def load_model(recipe: Recipe) -> models.Loaded:
    """The model in outline: nothing of it is in memory before it is known where and how it lies."""
    said = recipe.model
    return models.outline(said.start, template=said.template, image=said.image, options=said.options)


def show_parts(loaded: models.Loaded, learned: list[Learned]) -> None:
    rows = learn.describe(loaded.model, loaded.family, learned)
    console.table(
        f"{loaded.family.name}: what learns",
        ("part", "parameters", "learning", "lr"),
        [(part, f"{total:,}", f"{learning:,}", rates) for part, total, learning, rates in rows],
    )


def read_data(recipe: Recipe, loaded: models.Loaded, folder: Path) -> Data:
    """Open the sources, index them (rank 0; the others read its cache), and lay the plan."""
    data = inputs.read(recipe, loaded, folder / "index")
    _show_plan(recipe, data.index, data.plan)
    return data


def _show_plan(recipe: Recipe, index: Index, plan: Plan) -> None:
    facts = plan.describe()
    console.table("the data", ("what", "value"), [(k.replace("_", " "), _number(v)) for k, v in facts.items()])
    if len(sources := inputs.sources_of(recipe.data)) > 1:
        names = [source.name or Path(source.path).name for source in sources]
        each = zip(names, plan.order.good, plan.order.taken, strict=True)
        console.table("an epoch", ("source", "usable", "samples"), [(n, f"{g:,}", f"{t:,}") for n, g, t in each])
    if index.faults:
        console.warn(f"{len(index.faults)} of {len(index)} rows are set aside; see quarantine.jsonl in the run folder")


def _number(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def make_loop(
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    loaded: models.Loaded,
    learned: list[Learned],
    data: Data,
) -> Loop:
    """Lay the model out as the recipe says, fill it, and give it an optimizer and a ledger. The parameters of `learned`
    are other objects after that: it is made again, in place."""
    dtype = precision.compute_dtype(recipe.train.precision, device)
    module = StepModule(loaded.model, loaded.family, loaded.layout, dtype)
    masters = lay_out(recipe, device, loaded, learned, module)
    stochastic = recipe.train.precision == "bf16_stochastic" and dtype == torch.bfloat16
    rounding_seed = recipe.train.seed if stochastic else None
    optimizer = Optimizer(recipe.optimizer, learned, data.plan.steps, masters, rounding_seed)
    ledger = Ledger(folder, len(data.index), recipe.data.quarantine_cap, recipe.data.strict)
    ledger.add(data.index.faults)
    state = State()
    if dtype == torch.float16:
        state.scale.value = 65536.0
    return Loop(
        recipe=recipe,
        module=module,
        optimizer=optimizer,
        device=device,
        dtype=dtype,
        steps=data.plan.steps,
        state=state,
        ledger=ledger,
        flops=_flops(loaded, recipe),
        peak=recipe.log.peak_tflops * 1e12 or metrics.measure_peak(device, dtype),
        report=lambda row: None,
        save=lambda state: None,
    )


def lay_out(
    recipe: Recipe,
    device: torch.device,
    loaded: models.Loaded,
    learned: list[Learned],
    module: StepModule,
) -> dict[str, torch.Tensor]:
    """The model in outline typed, wrapped, sharded and filled. Returns fp32 masters of half-precision weights, this
    rank's part, where the precision has some."""
    precision.lay(loaded.model, recipe.train.precision, module.dtype)
    parallel.prepare(module, loaded.model, loaded.family, recipe, device)
    true_half = recipe.train.precision == "bf16_true" and module.dtype != torch.float32
    exact = [one.name for one in learned] if true_half else []
    initial = partial(adapters.initial, seed=recipe.train.seed, stored=models.stored_tensors(loaded))
    masters = filling.fill(loaded, device, parallel.home(recipe, device), initial, exact)
    learned[:] = learn.again(loaded.model, learned)
    return masters


def _flops(loaded: models.Loaded, recipe: Recipe) -> Callable[[Batch], float]:
    adapted = recipe.lora.parts if recipe.lora.r else []  # their own weights are frozen
    learns = [key for key in recipe.learn.root if key.split(".")[0] not in adapted]

    def count(batch: Batch) -> float:
        return loaded.family.flops(
            loaded.model.config,
            lengths=batch.lengths,
            images=batch.images,
            supervised=len(batch.targets),
            learn=learns,
            grids=batch.grids,
        )

    return count


def be_watched(watch: Watchdog, recipe: Recipe, folder: Path, data: Data, loop: Loop) -> None:
    """The loop's beats go to the watchdog, which gets to know how samples are called and which come in a step."""

    def planned(step: int, rank: int) -> list[tuple[int, int]]:
        micros = data.plan.micro_batches(step - 1, rank, ranks.world(), recipe.train.micro_batch)
        columns = data.index.columns
        positions = [position for micro in micros for pack in micro for position in pack]
        return [(int(columns["source"][position]), int(columns["row"][position])) for position in positions]

    def beat(phase: str, keys: list[tuple[int, int]]) -> None:
        watch.beat(loop.state.step + (phase not in ("save", "evaluate")), phase, keys)

    watch.folder, watch.planned = folder, planned
    watch.sources = [source.name or Path(source.path).name for source in inputs.sources_of(recipe.data)]
    loop.beat = beat


def train(
    recipe: Recipe,
    folder: Path,
    loaded: models.Loaded,
    learned: list[Learned],
    data: Data,
    loop: Loop,
    asked: evaluating.Asked | None = None,
) -> None:
    """Resume or try a save, then all the steps that are left, with everybody told."""
    followed = parallel.followed(loaded.model)
    tensors = checkpoint.tensors(learned, loop.optimizer, followed)
    complete = export.completing(recipe, loaded) if ranks.is_first() else None
    saver = Saver(folder, recipe.checkpoint.keep, recipe.checkpoint.background, complete)

    def save(state: State, then: Callable[[], None] | None = None) -> None:
        saved = {
            "state": state.as_dict(),
            "recipe": recipe.model_dump(mode="json"),
            "index": data.index.hash,
            "quarantine": loop.ledger.state(),
        }
        now = checkpoint.tensors(learned, loop.optimizer, followed)
        saver.save(state.step, now, saved, then)

    if saved := checkpoint.folders(folder):
        loop.state = State.from_dict(_take_up(saved[-1], tensors, data))
        loop.ledger.restore(checkpoint.read_state(saved[-1])["quarantine"])
        loop.optimizer.write_back()
        console.say(f"going on from {saved[-1]}, step {loop.state.step} of {loop.steps}")
    else:
        save(loop.state)
        saver.wait()
        dry_run(folder, loaded)
    report = metrics.Report(folder, recipe) if ranks.is_first() else None
    loop.save, loop.ending = save, saver.failed

    def tell(row: dict[str, Any]) -> None:
        if report is not None:
            report.step(row)
            if row["step"] % recipe.log.every == 0 or row["step"] == loop.steps:
                console.say(line(row, loop.steps))

    loop.report = tell
    evaluator = evaluate(recipe, loaded, loop, asked, saver, save, report) if asked else None
    try:
        with saver:
            if evaluator is not None:
                evaluator.make_up()
            loop.run(batches_left(recipe, data, loop))
    finally:
        if report is not None:
            report.stop()


def evaluate(
    recipe: Recipe,
    loaded: models.Loaded,
    loop: Loop,
    asked: evaluating.Asked,
    saver: Saver,
    save: evaluating.Save,
    report: metrics.Report | None,
) -> evaluating.Evaluator:
    """Have the loop stop where an evaluation is due, with everybody told."""

    def beat(what: str) -> None:
        loop.beat("evaluate", [])
        loop.note(what)

    rounds = Rounds(recipe, loaded, loop.module, loop.device, loop.dtype, beat, lambda: loop.stopping())
    tell = report.evaluated if report is not None else lambda figures: None
    evaluator = evaluating.Evaluator(asked, rounds, loop, saver, save, tell)
    loop.asks, loop.evaluate = evaluator.due, evaluator.evaluate
    return evaluator


def batches_left(recipe: Recipe, data: Data, loop: Loop) -> Iterator[list[Batch]]:
    """This rank's batches of the steps that are left."""
    return load_batches(
        data.plan,
        data.readers,
        data.language,
        start_step=loop.state.step,
        stop_step=loop.steps,
        rank=ranks.rank(),
        world=ranks.world(),
        packs_per_micro=recipe.train.micro_batch,
        pad_to=inputs.pad_to(recipe, loop.device.type, recipe.train.micro_batch),
        workers=recipe.data.workers,
        alike=parallel.sharded(recipe),
    )


def _take_up(saved: Path, tensors: dict[str, torch.Tensor], data: Data) -> dict[str, Any]:
    """Load a checkpoint in place; refuses one whose data has changed since."""
    known = checkpoint.read_state(saved)
    if known["index"] != data.index.hash:
        raise ValueError(
            f"{saved}: the data, its tokenizer, its template or its pictures' layout changed since this checkpoint "
            f"(index {known['index'][:12]} then, {data.index.hash[:12]} now). "
            "Put them back, or start anew with run=DIR."
        )
    return checkpoint.load(saved, tensors)["state"]


def dry_run(folder: Path, loaded: models.Loaded) -> None:
    """Try the model folder before the first step, so that what would fail at the end fails now."""
    ranks.on_first(lambda: _try_export(folder, loaded))


def _try_export(folder: Path, loaded: models.Loaded) -> None:
    with checkpoint.disk_errors(folder):
        needed = sum(entry.nbytes for entry in loaded.source.values())
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ValueError(
                f"run {folder}: the model folder at the end needs about {needed / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB are free. Make room, or give another folder with run=DIR."
            )
        models.check_save(loaded, folder / "model.dry")


def finish(recipe: Recipe, folder: Path, loaded: models.Loaded, data: Data, loop: Loop) -> dict[str, Any]:
    """Write the model folder and the summary."""
    rows = metrics.read(folder) if ranks.is_first() else []
    summary = ranks.from_first(record.summarize(folder, rows, loop) | evaluating.summary(folder) if rows else {})
    model = export.write(recipe, folder, loaded, record.card(recipe, data.index, summary))
    if ranks.is_first():
        with checkpoint.disk_errors(folder):
            record.write(folder / "summary.json", json.dumps(summary, indent=2))
    console.say(f"model folder: {model}")
    if (known := summary.get("best")) and known["step"] != summary["steps"]:
        console.say(evaluating.how_to_use(known))
    return summary
