"""The verbs about how good a model is and what a run did: evaluate, score, report. Words in, exit codes out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vistune import console
from vistune.cli_models import Json, only_json

Data = Annotated[Path, typer.Option(help="Folder of the benchmark's official files, or of several such folders.")]
Images = Annotated[Path | None, typer.Option(help="Where its pictures lie, if not beside its files.")]
JudgeUrl = Annotated[str, typer.Option("--judge", help="OpenAI-compatible URL of a judge, up to /v1.")]
JudgeModel = Annotated[str, typer.Option(help="The judge's name there.")]
JudgeKey = Annotated[str, typer.Option(help="Environment variable that holds the judge's key.")]


def evaluate(
    model: Annotated[str, typer.Argument(help="A model in any format, a run, a hub id, or the URL of a server.")],
    benchmark: Annotated[str, typer.Option(help="Names, with commas between: pope,mme,textvqa; see evaluate.md.")],
    data: Data,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; empty: evaluation/ of the run.")] = None,
    images: Images = None,
    batch: Annotated[int, typer.Option(help="Questions answered at once.")] = 16,
    limit: Annotated[int, typer.Option(help="So many questions of each, spread over it; 0: all.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Instead of the protocol's; it is then said.")] = 0,
    quantize: Annotated[str, typer.Option(help="8bit or 4bit: the language model's matrices.")] = "",
    base: Annotated[str, typer.Option(help="The other half of a model that is an adapter alone.")] = "",
    template: Annotated[str, typer.Option(help="Chat template instead of the folder's.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16, fp16; empty: bf16, on a CPU fp32.")] = "",
    served: Annotated[str, typer.Option(help="The model's name on a server; empty: the first it lists.")] = "",
    key: Annotated[str, typer.Option(help="Environment variable that holds the server's key.")] = "OPENAI_API_KEY",
    judge: JudgeUrl = "",
    judge_model: JudgeModel = "",
    judge_key: JudgeKey = "OPENAI_API_KEY",
    json: Json = False,
) -> None:
    """Ask a model the questions of benchmarks, the way LLaVA-1.5's published scores were made, and score its answers.

    Taken up again where it was killed. Under torchrun: the processes share the questions.
    """
    from vistune.evaluate import run

    only_json(json)
    settings = run.Settings(
        batch=batch,
        limit=limit,
        max_new_tokens=max_new_tokens,
        quantize=quantize,
        base=base,
        template=template,
        device=device,
        precision=precision,
        served=served,
        key=key,
        images=images,
        judge=_judge(judge, judge_model, judge_key),
    )
    names = [name for name in benchmark.split(",") if name]
    found = run.evaluate(model, names, data, out, settings)
    if json:
        console.print_json(found)


def score(
    name: Annotated[str, typer.Argument(help="The benchmark, see evaluate.md.")],
    data: Data,
    answers: Annotated[Path, typer.Option(help="JSON lines with question_id and text, whoever made them.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the file that the official server takes.")] = None,
    images: Images = None,
    judge: JudgeUrl = "",
    judge_model: JudgeModel = "",
    judge_key: JudgeKey = "OPENAI_API_KEY",
    json: Json = False,
) -> None:
    """Score answers that any model made, in LLaVA's format, by the official rule."""
    from vistune.evaluate import score as room

    only_json(json)
    by = _judge(judge, judge_model, judge_key)
    found = room.score_file(name, data, answers, out=out, images=images, by=by)
    if json:
        console.print_json(found)
    else:
        room.show(found)


def report(
    runs: Annotated[list[Path], typer.Argument(help="A run folder; several are compared.")],
    out: Annotated[Path | None, typer.Option(help="The page; empty: report.html in the first run.")] = None,
    json: Json = False,
) -> None:
    """What a run did, on one page that needs nothing beside it; or several runs side by side."""
    from vistune.report import page

    only_json(json)
    found = page.write(runs, out)
    if json:
        console.print_json(found)


def _judge(url: str, model: str, key: str) -> Any:
    from vistune.evaluate.judge import Judge

    if not url:
        return None
    if not model:
        raise ValueError(
            f"--judge {url}: which model there? Add --judge-model NAME; scores of two judges do not compare"
        )
    return Judge(url=url, model=model, key=key)
