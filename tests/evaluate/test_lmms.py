"""The plug-in for lmms-eval, held to lmms-eval's documented contract by a stand-in for it: shapes of requests, what a
model returns. `scripts/check_lmms_eval.py` runs the real thing.
"""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.evaluate import toys
from tests.made import stage0
from vistune import decoding, generate
from vistune.decoding import Settings
from vistune.evaluate import likelihood, lmms
from vistune.samples import IMAGE_MARK, Image, Message

TASK, SPLIT = "digits", "test"


@dataclass(frozen=True)
class Manifest:
    """lmms_eval.models.registry_v2.ModelManifest."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Base(ABC):
    """lmms_eval.api.model.lmms."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    def clean(self) -> None:
        self.cleaned = True

    @property
    def rank(self) -> int:
        return self._rank

    @abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...


@dataclass
class Instance:
    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """`lmms_model`, imported beside the stand-in."""
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models", "lmms_eval.models.registry_v2")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["lmms_eval.api.model"].lmms = Base  # type: ignore[attr-defined]
        sys.modules["lmms_eval.models.registry_v2"].ModelManifest = Manifest  # type: ignore[attr-defined]
        patch.delitem(sys.modules, "vistune.evaluate.lmms_model", raising=False)
        yield importlib.import_module("vistune.evaluate.lmms_model")
        sys.modules.pop("vistune.evaluate.lmms_model", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return stage0(tmp_path_factory.mktemp("lmms") / "model")


def documents() -> list[dict[str, Any]]:
    return [{"picture": one.picture, "question": q.text} for one in toys.shown()[:4] for q in one.asked[:2]]


def made(room: Any, kind: str, folder: Path, **more: Any) -> Any:
    model = getattr(room, kind)(pretrained=str(folder), batch_size=3, max_batch_size=None, device="cpu", **more)
    model.task_dict = {TASK: {SPLIT: documents()}}
    return model


def visual(doc: dict[str, Any]) -> list[Any]:
    return [doc["picture"]]


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [{"type": "image", "url": doc["picture"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": parts}]


def simple(number: int, context: str = "", **said: Any) -> Instance:
    doc = documents()[number]
    return Instance((context or doc["question"], {"max_new_tokens": 6} | said, visual, number, TASK, SPLIT))


def chat(number: int, **said: Any) -> Instance:
    return Instance(("", messages, {"max_new_tokens": 6} | said, number, TASK, SPLIT))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[str]:
    asked = [(doc["question"], [lmms.picture(doc["picture"])]) for doc in documents()]
    return generate.answer_batch(generate.open_model(folder, "cpu"), asked, max_new_tokens=6, batch=1)


def test_the_entry_point_gives_a_manifest_whose_classes_are_there(room) -> None:
    found = EntryPoint("vistune", "vistune.evaluate.lmms:manifest", "lmms_eval.models").load()()
    assert isinstance(found, Manifest) and found.model_id == "vistune"
    for path, is_simple in ((found.simple_class_path, True), (found.chat_class_path, False)):
        module, _, name = path.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        assert issubclass(kind, Base) and kind.is_simple is is_simple and not kind.__abstractmethods__


def test_the_project_says_the_entry_point() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."lmms_eval.models"]\nvistune = "vistune.evaluate.lmms:manifest"' in project


@pytest.mark.parametrize(("kind", "request_of"), [("Simple", simple), ("Chat", chat)])
def test_answers_are_those_of_generate_in_the_order_of_the_requests(room, folder, expected, kind, request_of) -> None:
    model = made(room, kind, folder)
    order = [5, 0, 7, 2, 1, 3]
    said = model.generate_until([request_of(i, until=["\n\n"]) for i in order])
    assert said == [expected[i] for i in order]
    assert model.rank == 0 and model.device.type == "cpu"
    model.clean()
    assert model.loaded is None and model.cleaned


def test_requests_of_several_manners_each_get_theirs(room, folder, expected) -> None:
    model = made(room, "Simple", folder)
    first = expected[0].split()[0]
    stop = expected[0][len(first) - 1 :][:2]
    said = model.generate_until([simple(0), simple(0, max_new_tokens=1), simple(0, until=stop), simple(1)])
    assert said == [expected[0], said[1], expected[0].partition(stop)[0].strip(), expected[1]]
    assert expected[0].startswith(said[1]) and len(said[1]) < len(expected[0])


def test_several_pictures_and_none(room, folder) -> None:
    model = made(room, "Simple", folder)
    one, two = (doc["picture"] for doc in documents()[:3:2])
    both = Instance(("Which digits?", {"max_new_tokens": 6}, lambda doc: [one, two], 0, TASK, SPLIT))
    none = Instance(("Which digits?", {"max_new_tokens": 6}, lambda doc: [], 0, TASK, SPLIT))
    asked = [("Which digits?", [lmms.picture(one), lmms.picture(two)]), ("Which digits?", [])]
    assert model.generate_until([both, none]) == generate.answer_batch(model.loaded, asked, 6, 1)


def test_rounds_go_on_until_the_task_ends_them(room, folder) -> None:
    told: list[dict[str, Any]] = []

    def text_of(doc: dict[str, Any], **more: Any) -> tuple[Any, ...]:
        told.append(more)
        over = more["round_idx"] == 1 + documents().index(doc) % 2
        return [doc["picture"]], f"{doc['question']} again", over, more["previous_output"], "a note"

    model = made(room, "Simple", folder)
    requests = [
        Instance((documents()[i]["question"], {"max_new_tokens": 4}, visual, text_of, i, TASK, SPLIT)) for i in (0, 1)
    ]
    said = model.generate_until_multi_round(requests)
    assert [len(rounds) for rounds in said] == [1, 2] and all(type(rounds) is list for rounds in said)
    assert [one["round_idx"] for one in told] == [1, 1, 2]
    assert told[2] == {"round_idx": 2, "previous_output": said[1], "previous_round_info": "a note"}

    def messages_of(doc: dict[str, Any], **more: Any) -> Any:
        if not more:
            return messages(doc)
        over = more["round_idx"] == 2
        return None if over else messages(doc), over, more["previous_output"], None

    chat_model = made(room, "Chat", folder)
    asked = Instance(("", messages_of, {"max_new_tokens": 4}, 1, TASK, SPLIT))
    (rounds,) = chat_model.generate_until_multi_round([asked])
    assert rounds == [said[1][0]] * 2
    forever = Instance(("", lambda doc, **more: messages(doc) if not more else (messages(doc), False, [], None)))
    with pytest.raises(ValueError, match="1 requests have not ended after 64 rounds"):
        chat_model.generate_until_multi_round([Instance((*forever.args, {"max_new_tokens": 1}, 1, TASK, SPLIT))])


def test_likelihoods_are_sums_of_log_probabilities(room, folder) -> None:
    """Against one forward pass of the stock class over prompt and answer, without batch or padding."""
    model = made(room, "Simple", folder)
    answers = ["seven", "seven, one", "Is there anything at all?", "none"]
    requests = [
        Instance((doc["question"], f" {answer}", visual, i, TASK, SPLIT))
        for i, (doc, answer) in enumerate(zip(documents(), answers, strict=False))
    ]
    found = model.loglikelihood([*requests, Instance(("", "seven"))])
    assert all(type(one) is tuple and type(one[1]) is bool for one in found)
    for (logprob, _), doc, answer in zip(found, documents(), answers, strict=False):
        question = lmms.asked(doc["question"], [doc["picture"]])
        prompt = generate.prompt(model.loaded, question.messages, question.pictures)
        tokens = model.loaded.tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt.ids + tokens])
        pixels = model.loaded.family.inputs(
            [generate.images.normalize(one, model.loaded.layout, torch.float32) for one in prompt.pixels], []
        )
        with torch.no_grad():
            scores = model.loaded.model(input_ids=ids, **pixels).logits[0].log_softmax(-1)
        wanted = sum(scores[len(prompt.ids) - 1 + i, one].item() for i, one in enumerate(tokens))
        assert logprob == pytest.approx(wanted, abs=1e-4)


def test_greedy_is_what_greedy_decoding_says(room, folder) -> None:
    """Against the ids that decoding gives for as many steps as the answer has tokens."""
    loaded = made(room, "Simple", folder).loaded
    said: list[tuple[Any, Any, str]] = []
    expected: list[bool] = []
    for doc in documents():
        question = lmms.asked(doc["question"], [doc["picture"]])
        prompt = decoding.prompt(loaded, question.messages, question.pictures)
        ids = decoding.decode(loaded, [prompt], Settings(max_new_tokens=3), endless=True)[0].ids
        for count in (1, 2, 3):
            text = loaded.tokenizer.decode(ids[:count]).strip()
            tokens = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
            if text and len(tokens) <= 3:
                said.append((question.messages, question.pictures, text))
                expected.append(tokens == ids[: len(tokens)])
    assert {True, False} == set(expected)
    assert [one.greedy for one in likelihood.likelihoods(loaded, said, batch=4)] == expected
    with pytest.raises(ValueError, match="an answer without text"):
        likelihood.likelihoods(loaded, [(*said[0][:2], "  ")])


def test_words_of_generation() -> None:
    assert lmms.manner({"until": ["\n\n"], "do_sample": False}) == lmms.Manner(Settings(max_new_tokens=1024), (), ())
    assert lmms.manner({"until": ["\n\n", "###"]}).stops == ("\n\n", "###")
    assert lmms.manner({"until": "Q:"}).stops == ("Q:",) and lmms.manner({"until": None}).stops == ()
    warm = lmms.manner({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 16})
    assert warm.settings == Settings(max_new_tokens=16, temperature=0.7, top_p=0.9)
    assert lmms.manner({"temperature": 0.7, "do_sample": False}).settings.temperature == 0.0
    assert lmms.manner({"num_beams": 3, "image_aspect_ratio": "pad"}).ignored == ("image_aspect_ratio", "num_beams")
    assert lmms.manner({"num_beams": 1, "temperature": None, "top_p": None}).ignored == ()
    with pytest.raises(ValueError, match="give a string"):
        lmms.stops([3])


def test_answers_are_cut_where_the_first_stop_stands() -> None:
    assert lmms.cut(" a ### b\n\nc", ["\n\n", "###"]) == "a"
    assert lmms.cut("### b", ["###"]) == "" and lmms.cut(" a ", []) == "a"


def test_messages_of_many_parts() -> None:
    picture = documents()[0]["picture"]
    shown = {"type": "image", "url": picture}
    said = lmms.conversation(
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [shown, {"type": "text", "text": "Compare"}, shown]},
            {"role": "user", "content": [{"type": "text", "text": "them."}]},
        ]
    )
    text = f"{IMAGE_MARK}\nCompare\n{IMAGE_MARK}\nthem."
    assert said.messages == (Message(role="system", text="Be short."), Message(role="user", text=text))
    assert len(said.pictures) == 2
    marked = [{"role": "user", "content": [shown, {"type": "text", "text": f"In {IMAGE_MARK} what?"}]}]
    assert lmms.conversation(marked).messages[0].text == f"In {IMAGE_MARK} what?"


