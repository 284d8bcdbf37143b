"""The verb that answers requests over HTTP. Words in, exit codes out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vistune.serve.limits import Limits

EXTRA = ("fastapi", "starlette", "uvicorn", "h11", "prometheus_client", "httpx")
"""What the extra brings."""
FRONT = (
    "host",
    "port",
    "uds",
    "api_key",
    "api_key_file",
    "behind_proxy",
    "allow_host",
    "log",
    "workers",
    "llava_controller",
)
"""What the process in front of several workers sees to."""
SIZES = ("kv_bytes", "pictures_held", "waiting_bytes", "body", "picture_bytes")
"""Limits that are bytes, said as 512MiB or 8GiB."""
UNITS = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def said(count: int) -> str:
    """Bytes as a person says them."""
    for unit in ("GiB", "MiB", "KiB"):
        one = UNITS[unit.lower()]
        if count >= one and count % one == 0:
            return f"{count // one}{unit}"
    return str(count)


def size(name: str, text: str) -> int:
    """Bytes of "8GiB", "512MiB", "1000". ValueError."""
    found = re.fullmatch(r"([\d_]+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    unit = UNITS.get(found[2]) if found else None
    if found is None or unit is None:
        raise ValueError(f"--{name.replace('_', '-')} {text}: say it as 512MiB or 8GiB")
    return int(float(found[1]) * unit)


def _option(said: str, *names: str, panel: str = "") -> Any:
    return typer.Option(*names, help=said, rich_help_panel=panel or None)


_REACHED, _MODEL, _LIMIT = "How it is reached", "What it serves", "What it allows"


def _reached(said: str, *names: str) -> Any:
    return _option(said, *names, panel=_REACHED)


def _model(said: str, *names: str) -> Any:
    return _option(said, *names, panel=_MODEL)


def _limit(said: str, *names: str) -> Any:
    return _option(said, *names, panel=_LIMIT)


_KEY = (
    "Asked of every request; may be repeated. `new` makes one and prints it. On a command line others on this machine "
    "see a key: rather write it into a file, or into VISTUNE_API_KEY."
)
_ROOT = "The prefix under which a proxy shows the server, such as /lab/x, whether or not the proxy takes it away."
_NAME = "Another name under which the server may be asked without a key, and whose pages may ask; may be repeated."


def serve(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Model folders, runs or hub ids; NAME=FOLDER gives a name.")],
    host: Annotated[str, _reached("Where it listens; beyond this machine only with a key.")] = "127.0.0.1",
    port: Annotated[int, _reached("0: a free one.")] = 8000,
    uds: Annotated[str, _reached("A Unix socket instead.")] = "",
    api_key: Annotated[list[str] | None, _reached(_KEY)] = None,
    api_key_file: Annotated[Path | None, _reached("Keys, one a line; `#` begins a comment.")] = None,
    root_path: Annotated[str, _reached(_ROOT)] = "",
    behind_proxy: Annotated[bool, _reached("Trust X-Forwarded-Host.", "--behind-proxy")] = False,
    allow_host: Annotated[list[str] | None, _reached(_NAME)] = None,
    page: Annotated[bool, _reached("The chat page.")] = True,
    votes: Annotated[str, _reached("Keep the page's votes in this JSON-lines file.")] = "",
    log: Annotated[bool, _reached("A line for every request, without what was asked.")] = True,
    workers: Annotated[int, _reached("Processes, each with all models, behind one address.")] = 1,
    llava: Annotated[bool, _reached("Speak LLaVA's controller and worker protocol too.", "--llava")] = False,
    llava_controller: Annotated[str, _reached("Register with this LLaVA controller.")] = "",
    llava_worker_address: Annotated[str, _reached("Where it and LLaVA's clients find this server.")] = "",
    llava_allow: Annotated[list[str] | None, _reached("A host whose LLaVA workers may register here.")] = None,
    llava_dispatch: Annotated[str, _reached("shortest_queue or lottery.")] = "shortest_queue",
    adapter: Annotated[list[str] | None, _model("A LoRA folder, NAME=FOLDER; may be repeated.")] = None,
    adapters: Annotated[Path | None, _model("A folder of LoRA folders; new ones are served at once.")] = None,
    base: Annotated[str, _model("The other half of a model that is an adapter alone.")] = "",
    template: Annotated[str, _model("Chat template; empty: as the folder says.")] = "",
    device: Annotated[str, _model("auto, cpu, cuda, cuda:1, ...")] = "auto",
    precision: Annotated[str, _model("fp32, bf16, fp16; empty: bf16 on a GPU, fp32 on a CPU.")] = "",
    quantize: Annotated[str, _model("8bit or 4bit: the language model's matrices; empty: as they are.")] = "",
    rows: Annotated[int, _limit("Requests of a model that are answered at once.")] = Limits.rows,
    kv_bytes: Annotated[str, _limit("Memory of a model's keys and values; 0: what is free decides.")] = "0",
    prefixes: Annotated[float, _limit("Share of it that remembers prompts, for those alike.")] = Limits.prefixes,
    context_tokens: Annotated[int, _limit("Tokens of a prompt and its answer; 0: the model's.", "--context")] = 0,
    prefill_ms: Annotated[float, _limit("Running answers wait no longer while others are read.")] = Limits.prefill_ms,
    pictures_held: Annotated[str, _limit("Encoded pictures that are remembered.")] = said(Limits.pictures_held),
    queue: Annotated[int, _limit("Requests that wait for a row; more get 429.")] = Limits.queue,
    waiting_bytes: Annotated[str, _limit("Of all requests not yet read by a model.")] = said(Limits.waiting_bytes),
    connections: Annotated[int, _limit("At once.")] = Limits.connections,
    deadline: Annotated[float, _limit("Seconds from a request to its answer's end.")] = Limits.deadline,
    stall: Annotated[float, _limit("Seconds in which a client has to send, or take, more.")] = Limits.stall,
    drain: Annotated[float, _limit("Seconds that answers have to end after SIGTERM.")] = Limits.drain,
    body: Annotated[str, _limit("Of a request.")] = said(Limits.body),
    messages: Annotated[int, _limit("Of a conversation.")] = Limits.messages,
    pictures: Annotated[int, _limit("Of a conversation.")] = Limits.pictures,
    picture_bytes: Annotated[str, _limit("Of one picture.")] = said(Limits.picture_bytes),
    picture_pixels: Annotated[int, _limit("Of one picture.")] = Limits.picture_pixels,
    new_tokens: Annotated[int, _limit("The most that may be asked for.")] = Limits.new_tokens,
    new_tokens_unasked: Annotated[int, _limit("Where a request does not say.")] = Limits.new_tokens_unasked,
    picture_host: Annotated[list[str] | None, _limit("Pictures may come from there, by https.")] = None,
    fetch: Annotated[float, _limit("Seconds for fetching a request's pictures.")] = Limits.fetch,
    redirects: Annotated[int, _limit("The most that a picture's address may be sent on.")] = Limits.redirects,
) -> None:
    """Answer requests as OpenAI's clients send them, many at once, with a chat page beside it."""
    try:
        _serve(context, context.params)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in EXTRA:
            raise ValueError(f'{error.name} is not installed: pip install "vistune[serve]"') from error
        raise


