"""The verb that checks a recipe, or a model that shall answer, before a GPU is touched. Words in, exit codes out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vistune import cli_models, console


def preflight(
    recipe: Annotated[Path | None, typer.Argument(help="A TOML file; see recipes/. None with --inference.")] = None,
    words: Annotated[list[str] | None, typer.Argument(help="section.key=value laid over it.")] = None,
    gpu: Annotated[str, typer.Option(help="The card: its memory (80GB, meaning GiB) or its name (H100).")] = "80GB",
    gpus: Annotated[int, typer.Option(help="Cards of each machine.")] = 1,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    model: Annotated[str, typer.Option(help="Counted instead of the recipe's start: a folder or a name.")] = "",
    length: Annotated[int, typer.Option(help="Tokens of a pack (of a dialogue), where no data says it.")] = 0,
    images: Annotated[int, typer.Option(help="Pictures in it; -1: as many as fit (one in a dialogue).")] = -1,
    samples: Annotated[int, typer.Option(help="Samples of the data that is not here yet, for the steps.")] = 0,
    mfu: Annotated[float, typer.Option(help="Share of the peak, such as 0.4; 0: of earlier runs, or the usual.")] = 0.0,
    peak_tflops: Annotated[float, typer.Option(help="Of the card; 0: by its name.")] = 0.0,
    inference: Annotated[list[str] | None, typer.Option(help="A model that shall answer; may be repeated.")] = None,
    quantize: Annotated[str, typer.Option(help="With --inference: none, 8bit, 4bit; empty: all three.")] = "",
    batch: Annotated[int, typer.Option(help="With --inference: dialogues at once.")] = 1,
    json: cli_models.Json = False,
) -> None:
    """Say what a run takes before it is begun: steps, memory of each GPU by part, time, whether it fits, and the
    nearest changes that do. Needs no GPU, no weights, and, with --length, --images and --samples, no data."""
    from vistune import recipe as recipes
    from vistune.preflight import check, show
    from vistune.preflight import inference as asking
    from vistune.preflight.steps import Instead

    cli_models.only_json(json)
    if bool(inference) == (recipe is not None):
        raise ValueError("preflight: give a recipe, or --inference MODEL")
    if inference:
        answers = asking.check(inference, gpu=gpu, kinds=quantize, length=length or 2048, images=images, batch=batch)
        if json:
            console.print_json([answer.as_dict() for answer in answers])
        else:
            asking.show(answers)
        if not any(answer.fits for answer in answers):
            raise typer.Exit(1)
        return
    assert recipe is not None
    report = check.check(
        recipes.read(recipe, words or []),
        gpu=gpu,
        gpus=gpus,
        nodes=nodes,
        model=model,
        instead=Instead(length=length, images=images, samples=samples),
        mfu=mfu,
        peak_tflops=peak_tflops,
    )
    if json:
        console.print_json(report.as_dict())
    else:
        show.show(report)
    if not report.fits:
        raise typer.Exit(1)
