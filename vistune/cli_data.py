"""The verbs of `vistune data`: words in, exit codes out. Each verb's room is imported when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vistune import console

app = typer.Typer(no_args_is_help=True, help="Check, see, mix, pack, convert and fetch training data.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Target = Annotated[str, typer.Argument(help="A recipe (.toml), or a data file or folder.")]
Words = Annotated[list[str] | None, typer.Argument(help="section.key=value laid over a recipe.")]
Format = Annotated[str, typer.Option(help="How a data file is laid out; see docs/formats.md.")]
Images = Annotated[list[str] | None, typer.Option(help="Folder of a data file's pictures; may be repeated.")]
Tokenizer = Annotated[str, typer.Option(help="A model's or a tokenizer's folder, for a data file.")]
Template = Annotated[str, typer.Option(help="Chat template; empty: as the model's folder says.")]
Length = Annotated[int, typer.Option(help="Room of a sample in tokens, for a data file.")]
Workers = Annotated[int, typer.Option(help="Processes; 0: this one alone.")]


@app.command()
def check(
    target: Target,
    words: Words = None,
    format: Format = "llava_json",
    images: Images = None,
    tokenizer: Tokenizer = "",
    template: Template = "",
    length: Length = 2048,
    out: Annotated[Path | None, typer.Option(help="Folder of the findings; empty: runs/check-NAME.")] = None,
    fix: Annotated[Path | None, typer.Option(help="Write a corrected copy there; the input is never changed.")] = None,
    decode: Annotated[bool, typer.Option(help="Decode every picture whole, not only its header.")] = True,
    workers: Workers = 2,
    json: Json = False,
) -> None:
    """Find every fault before a run does: rows, roles, pictures, lengths, masks. A killed check goes on where it was.

    Writes findings.jsonl, summary.json and index.html. Exit code 1 when a run on this data would fail."""
    from vistune import inputs
    from vistune.data.checking import check as room
    from vistune.data.checking import fix as mending

    if json:
        console.only_json()
    folder = out or Path("runs") / f"check-{Path(target).stem}"
    opened = inputs.open_target(
        target,
        words or [],
        format=format,
        images=images or [],
        tokenizer=tokenizer,
        template=template,
        length=length,
        cache=folder,
    )
    report = room.check(
        opened.readers,
        opened.language,
        opened.length,
        out=folder,
        workers=workers,
        decode=decode,
        expect=opened.expect,
        cap=opened.recipe.data.quarantine_cap if opened.recipe else 0.001,
        strict=bool(opened.recipe and opened.recipe.data.strict),
    )
    fixed = mending.fix(opened.readers, report, fix) if fix else None
    if json:
        console.print_json(report.as_dict() | ({"fixed": fixed} if fixed else {}))
    else:
        report.show()
    if fixed:
        counts = ", ".join(f"{fixed[key]:,} {key.replace('_', ' ')}" for key in ("kept", "mended", "left_out"))
        console.say(f"corrected copy: {fix} ({counts}; reasons in left_out.jsonl)")
        for one in fixed["sources"]:
            console.say(f"  path = {one['path']!r}, images = {one['images']!r}")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def show(
    target: Target,
    words: Words = None,
    tokenizer: Tokenizer = "",
    template: Template = "",
    images: Images = None,
    format: Format = "llava_json",
    length: Length = 2048,
    rows: Annotated[int, typer.Option(help="How many rows; 0 is all.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page with the pictures and every token there.")] = None,
    json: Json = False,
) -> None:
    """Show rows as training sees them: every token, and which are supervised.

    With --json one object a line: id, prompt, ids (an image is one -200), labels (-100: no loss), supervised_text.
    With --html a page: picture, conversation, tokens and, of a recipe, the place of each sample in its pack."""
    from itertools import islice
    from json import dumps

    from vistune import inputs
    from vistune.data.checking import page
    from vistune.data.checking import show as room

    if not target.endswith(".toml") and not tokenizer:
        raise ValueError(f"{target}: to show a data file as training sees it, --tokenizer DIR is needed")
    opened = inputs.open_target(
        target,
        words or [],
        format=format,
        images=images or [],
        tokenizer=tokenizer,
        template=template,
        length=length,
    )
    assert opened.language is not None
    if html:
        plan = inputs.read_plan(opened.recipe) if opened.recipe else None
        page.show_page(opened.readers, opened.language, opened.length, html, rows=rows or 50, plan=plan)
        console.say(f"page: {html}")
        return
    template_, encoder = opened.language.template, opened.language.encoder
    shown = (row for reader in opened.readers for row in room.rows(reader, template_, encoder))
    for one in islice(shown, rows or None):
        if json:
            print(dumps(one, ensure_ascii=False))
        else:
            console.out.print(room.coloured(one, encoder))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A data file or folder.")],
    out: Annotated[Path, typer.Argument(help="The folder or file to write; must not be there yet.")],
    to: Annotated[str, typer.Option(help="Format to write; see docs/formats.md.")],
    format: Format = "llava_json",
    images: Images = None,
    pack: Annotated[int, typer.Option(help="Pack samples into rows of so many tokens; for --to energon.")] = 0,
    tokenizer: Tokenizer = "",
    template: Template = "",
    seed: Annotated[int, typer.Option(help="Of the order of packs.")] = 0,
    workers: Workers = 2,
    json: Json = False,
) -> None:
    """Write any format as any other. With --pack, packed offline into WebDataset shards that megatron-energon opens.

    What the target cannot hold is named in left_out.jsonl, never dropped in silence."""
    from vistune import inputs
    from vistune.data.converting import convert as room

    if json:
        console.only_json()
    if pack and not tokenizer:
        raise ValueError("--pack measures samples in tokens; say whose with --tokenizer DIR")
    opened = inputs.open_target(
        source,
        [],
        format=format,
        images=images or [],
        tokenizer=tokenizer,
        template=template,
        length=pack or 2048,
    )
    report = room.convert(opened.readers[0], out, to, pack=pack, language=opened.language, workers=workers, seed=seed)
    _told(report, str(out), json)


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="llava_pretrain or mix665k.")],
    root: Annotated[Path, typer.Option(help="Where the data goes, such as playground/data.")],
    source: Annotated[Path | None, typer.Option("--from", help="A folder of archives carried in on a disk.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="Print the links and stop.")] = False,
    rename: Annotated[bool, typer.Option(help="Give pictures the names the JSON uses (journalled).")] = False,
    undo: Annotated[bool, typer.Option("--undo-rename", help="Take every renaming back.")] = False,
    part: Annotated[list[str] | None, typer.Option(help="Only this part, such as coco; may be repeated.")] = None,
    decode: Annotated[bool, typer.Option(help="Look at every pixel at the end, not at headers alone.")] = False,
    keep: Annotated[bool, typer.Option(help="Keep the archives after unpacking.")] = False,
    retry_dead: Annotated[bool, typer.Option(help="Ask links again that were found dead.")] = False,
    workers: Workers = 8,
    json: Json = False,
) -> None:
    """Fetch a published data set with its pictures: resumed, checked, unpacked, counted."""
    from vistune.data.fetching import prepare as room

    if json:
        console.only_json()
    report = room.prepare(
        name,
        root,
        source=source,
        listing=listing,
        rename=rename,
        undo=undo,
        only=part or (),
        decode=decode,
        keep=keep,
        retry_dead=retry_dead,
        workers=workers,
    )
    if json:
        console.print_json(report.as_dict())
    else:
        report.show()
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def generate(
    rows: Annotated[str, typer.Argument(help="JSON lines of captions and boxes, or COCO's caption annotations.")],
    kind: Annotated[Literal["conversation", "detail", "reasoning"], typer.Option(help="What is made.")],
    out: Annotated[Path, typer.Option(help="LLaVA JSON lines to write, or to go on with.")],
    url: Annotated[str, typer.Option(help="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.")],
    model: Annotated[str, typer.Option(help="The endpoint's name of the teacher.")],
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    boxes: Annotated[str, typer.Option(help="COCO's instance annotations, beside its captions.")] = "",
    prompts: Annotated[Path | None, typer.Option(help="Folder with prompts of your own.")] = None,
    folder: Annotated[str, typer.Option(help="Put before the pictures' paths, such as coco/train2017.")] = "",
    option: Annotated[list[str] | None, typer.Option(help="Into each request, such as temperature=0.2.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many pictures; 0: all.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="Print one prompt and the number of tokens, ask nothing.")] = False,
    workers: Workers = 4,
    json: Json = False,
) -> None:
    """Have a text model write conversations, descriptions or reasoning about pictures from captions and boxes."""
    from vistune.data.teaching import synthesize as room

    if json:
        console.only_json()
    report = room.synthesize(
        rows,
        kind,
        url=url,
        model=model,
        api_key_env=api_key_env,
        out=out,
        boxes=boxes or None,
        prompts=prompts,
        folder=folder,
        options=room.read_options(option or []),
        limit=limit,
        dry_run=dry_run,
        workers=workers,
    )
    _told(report, str(out), json)


@app.command()
def verify(
    recipe: Annotated[Path, typer.Argument(help="A TOML file; see recipes/.")],
    words: Words = None,
    packs: Annotated[int, typer.Option(help="How many packs are computed both ways.")] = 8,
    json: Json = False,
) -> None:
    """Prove on your own data that packing changes nothing, and that any number of ranks sees the same steps.

    Exit code 1 when it does not hold."""
    from vistune import prove
    from vistune import recipe as recipes

    if json:
        console.only_json()
    result = prove.prove(recipes.read(recipe, words or []), packs=packs)
    if json:
        console.print_json(result)
    else:
        prove.show(result)
    if not result["ok"]:
        raise typer.Exit(1)


def _told(report: dict[str, Any], title: str, json: bool) -> None:
    """What a verb did, for programs or for people."""
    if json:
        console.print_json(report)
    else:
        console.table(title, ("what", "value"), [(key.replace("_", " "), value) for key, value in report.items()])