def limits_of(given: Mapping[str, Any]) -> Limits:
    """ValueError for a number that cannot be."""
    names = [name for name in Limits.__dataclass_fields__ if name in given and name not in (*SIZES, "context")]
    sizes = {name: size(name, given[name]) for name in SIZES}
    context, hosts = given["context_tokens"], tuple(given["picture_host"] or ())
    return Limits(**{name: given[name] for name in names}, **sizes, context=context, hosts=hosts)


def _options(given: Mapping[str, Any]) -> Any:
    from vistune.serve.door.keys import gathered
    from vistune.serve.door.options import Options

    words, file = given["api_key"] or (), given["api_key_file"]
    keys, new = gathered(words, file, os.environ.get("VISTUNE_API_KEY", ""))
    same = (
        "host",
        "port",
        "uds",
        "root_path",
        "behind_proxy",
        "page",
        "votes",
        "log",
        "llava_controller",
        "llava_dispatch",
    )
    return Options(
        **{name: given[name] for name in same},
        llava=given["llava"] or bool(given["llava_controller"]),
        llava_address=given["llava_worker_address"],
        llava_allow=tuple(given["llava_allow"] or ()),
        keys=tuple(keys),
        new_key=new,
        allow_hosts=tuple(given["allow_host"] or ()),
    )


def _serve(context: typer.Context, given: Mapping[str, Any]) -> None:
    limits, options = limits_of(given), _options(given)
    if given["workers"] != 1:
        _serve_several(context, limits, options)
        return
    from vistune.serve import server
    from vistune.serve.shelf import open_shelf

    same = ("base", "device", "precision", "quantize", "template")
    server.run(
        lambda: open_shelf(
            given["models"],
            adapters=given["adapter"] or (),
            adapter_folder=given["adapters"],
            limits=limits,
            **{name: given[name] for name in same},
        ),
        limits,
        options,
    )


def _serve_several(context: typer.Context, limits: Limits, options: Any) -> None:
    from vistune.serve.workers.run import run

    os.environ.pop("VISTUNE_API_KEY", None)  # the process in front asks for it; workers are not reached from elsewhere
    run(inner_words(context), limits, options, context.params["workers"], device=context.params["device"])


def inner_words(context: typer.Context) -> list[str]:
    """The words that a worker of this command line gets: all but those about where to listen and who may ask."""
    words = ["serve", *context.params["models"]]
    for one in context.command.params:
        value = context.params.get(one.name or "")
        if one.name in (*FRONT, "models") or value in (None, (), [], one.get_default(context)):
            continue
        if isinstance(value, bool):
            words.append((one.opts if value else one.secondary_opts)[0])
        else:
            several = value if isinstance(value, list | tuple) else (value,)
            words += [word for each in several for word in (one.opts[0], str(each))]
    words += ["--llava"] if context.params["llava_controller"] else []  # the front registers, workers answer
    return [*words, "--no-log"]
