"""The command line: verbs in, exit codes out. Each verb's work is done elsewhere and imported when it is asked for,
so that `--help` answers at once.

Exit codes: 0 done; 1 done, and the answer is no (a proof failed); 2 a mistake, named on stderr; 3 a rank stood still or
was lost; 130, 143 stopped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vistune import __version__, cli_data, cli_evaluate, cli_models, cli_preflight, cli_serve, console

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Assemble, train, check, evaluate and serve LLaVA-family vision-language models.",
)
app.add_typer(cli_data.app, name="data")

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder of the run; made anew.")] = Path("runs/quickstart"),
    quick: Annotated[bool, typer.Option(help="A shortened run that only shows that everything works.")] = False,
    seed: int = 0,
    json: cli_models.Json = False,
) -> None:
    """Watch a small LLaVA being assembled, aligned, instruction-tuned, evaluated on pictures it has never seen, and
    asked a question: real handwritten digits, two CPU cores, a few minutes."""
    from vistune.quickstart import run as quick_run

    cli_models.only_json(json)
    summary = quick_run.run(out, quick=quick, seed=seed)
    if json:
        console.print_json(summary)


_VERBS: tuple[Callable[..., None], ...] = (
    *(cli_models.assemble, cli_models.convert, cli_models.merge, cli_models.fetch),
    *(cli_preflight.preflight, cli_evaluate.evaluate, cli_evaluate.score, cli_evaluate.report, cli_serve.serve),
)
for _verb in _VERBS:
    app.command()(_verb)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML file; see recipes/.")],
    words: Annotated[list[str] | None, typer.Argument(help="section.key=value laid over it; run=DIR.")] = None,
    json: cli_models.Json = False,
) -> None:
    """Train one stage. The same command takes an interrupted run up again. Under torchrun: one process per GPU."""
    from vistune import recipe as recipes
    from vistune.train import stage
    from vistune.train.guarding.out_of_memory import OutOfMemory

    cli_models.only_json(json)
    wanted = recipes.read(recipe, words or [])
    try:
        summary = stage.run(wanted)
    except OutOfMemory as error:
        raise ValueError(f"{error} {_counted(wanted, error.lengths, error.images)}") from error
    if json:
        console.print_json(summary)


def _counted(recipe: Any, lengths: list[int], images: int) -> str:
    """What preflight counts for the micro-batch that had no memory."""
    from vistune.preflight import check

    try:
        return check.figure(recipe, lengths, images, gpus=int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        return f"preflight could not count it: {error}"


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A model in any format, the folder of a finished run, or a hub id.")],
    image: Annotated[list[Path] | None, typer.Option(help="A picture for the first question; may be repeated.")] = None,
    ask: Annotated[str, typer.Option(help="One question; without it you are asked for them.")] = "",
    max_new_tokens: int = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.2,
    top_p: float = 1.0,
    seed: int = 0,
    quantize: Annotated[
        str, typer.Option(help="8bit or 4bit: the language model's matrices; empty: as they are.")
    ] = "",
    base: Annotated[str, typer.Option(help="The other half of a model that is an adapter alone.")] = "",
    device: Device = "auto",
) -> None:
    """Ask a model about pictures. Several turns; `/image FILE` adds a picture, `/new` starts over, Ctrl-D ends."""
    from vistune import generate

    settings = generate.Settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    loaded = generate.open_model(model, device, quantize, base or None)
    generate.converse(loaded, list(image or []), ask, settings)


@app.command()
def doctor(
    run_folder: Annotated[Path, typer.Argument(help="Where runs are to be written.")] = Path("runs"),
    only: Annotated[list[str] | None, typer.Option(help="Look at this group alone; may be repeated.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one import may take; 0: as it sees fit.")] = 0.0,
    json: cli_models.Json = False,
) -> None:
    """Find out whether this machine can train, and what to change. Runs on Python alone, where nothing else imports.
    Under torchrun: also whether the ranks reach each other."""
    from vistune.doctor import imports, run

    raise typer.Exit(run.examine(run_folder, json=json, only=only, timeout=timeout or imports.TIMEOUT))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        result: Any = app(args=arguments, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as done:
        return done.exit_code
    except typer.Abort:
        return 130
    except KeyboardInterrupt:
        console.err.print("stopped", markup=False)
        return 130
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - whoever read us is gone; python flushes once more at exit
        return 0
    except Exception as error:  # noqa: BLE001 - what is not a user's mistake is raised again
        return _explain(error)


def _explain(error: Exception) -> int:
    """One sentence for a user's mistake; a stack of frames only for a fault of ours."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's own: an unknown option, ...
        console.fail(error.format_message())
        return 2
    if type(error).__name__ == "Interrupted":  # of the training loop, which is not imported here
        console.err.print(str(error), markup=False)
        return int(error.code)  # type: ignore[attr-defined]
    if type(error).__name__ == "SaidElsewhere":  # of vistune.ranks: rank 0 says it
        return 2
    if isinstance(error, ValueError) and not os.environ.get("VISTUNE_TRACEBACK"):
        console.fail(str(error))
        return 2
    raise error


if __name__ == "__main__":
    main()
