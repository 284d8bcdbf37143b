"""Models and adapters by name: what is opened once, who is refused, what comes and goes in a watched folder."""

from __future__ import annotations

import base64
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from tests.made import noise_in
from tests.models.test_adapted import logits, near, trained
from tests.original_llava import BASE, ORIGINAL, copied
from tests.serve.served import serving, until
from vistune.decoding import Settings, decode, marked, prompt
from vistune.models.load import load
from vistune.samples import Message
from vistune.serve import watched
from vistune.serve.answering import engine
from vistune.serve.limits import Limits
from vistune.serve.refused import Refused
from vistune.serve.shelf import Shelf, open_shelf
from vistune.speech import spoken
from vistune.train.keeping.merge import merge


@pytest.fixture(scope="module")
def adapters(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for i, name in enumerate(("cats", "dogs")):
        trained(folder / name, start, i, modules_to_save=["multi_modal_projector"] if name == "dogs" else None)
    return folder


def opened(*models, **said):
    return open_shelf([str(one) for one in models], device="cpu", **said)


def names(shelf):
    return [one.name for one in shelf.served()]


def worn(served):
    """Logits of what a name stands for."""
    engine = served.engine
    model = next(one for one in SHELVES[-1].models if one.engine is engine)
    if model.adapters:
        model.adapters.wear(served.adapter)
    return logits(model.engine.loaded.model)


SHELVES = []


def is_the_merged_model(shelf, served, folder, start, out):
    SHELVES.append(shelf)
    near(worn(served), logits(load(merge(folder, out, base=start)).model))


def test_names_of_folders_and_of_runs(start, tmp_path):
    shutil.copytree(start, tmp_path / "run" / "model")
    (tmp_path / "run" / "recipe.toml").write_text("")
    shelf = opened(start, tmp_path / "run" / "model", f"other={start}", "b.7=" + str(start))
    assert names(shelf) == ["stage0", "run", "other", "b.7"] and len(shelf.engines) == 4
    assert [one.adapter for one in shelf.served()] == [""] * 4
    one = shelf.find("run")
    assert one.name == "run" and one.engine is shelf.engines[1] and one.created > 1.6e9
    with pytest.raises(Refused, match=r"no such model; there are stage0, run, other, b\.7") as refused:
        shelf.find("llama")
    assert (refused.value.status, refused.value.code, refused.value.param) == (404, "model_not_found", "model")
    with pytest.raises(Refused):
        shelf.find("")
    assert opened(start).find("").name == "stage0"


def test_a_folder_whose_name_has_a_sign_of_equality(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(start, "lr=1")
    assert names(opened("lr=1", "x=lr=1")) == ["lr=1", "x"]


def test_a_name_that_two_have_is_refused_before_anything_is_read(start, adapters, tmp_path):
    with pytest.raises(ValueError, match=r"/a/x and /b/x are both called 'x'; say NAME=FOLDER for one"):
        opened("/a/x", "/b/x")
    with pytest.raises(ValueError, match=rf"{start} and {adapters}/cats are both called 'stage0'"):
        opened(start, adapters=[f"stage0={adapters}/cats"])
    with pytest.raises(ValueError, match="no such folder"):
        opened(tmp_path / "nothing")


def test_adapters_by_name(start, adapters, tmp_path, capsys):
    shelf = opened(start, adapters=[f"c={adapters}/cats", f"{adapters}/dogs"])
    assert names(shelf) == ["stage0", "c", "dogs"] and len(shelf.engines) == 1
    assert [one.base for one in shelf.served()] == ["", "stage0", "stage0"]
    assert len({one.adapter for one in shelf.served()}) == 3
    is_the_merged_model(shelf, shelf.find("c"), adapters / "cats", start, tmp_path / "c")
    is_the_merged_model(shelf, shelf.find("dogs"), adapters / "dogs", start, tmp_path / "d")
    assert torch.equal(worn(shelf.find("stage0")), logits(load(start).model))
    said = capsys.readouterr().out
    assert "stage0: weights 1.1 MB in float32: vision 0.181 MB, connector 0.0251 MB, language 0.894 MB" in said
    assert f"adapter dogs on stage0: 0.0362 MB, from {adapters}/dogs" in said


def test_adapters_in_the_place_of_models(start, adapters, tmp_path):
    """Each names its base, which is opened once, and is not served where nobody asked for it."""
    shelf = opened(adapters / "cats", f"d={adapters}/dogs", base=str(start))
    assert names(shelf) == ["cats", "d"] and len(shelf.engines) == 1
    is_the_merged_model(shelf, shelf.find("d"), adapters / "dogs", start, tmp_path / "d")
    shelf = opened(adapters / "cats", start)
    assert names(shelf) == ["stage0", "cats"] and len(shelf.engines) == 1
    homeless = tmp_path / "homeless"
    shutil.copytree(adapters / "cats", homeless)
    file = homeless / "adapter_config.json"
    file.write_text(file.read_text().replace(f'"{start}"', "null"))
    with pytest.raises(ValueError, match="does not say what it lies on; say it with --base"):
        opened(homeless)


def test_the_model_that_an_adapter_is_for(start, adapters, tmp_path):
    """By what it names; else the only one that it fits; nobody guesses."""
    other = tmp_path / "other"
    shutil.copytree(start, other)
    shelf = opened(other, start, adapters=[f"{adapters}/cats"])
    assert shelf.find("cats").base == "stage0" and shelf.find("cats").engine is shelf.engines[1]
    moved = tmp_path / "moved"
    shutil.copytree(adapters / "cats", moved)
    file = moved / "adapter_config.json"
    file.write_text(file.read_text().replace(str(start), "/somewhere/else"))
    with pytest.raises(ValueError, match=r"fits other and stage0, and adapter_config\.json names neither"):
        opened(other, start, adapters=[str(moved)])
    assert opened(other, adapters=[str(moved)]).find("moved").base == "other"


def test_an_adapter_that_does_not_fit_stops_the_start(start, tmp_path):
    with pytest.raises(ValueError, match="no adapter"):
        opened(start, adapters=[f"x={start}"])


@pytest.mark.slow
def test_llavas_pairs_on_a_whole_llava_and_with_a_language_model(tmp_path):
    """Adapters on the one, in the place of models too; with the other each is a model of its own."""
    pair, base = copied("llava-lora-mlp2x_gelu", tmp_path), ORIGINAL / "llava-mlp2x_gelu"
    whole = logits(load(pair, base=base).model)
    for shelf in (opened(base, adapters=[f"pair={pair}"]), opened(f"pair={pair}", base=str(base))):
        assert len(shelf.engines) == 1 and shelf.find("pair").adapter
        SHELVES.append(shelf)
        near(worn(shelf.find("pair")), whole)
    shelf = opened(f"a={pair}", f"b={pair}", base=str(BASE))
    assert names(shelf) == ["a", "b"] and len(shelf.engines) == 2 and not shelf.find("a").adapter


def test_adapters_that_come_have_what_was_set_aside(start, adapters, tmp_path, at_once, monkeypatch, capsys):
    """On a GPU, whose memory keys and values would fill."""
    (tmp_path / "watched").mkdir()
    shelf = opened(start, adapter_folder=tmp_path / "watched", limits=Limits(deadline=1e-3))
    monkeypatch.setattr("vistune.serve.shelf.SPARE", 0.0)
    shelf._aside = 12_000.0  # cats take 11,136
    shutil.copytree(adapters / "cats", tmp_path / "watched" / "cats")
    shutil.copytree(adapters / "cats", tmp_path / "watched" / "more")
    shelf.look()
    assert names(shelf) == ["stage0", "cats"] and len(shelf.models[0].adapters.names) == 1
    said = capsys.readouterr().err
    assert "more: takes 0.0111 MB, 0.000864 MB are left of what was set aside for new adapters; start again" in said
    shutil.rmtree(tmp_path / "watched" / "cats")

    def room():
        shelf.look()
        return shelf._aside == 12_000

    assert until(room, 5)


@pytest.fixture
def at_once(monkeypatch):
    """Looks as often as they are asked for, at files however new."""
    monkeypatch.setattr(watched, "EVERY", 0.0)
    monkeypatch.setattr(watched, "SETTLED", 0.0)


def test_adapters_come_and_go_in_a_folder(start, adapters, tmp_path, at_once, capsys):
    folder = tmp_path / "watched"
    folder.mkdir()
    (folder / "notes").mkdir()
    shutil.copytree(adapters / "cats", folder / ".hidden")
    shelf = opened(start, adapter_folder=folder, limits=Limits(deadline=1e-3))
    assert names(shelf) == ["stage0"]
    shutil.copytree(adapters / "cats", folder / "cats")
    assert names(shelf) == ["stage0"]  # nobody has looked
    shelf.look()
    assert names(shelf) == ["stage0", "cats"]
    first = shelf.find("cats")
    is_the_merged_model(shelf, first, adapters / "cats", start, tmp_path / "c")
    shelf.look()
    assert shelf.find("cats") == first
    shutil.copytree(adapters / "dogs", folder / "cats", dirs_exist_ok=True)
    shelf.look()
    second = shelf.find("cats")
    assert second.adapter != first.adapter
    is_the_merged_model(shelf, second, adapters / "dogs", start, tmp_path / "d")
    near(worn(first), logits(load(tmp_path / "c").model))  # whoever had begun may end
    shutil.rmtree(folder / "cats")
    shelf.look()
    assert names(shelf) == ["stage0"]
    with pytest.raises(Refused):
        shelf.find("cats")
    assert set(shelf.models[0].adapters.names) == {first.adapter, second.adapter}
    assert "adapter cats on stage0: gone" in capsys.readouterr().out


def test_one_that_is_gone_is_let_go_when_nobody_can_ask_for_it_any_more(
    start, adapters, tmp_path, at_once, monkeypatch
):
    monkeypatch.setattr("vistune.serve.shelf.SPARE", 0.0)
    shutil.copytree(adapters / "cats", tmp_path / "watched" / "cats")
    shelf = opened(start, adapter_folder=tmp_path / "watched", limits=Limits(deadline=1e-3))
    assert len(shelf.models[0].adapters.names) == 1
    shutil.rmtree(tmp_path / "watched" / "cats")

    def gone():
        shelf.look()
        return shelf.models[0].adapters.names == ()

    assert until(gone, 5)


def test_one_that_is_being_copied_is_not_listed(start, adapters, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watched, "EVERY", 0.0)
    folder = tmp_path / "watched" / "dogs"
    shutil.copytree(adapters / "dogs", folder)
    shelf = opened(start, adapter_folder=folder.parent)
    shelf.look()
    assert names(shelf) == ["stage0"]  # written just now
    os.utime(folder / "adapter_config.json", (0, 0))  # a copy that keeps dates
    written = max(file.stat().st_ctime for file in folder.iterdir())
    for later, listed in ((-0.1, ["stage0"]), (0.1, ["stage0", "dogs"])):
        now = written + watched.SETTLED + later
        monkeypatch.setattr(watched.time, "time", lambda: now)  # noqa: B023 - called at once
        shelf.look()
        assert names(shelf) == listed


def test_half_a_file_and_one_that_does_not_fit_are_named_once(start, adapters, tmp_path, at_once, capsys):
    folder = tmp_path / "watched"
    for name in ("half", "stage0", "wrong"):
        shutil.copytree(adapters / "cats", folder / name)
    file = folder / "half" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    config = folder / "wrong" / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"IA3"'))
    shelf = opened(start, adapter_folder=folder)
    shelf.look()
    shelf.look()
    assert names(shelf) == ["stage0"]
    said = capsys.readouterr().err
    assert said.count("not a whole safetensors file") == said.count("only LoRA") == 1
    assert said.count(f"adapter stage0: not served: {folder}/stage0: there is another 'stage0' already") == 1
    assert f"{folder}/half" in said and "vistune-adapter-" not in said
    file.write_bytes(whole)
    shelf.look()
    assert names(shelf) == ["stage0", "half"]


def test_a_folder_that_cannot_be_read_leaves_what_there_was(start, adapters, tmp_path, at_once, capsys):
    folder = tmp_path / "watched"
    shutil.copytree(adapters / "cats", folder / "cats")
    shelf = opened(start, adapter_folder=folder)
    folder.rename(tmp_path / "away")
    shelf.look()
    shelf.look()
    assert names(shelf) == ["stage0", "cats"] and capsys.readouterr().err.count("what was there stays") == 1
    (tmp_path / "away").rename(folder)
    shutil.rmtree(folder / "cats")
    shelf.look()
    assert names(shelf) == ["stage0"]
    with pytest.raises(ValueError, match=r"--adapters .*/nothing: no such folder"):
        opened(start, adapter_folder=Path(tmp_path / "nothing"))


def test_looks_are_a_second_apart(start, tmp_path, monkeypatch):
    (tmp_path / "watched").mkdir()
    shelf = opened(start, adapter_folder=tmp_path / "watched")
    looks = []
    monkeypatch.setattr(watched.Watched, "_look", lambda self: looks.append(1))
    now = watched.time.monotonic()
    for seconds in (0.0, 0.5, 1.0, 1.2, 1.9, 2.0):
        monkeypatch.setattr(watched.time, "monotonic", lambda: now + 100 + seconds)  # noqa: B023 - called at once
        shelf.look()
    assert len(looks) == 3


def test_nobody_waits_for_an_adapter_that_is_being_read(start, adapters, tmp_path, at_once, monkeypatch):
    shutil.copytree(adapters / "cats", tmp_path / "watched" / "cats")
    shelf = opened(start, adapter_folder=tmp_path / "watched")
    shutil.copytree(adapters / "dogs", tmp_path / "watched" / "dogs")
    reading, go_on, real = threading.Event(), threading.Event(), Shelf.put

    def slow(self, *given):
        reading.set()
        assert go_on.wait(20)
        return real(self, *given)

    monkeypatch.setattr(Shelf, "put", slow)
    first = threading.Thread(target=shelf.look)
    first.start()
    assert reading.wait(20)
    shelf.look()
    assert names(shelf) == ["stage0", "cats"]
    go_on.set()
    first.join(20)
    assert names(shelf) == ["stage0", "cats", "dogs"]


@pytest.mark.parametrize("kind", ["8bit", pytest.param("4bit", marks=pytest.mark.slow)])
def test_a_quantised_model_says_what_it_takes_and_would(start, adapters, kind, capsys):
    pytest.importorskip("bitsandbytes", reason="extra quant")
    shelf = opened(start, quantize=kind, adapters=[f"{adapters}/cats"])
    said = capsys.readouterr().out
    language = {"8bit": "0.623 MB", "4bit": "0.58 MB"}[kind]
    assert "instead of 1.1 MB in float32: vision 0.181 MB, connector 0.0251 MB, language " in said
    assert f"language {language} instead of 0.894 MB" in said
    SHELVES.append(shelf)
    assert not torch.allclose(worn(shelf.find("cats")), worn(shelf.find("stage0")))


def test_what_is_free_is_shared_out_between_models(start, monkeypatch):
    monkeypatch.setattr(engine, "_free_of_machine", lambda: 1 << 30)
    alone, first, second = (
        one.state().kv_tokens for one in (*opened(start).engines, *opened(f"a={start}", f"b={start}").engines)
    )
    assert first == second and alone == 2 * first > 0
    said = opened(f"a={start}", f"b={start}", limits=Limits(kv_bytes=1 << 22, prefixes=0)).engines
    assert [one.state().kv_tokens for one in said] == [(1 << 22) // said[0].reader.kv_token_bytes] * 2


def greedy(folder, text, picture):
    """What one request to a model alone says, and whether a step of it was too near to call."""
    loaded = load(folder)
    pictures = [picture] if picture else []
    made = prompt(loaded, [Message(role="user", text=marked(text, pictures))], pictures)
    new = decode(loaded, [made], Settings(max_new_tokens=8))[0]
    return spoken(loaded, new.ids), new.margin < 1e-4


def asked(url, name, text, picture):
    parts = [{"type": "text", "text": text}]
    if picture:
        data = base64.b64encode(Path(picture.path).read_bytes()).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    body = {"model": name, "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 8}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
    assert answer["model"] == name
    return answer["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_two_adapters_and_their_model_asked_at_once_answer_as_merged(start, adapters, tmp_path):
    """Over HTTP, with pictures and without; one of the adapters has a connector of its own."""
    folders = {"stage0": start}
    folders |= {name: merge(adapters / name, tmp_path / name, base=start) for name in ("cats", "dogs")}
    pictures = [None, *noise_in(tmp_path, [(40, 30)])]
    questions = [(name, f"what is {i}?", one) for i, one in enumerate(pictures) for name in folders]
    with serving(start, shelf={"adapters": [f"{adapters}/{name}" for name in ("cats", "dogs")]}) as server:
        listed = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert [one["id"] for one in listed] == ["stage0", "cats", "dogs"]
        with ThreadPoolExecutor(len(questions)) as pool:
            said = list(pool.map(lambda one: asked(server.url, *one), questions))
        assert server.idle()
    expected = [greedy(folders[name], text, picture) for name, text, picture in questions]
    wrong = [
        one
        for one, ours, (right, near_tie) in zip(questions, said, expected, strict=True)
        if ours != right and not near_tie
    ]
    assert not wrong and len({right for right, _ in expected}) == len(questions)
    assert sum(near_tie for _, near_tie in expected) <= 1


def test_a_new_adapter_is_there_without_a_restart(start, adapters, tmp_path, at_once):
    folder = tmp_path / "watched"
    folder.mkdir()
    with serving(start, shelf={"adapter_folder": folder}) as server:
        unknown = httpx.post(
            f"{server.url}/v1/chat/completions", json={"model": "cats", "messages": [{"role": "user", "content": "x"}]}
        )
        assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
        shutil.copytree(adapters / "cats", folder / "cats")
        assert asked(server.url, "cats", "hello", None) is not None
        assert [one["id"] for one in httpx.get(f"{server.url}/v1/models").json()["data"]] == ["stage0", "cats"]
