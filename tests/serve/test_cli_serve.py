"""The verb's words: limits, options and keys out of them, what is refused, and what each of several workers gets."""

from __future__ import annotations

import builtins
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from vistune import cli, cli_serve
from vistune.serve.door import keys
from vistune.serve.limits import Limits
from vistune.serve.shelf import Shelf

COMMAND: Any = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]


def context(*words: str) -> typer.Context:
    return COMMAND.make_context("serve", ["a-model", *words])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command line says to a mistake."""
    with pytest.raises(SystemExit) as left:
        cli.main(["serve", "a-model", *words])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_without_words_limits_are_as_they_are_written() -> None:
    assert cli_serve.limits_of(context().params) == Limits()


def test_every_limit_has_a_word() -> None:
    said = {
        "--rows": ("5", "rows", 5),
        "--kv-bytes": ("8GiB", "kv_bytes", 8 << 30),
        "--prefixes": ("0.5", "prefixes", 0.5),
        "--context": ("999", "context", 999),
        "--prefill-ms": ("12.5", "prefill_ms", 12.5),
        "--pictures-held": ("0", "pictures_held", 0),
        "--queue": ("7", "queue", 7),
        "--waiting-bytes": ("1.5GiB", "waiting_bytes", 3 << 29),
        "--connections": ("9", "connections", 9),
        "--deadline": ("60", "deadline", 60.0),
        "--stall": ("4", "stall", 4.0),
        "--drain": ("3", "drain", 3.0),
        "--body": ("2mib", "body", 2 << 20),
        "--messages": ("4", "messages", 4),
        "--pictures": ("2", "pictures", 2),
        "--picture-bytes": ("1000", "picture_bytes", 1000),
        "--picture-pixels": ("1000000", "picture_pixels", 1_000_000),
        "--new-tokens": ("99", "new_tokens", 99),
        "--new-tokens-unasked": ("9", "new_tokens_unasked", 9),
        "--picture-host": ("example.org", "hosts", ("example.org",)),
        "--fetch": ("2", "fetch", 2.0),
        "--redirects": ("0", "redirects", 0),
    }
    words = [word for option, (text, _, _) in said.items() for word in (option, text)]
    found = cli_serve.limits_of(context(*words).params)
    assert {name: getattr(found, name) for _, name, _ in said.values()} == {name: v for _, name, v in said.values()}
    assert {field.name for field in dataclasses.fields(Limits)} == {name for _, name, _ in said.values()}


def test_numbers_that_cannot_be_are_named_with_what_is_needed() -> None:
    for words, needed in {
        ("--rows", "0"): "--rows 0: more than 0 is needed",
        ("--queue", "-1"): "--queue -1: 0 or more is needed",
        ("--prefixes", "1"): "--prefixes 1.0: a share of at most 0.9 is needed",
    }.items():
        with pytest.raises(ValueError, match=needed):
            cli_serve.limits_of(context(*words).params)


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 5 << 20, 3 << 30, (3 << 30) + 1])
def test_sizes_there_and_back(count: int) -> None:
    assert cli_serve.size("body", cli_serve.said(count)) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "8 apples", "1e3", "8G iB", "nan", "1TiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"--kv-bytes .*512MiB"):
        cli_serve.size("kv_bytes", text)


BAD = [
    (["--host", "0.0.0.0"], "--api-key new"),
    (["--root-path", "x/"], "--root-path x/"),
    (["--api-key", ""], "key is empty"),
    (["--api-key", "with a space"], "spaces"),
    (["--api-key", "schlüssel-schlüssel"], "ASCII"),
    (["--api-key-file", "no/such/file"], "no/such/file"),
    (["--rows", "0"], "--rows 0"),
    (["--kv-bytes", "much"], "--kv-bytes much"),
    (["--deadline", "-1"], "--deadline -1"),
    (["--workers", "0"], "--workers 0"),
    (["--uds", "no/such/folder/socket"], "--uds"),
    (["--votes", "."], "--votes ."),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=[" ".join(words)[:30] for words, _ in BAD])
def test_mistakes_are_named_before_a_model_is_read(monkeypatch, capsys, tmp_path, words: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vistune.serve.shelf.open_shelf", lambda *_, **__: pytest.fail("models were opened"))
    assert said in refused(capsys, *words)


def test_a_model_that_is_not_there(capsys) -> None:
    said = refused(capsys, "--port", "0", "--device", "cpu", "--no-log")
    assert "a-model" in said


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client", "httpx"])
def test_without_the_extra_it_is_named(monkeypatch, capsys, missing: str) -> None:
    real = builtins.__import__

    def fails(name: str, *rest: Any) -> Any:
        if name.startswith("vistune.serve.door.options"):
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fails)
    said = refused(capsys)
    assert missing in said and 'pip install "vistune[serve]"' in said


def test_words_become_options(monkeypatch, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nkey-of-the-file-1234\n")
    file.chmod(0o600)
    monkeypatch.setenv("VISTUNE_API_KEY", "key-of-the-environment other-key-of-it-12345")
    words = ["--api-key", "key-of-the-command-line", "--api-key", "new", "--api-key-file", str(file)]
    words += [
        "--host",
        "0.0.0.0",
        "--port",
        "9",
        "--root-path",
        "/x",
        "--allow-host",
        "a.b",
        "--no-page",
        "--votes",
        "v",
    ]
    found = cli_serve._options(context(*words).params)
    assert (found.host, found.port, found.root_path, found.allow_hosts) == ("0.0.0.0", 9, "/x", ("a.b",))
    assert not found.page and found.votes == "v" and found.log and not found.behind_proxy
    given = ["key-of-the-command-line", "key-of-the-environment", "other-key-of-it-12345", "key-of-the-file-1234"]
    assert list(found.keys) == [*given, found.new_key] and len(found.new_key) == 43
    assert keys.made() != keys.made()


def test_keys_that_others_can_read_or_guess_are_warned_of(monkeypatch, tmp_path: Path) -> None:
    said: list[str] = []
    monkeypatch.setattr("vistune.console.warn", said.append)
    file = tmp_path / "keys"
    file.write_text("short\n")
    file.chmod(0o644)
    assert keys.gathered([], file, "") == (["short"], "")
    assert len(said) == 2 and "chmod 600" in said[0] and "guessed" in said[1]
    assert "short" not in said[1]
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="no key in it"):
        keys.gathered([], file, "")


def test_what_it_opens(monkeypatch) -> None:
    seen: dict[str, Any] = {}

    def opened(models: Any, **more: Any) -> Shelf:
        seen.update(more, models=models)
        raise ValueError("opened")

    monkeypatch.setattr("vistune.serve.shelf.open_shelf", opened)
    words = ["b=other", "--adapter", "x=y", "--adapter", "z", "--adapters", "all", "--base", "c", "--template", "v1"]
    words += ["--device", "cpu", "--precision", "fp32", "--quantize", "8bit", "--port", "0", "--rows", "3"]
    with pytest.raises(ValueError, match="opened"):
        cli_serve._serve(context(*words), context(*words).params)
    assert seen.pop("limits").rows == 3
    assert seen == {
        "models": ["a-model", "b=other"],
        "adapters": ["x=y", "z"],
        "adapter_folder": Path("all"),
        **{"base": "c", "template": "v1", "device": "cpu", "precision": "fp32", "quantize": "8bit"},
    }


def test_what_workers_are_told(monkeypatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("vistune.serve.workers.run.run", lambda *words, **more: seen.append((words, more)))
    monkeypatch.setenv("VISTUNE_API_KEY", "key-of-the-environment")
    words = [
        "--workers",
        "3",
        "--api-key",
        "key-of-the-command-line",
        "--port",
        "1",
        "--adapter",
        "x=y",
        "--adapter",
        "z",
    ]
    words += ["--no-page", "--kv-bytes", "1GiB", "--context", "99", "--root-path", "/x", "--allow-host", "h"]
    made = context(*words)
    cli_serve._serve(made, made.params)
    (told, limits, options, count), more = seen[0]
    assert told == [
        *["serve", "a-model", "--root-path", "/x", "--no-page", "--adapter", "x=y", "--adapter", "z"],
        *["--kv-bytes", "1GiB", "--context", "99", "--no-log"],
    ]
    assert (limits.context, count, more) == (99, 3, {"device": "auto"})
    assert options.keys == ("key-of-the-command-line", "key-of-the-environment")
    assert "VISTUNE_API_KEY" not in os.environ  # a worker would ask for it too
    inner = COMMAND.make_context("serve", told[1:])
    assert cli_serve.limits_of(inner.params) == limits and inner.params["root_path"] == "/x"


def test_help_says_what_a_key_on_the_command_line_is_worth() -> None:
    said = " ".join(CliRunner().invoke(cli.app, ["serve", "--help"], env={"COLUMNS": "200"}).output.split())
    assert "VISTUNE_API_KEY" in said and "see a key" in said
    assert "How it is reached" in said and "What it allows" in said
