"""What a run has learned so far, laid into the model it started from: a model folder, also of a run that was cut short.

Knows checkpoints of runs; the arithmetic is `vistune.models.merge`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vistune import console
from vistune import recipe as recipes
from vistune.models import hub
from vistune.models import merge as room
from vistune.models.checkpoints import run as run_format
from vistune.train.keeping import checkpoint


def merge(
    run: Path | str, out: Path | str | None = None, *, base: Path | str | None = None, step: int | None = None
) -> Path:
    """Write the model folder `out` (by default `run/merged`) and return it.

    `run`: a run's folder, of which the last checkpoint (or that of `step`) is taken, or its adapter when no checkpoint
    is left; or one of its checkpoints; or an adapter folder in peft's layout. `base`: what it started from, where that
    has moved. ValueError for a base that does not fit, naming the tensors, and for a folder with nothing to merge.
    """
    run = Path(run)
    target = Path(out) if out is not None else run / "merged"
    if room.is_adapter(run) and not run_format.is_checkpoint(run):
        if step is not None:
            raise ValueError(f"{run}: an adapter has no steps; give the run's folder")
        learned, what = room.read_adapter(run), f"the adapter `{run.name}`"
        start, said = learned.config.base_model_name_or_path or "", dict[str, Any]()
    else:
        learned, start, said, what = _of_run(run, step)
    if not (base or start):
        raise ValueError(f"{run}: does not say what it started from; say it with base")
    folder = hub.resolve(base or start, "base")
    room.merge(folder, target, learned, f"Merged by vistune: {what} in `{Path(base or start).name}`.", **said)
    console.say(f"model folder: {target}")
    return target


def _of_run(run: Path, step: int | None) -> tuple[room.Learned, str, dict[str, Any], str]:
    """What a run's folder holds: what learned, its start folder, what the recipe says of it, and words for a card."""
    saved = [run] if run_format.is_checkpoint(run) else checkpoint.folders(run)
    if step is not None:
        chosen = [folder for folder in saved if checkpoint.step_of(folder) == step]
        if not chosen:
            known = ", ".join(str(checkpoint.step_of(folder)) for folder in saved) or "none"
            raise ValueError(f"{run}: has no checkpoint of step {step}; there are {known}")
    else:
        chosen = saved[-1:]
    if chosen:
        recipe = run_format.recipe_of(chosen[0])
        learned = run_format.read_learned(chosen[0], recipe.lora)
        what = f"step {checkpoint.step_of(chosen[0])} of `{recipe.name}`"
    elif (run / "recipe.toml").exists() and room.is_adapter(run / "adapter"):
        recipe = recipes.read(run / "recipe.toml", [])
        learned, what = room.read_adapter(run / "adapter"), f"the adapter of `{recipe.name}`"
    else:
        raise ValueError(f"{run}: holds neither checkpoints nor an adapter; is this the folder of a run?")
    said = {"template": recipe.model.template, "image": recipe.model.image, "options": recipe.model.options}
    return learned, recipe.model.start, said, what
