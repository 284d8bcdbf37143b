"""docs/serving.md, held to the server: its examples run, its options, defaults, metrics and sizes are the real ones."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import torch
import typer.main
import yaml
from PIL import Image

from tests.serve.served import serving
from tests.test_docs import DOCS, blocks
from vistune import cli_serve
from vistune.cli import app
from vistune.preflight import presets
from vistune.preflight.inference import KINDS, weights
from vistune.serve.answering.reader import kv_token_bytes
from vistune.serve.metrics import Metrics
from vistune.serve.work import State

PAGE = DOCS / "serving.md"
TEXT = PAGE.read_text(encoding="utf-8")
KEY = "a-key-for-the-examples-of-the-docs"


@pytest.fixture(scope="module")
def server(start):
    with serving(start, options={"keys": (KEY,)}) as found:
        yield found


def here(block, server):
    assert "http://127.0.0.1:8000" in block
    return block.replace("http://127.0.0.1:8000", server.url)


def test_the_example_of_the_client_runs(server, tmp_path, monkeypatch, capsys):
    (block,) = blocks(PAGE, "python")
    Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    exec(here(block, server).replace('"KEY"', repr(KEY)), {})
    assert re.search(r"\n \d+ tokens asked, \d+ answered\n$", capsys.readouterr().out)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_example_with_curl_runs(server):
    (block,) = blocks(PAGE, "bash")
    done = subprocess.run(
        ["bash", "-c", here(block, server)], env={"KEY": KEY, "PATH": "/usr/bin:/bin"}, capture_output=True, check=True
    )
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["role"] == "assistant" and answer["model"] == server.name


def cells(title):
    """The rows of the table under the heading cell `title`."""
    rows = re.search(rf"(?m)^\| {re.escape(title)} \|.*\n\|[-|: ]+\|\n((?:\|.*\n)+)", TEXT)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1].splitlines()]


def test_every_option_is_told_with_its_default():
    command = typer.main.get_command(app).commands["serve"]
    rows = [row for title in ("how it is reached", "what it serves", "what it allows") for row in cells(title)]
    told = {}
    for options, default, _ in rows:
        names = re.findall(r"--[\w-]+", options)
        several = len(names) > 1 and len(default.split(", ")) == len(names)
        told |= dict(zip(names, default.split(", ") if several else [default] * len(names), strict=True))
    known = {name: one for one in command.params for name in (*one.opts, *one.secondary_opts) if name.startswith("--")}
    assert told.keys() == known.keys() - {"--help"}
    for name, default in told.items():
        real = known[name].default
        if isinstance(real, bool):
            assert default == ("yes" if real else "no") or name.startswith("--llava")
        elif isinstance(real, int | float):
            assert float(default) == real, name
        elif real and default:
            assert default == real, name
        elif name not in ("--template", "--precision"):
            assert not real or name == "--llava-dispatch", name
            assert default in ("", "0"), name


def test_every_limit_of_a_request_is_an_option():
    told = " ".join(row[0] for row in cells("what it allows"))
    names = {name.replace("_", "-") for name in cli_serve.Limits.__dataclass_fields__} - {"hosts", "redirects"}
    assert not [name for name in names if f"`--{name}`" not in told]


def test_the_metrics_that_are_named_are_there():
    made = Metrics()
    made.began("m")
    made.first("m", 0.1)
    made.gap("m", 0.1)
    made.ended("m", "stop", 1, 1, 0.1)
    made.refused(400, "x")
    made.picture(0.1)
    there = made.text({"m": State()}).decode()
    named = set(re.findall(r"\bvistune_[a-z0-9_]+", TEXT))
    assert len(named) > 12
    assert not [name for name in named if not re.search(rf"(?m)^{name}(_bucket)?[ {{]", there)]


def test_the_configurations_are_yaml():
    found = [yaml.safe_load(block) for block in blocks(PAGE, "yaml")]
    served = [one for one in found if "applications" in one]
    assert len(served) == 2
    for one in served:
        (application,) = one["applications"]
        assert application["import_path"] == "ray.serve.llm:build_openai_app"
        assert application["args"]["llm_configs"][0]["engine_kwargs"]["limit_mm_per_prompt"] == {"image": 4}


@pytest.mark.slow
def test_sizes_are_computed():
    rows = cells("model")
    assert len(rows) == 8
    for name, bf16, eight, four, token, in_a_gb, picture in rows:
        subject = presets.preset(name)
        held = kv_token_bytes(subject.config.text_config, torch.bfloat16)
        assert (token, in_a_gb) == (f"{held:,} B", f"{10**9 // held:,}")
        assert int(picture) == subject.layout.tokens(1344, 1008)
        taken = [f"{weights(subject, kind) / 1e9:.2f}" for kind in KINDS]
        assert [bf16.removesuffix(" GB"), eight, four] == taken