def test_pictures_keep_their_pixels_and_what_is_none_is_named() -> None:
    picture = documents()[0]["picture"]
    for mode in ("RGB", "L", "CMYK", "RGBA", "P"):
        given = picture.convert(mode)
        same = generate.images.open_image(lmms.picture(given))
        assert same.tobytes() == given.convert("RGB").tobytes()
    assert lmms.picture("folder/a.png") == Image(path="folder/a.png")
    with pytest.raises(ValueError, match=r"a\.mp4; this model takes images"):
        lmms.picture("a.mp4")
    with pytest.raises(ValueError, match="shows dict"):
        lmms.picture({})
    with pytest.raises(ValueError, match="a message has video"):
        lmms.conversation([{"role": "user", "content": [{"type": "video", "url": "x"}]}])


def test_what_cannot_be_run_is_said(room, folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="pretrained=FOLDER"):
        room.Chat(batch_size=1)
    with pytest.raises(ValueError, match="--batch_size auto"):
        room.Chat(str(folder), batch_size="auto")
    with pytest.raises(ValueError, match="fp8"):
        room.Chat(str(folder), dtype="fp8", device="cpu")
    assert room.Simple(model=str(folder), dtype="bfloat16", device="cpu").loaded.model.dtype == torch.bfloat16
    model = made(room, "Simple", folder)
    gone = Instance(("What?", {}, lambda doc: [str(tmp_path / "gone.png")], 3, TASK, SPLIT))
    with pytest.raises(ValueError, match=r"task digits, test, document 3: .*gone\.png: no such file"):
        model.generate_until([gone])
