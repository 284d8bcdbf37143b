"""The verbs about models on disk: assemble, convert, merge, fetch. Words in, exit codes out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vistune import console

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def assemble(
    vision: Annotated[str, typer.Option(help="Vision tower: a folder or a hub id.")],
    language: Annotated[str, typer.Option(help="Language model: a folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    connector: Annotated[str, typer.Option(help="A model folder or an original mm_projector.bin; empty: fresh.")] = "",
    connector_type: Annotated[str, typer.Option(help="mlp2x_gelu, linear, mlpNx_gelu, identity.")] = "mlp2x_gelu",
    template: Annotated[str, typer.Option(help="Chat template written into the folder; empty: the family's.")] = "",
    image: Annotated[
        str, typer.Option(help="square: cut the centre. pad: widen to a square. anyres: tiles (LLaVA-NeXT).")
    ] = "",
    select_layer: Annotated[int, typer.Option(help="Which hidden state of the vision tower is used.")] = -2,
    select: Annotated[str, typer.Option(help="patch, or cls_patch to keep the class token.")] = "patch",
    start_end: Annotated[bool, typer.Option(help="Put <im_start> and <im_end> around every picture.")] = False,
    s2_scales: Annotated[str, typer.Option(help='Several scales seen at once, such as "336,672,1008".')] = "",
    resolution: Annotated[int, typer.Option(help="Side of a picture for FastViTHD; 0: as its folder says.")] = 0,
    tie: Annotated[
        bool | None,
        typer.Option("--tie/--untie", help="The head and the embedding; neither: as the language model has it."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; empty: each part keeps its own.")] = "",
    seed: Annotated[int, typer.Option(help="Of a fresh connector.")] = 0,
    json: Json = False,
) -> None:
    """Join a vision tower and a language model into a stage-0 model folder, and prove that nothing was lost.

    CLIP, SigLIP and DINOv2 make a LLaVA, or with --image anyres a LLaVA-NeXT; RICE a LLaVA-OneVision-1.5; FastViTHD a
    FastVLM.
    """
    import torch

    from vistune.models import assemble as room
    from vistune.models.proving import verify

    only_json(json)
    if dtype not in ("", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype}: choose float32, bfloat16 or float16")
    room.assemble(
        vision=vision,
        language=language,
        out=out,
        connector=connector or None,
        connector_type=connector_type,
        template=template or None,
        image=image or None,
        select_layer=select_layer,
        select=select,
        start_end=start_end,
        s2_scales=s2_scales or None,
        resolution=resolution or None,
        tie=tie,
        dtype=getattr(torch, dtype) if dtype else None,
        seed=seed,
    )
    report = verify.verify(out, vision=vision, language=language)
    if json:
        console.print_json(report.as_dict())
    else:
        report.show()
    if not report.ok:
        raise typer.Exit(1)


def convert(
    source: Annotated[str, typer.Argument(help="A model in any format that is recognised, a run, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="hf, llava, llava-adapter, llava-lora, fastvlm, onevision15, mcore.")] = "hf",
    base: Annotated[str, typer.Option(help="The other half of an adapter; a stage-0 folder for mcore.")] = "",
    verify: Annotated[bool, typer.Option(help="Ask source and target the same; without equal answers no target.")] = (
        False
    ),
    template: Annotated[str, typer.Option(help="Chat template; empty: as the source says.")] = "",
    tensor_parallel: Annotated[int, typer.Option(help="Of an mcore target; 0: as the source came, else 1.")] = 0,
    pipeline_parallel: Annotated[int, typer.Option(help="Of an mcore target; 0: as the source came, else 1.")] = 0,
    json: Json = False,
) -> None:
    """Write a model in another format, one tensor at a time. What the source is, its contents say."""
    from vistune.models import convert as room

    only_json(json)
    if to in _EXPORTS:
        raise ValueError(f"--to {to}: {_EXPORTS[to]}")
    spread = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    said: dict[str, Any] = {"template": template} if template else {}
    try:
        done = room.convert(
            source,
            out,
            to,
            base or None,
            verify=verify,
            settings={key: value for key, value in spread.items() if value},
            **said,
        )
    except room.NotTheSame as error:
        console.fail(str(error))
        raise typer.Exit(1) from error
    if json:
        console.print_json(done.as_dict())


_EXPORTS = dict.fromkeys(
    ("coreml", "mlx"),
    "is made by Apple's own tools, on macOS only: give them the folder that --to fastvlm writes (docs/from_fastvlm.md)",
)


def merge(
    run: Annotated[str, typer.Argument(help="A LoRA run, finished or not, or a peft adapter's folder.")],
    out: Annotated[str, typer.Option(help="The model folder to write; empty: merged/ in the run.")] = "",
    base: Annotated[str, typer.Option(help="The model that the adapter lies on; empty: as the run says.")] = "",
    step: Annotated[int, typer.Option(help="The checkpoint to take; -1: the last.")] = -1,
    json: Json = False,
) -> None:
    """Fold a run's adapters into the model they were trained on, one tensor at a time."""
    from vistune.train.keeping import merge as room

    only_json(json)
    folder = room.merge(run, out or None, base=base or None, step=None if step < 0 else step)
    if json:
        console.print_json({"model": str(folder)})


def fetch(
    id: Annotated[str, typer.Argument(help="A repository of the hub, such as llava-hf/llava-1.5-7b-hf.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    revision: Annotated[str, typer.Option(help="A branch, tag or commit; empty: main.")] = "",
    json: Json = False,
) -> None:
    """Download a hub repository into a folder; the same command goes on where it stopped. Honours HF_ENDPOINT."""
    from vistune.models import hub

    only_json(json)
    folder = hub.fetch(id, out, revision or None)
    if json:
        console.print_json({"folder": str(folder)})


def only_json(json: bool) -> None:
    """With --json, what is meant for people goes to stderr."""
    if json:
        console.only_json()
