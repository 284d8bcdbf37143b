"""An engine under load: what it says is what one request alone is told, whoever comes and goes meanwhile."""

from __future__ import annotations

import gc
import random
import time
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.each_family import each_family, folders_in
from tests.made import noise_in, stage0
from tests.models.test_adapted import trained
from tests.serve.loads import Listener, Seen, alone, asked, at_load, check_parity, some
from tests.serve.served import until
from tests.tiny import tiny_language, tiny_vision
from vistune.decoding import Settings
from vistune.models.adapted import Adapters
from vistune.models.assemble import assemble
from vistune.models.load import Loaded, load
from vistune.serve.answering import engine as engine_module
from vistune.serve.answering.engine import Engine
from vistune.serve.limits import Limits
from vistune.serve.refused import Refused
from vistune.serve.work import Work
from vistune.train.keeping.merge import merge

SIZES = [(70, 40), (56, 56), (30, 90), (100, 60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stage0(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return noise_in(tmp_path_factory.mktemp("pictures"), SIZES)


def test_answers_at_any_load_are_those_of_one_request_alone(loaded, pictures):
    works = some(loaded, pictures, 24, 0, most=12)
    engine, heard = at_load(loaded, works, rows=8, prefill_ms=5)
    try:
        assert until(lambda: engine.state().running == 0)
        state = engine.state()
        assert (state.waiting, state.kv_used) == (0, 0) and state.alive
        assert state.pictures_seen == len({digest for work in works for digest in work.digests})
        assert state.pictures_held == state.pictures_seen * 16 * 64 * 4
    finally:
        engine.stop()
    check_parity(loaded, works, heard)


@pytest.mark.slow
@each_family
def test_answers_at_load_in_every_family(name, tmp_path_factory, pictures):
    loaded = load(folders_in(tmp_path_factory.mktemp("families"))(name))
    works = some(loaded, pictures, 16, 1, most=16)
    engine, heard = at_load(loaded, works, rows=6, prefill_ms=5)
    engine.stop()
    check_parity(loaded, works, heard)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, vocab, template", [("mpt", "mpt_like", "mpt"), ("qwen2", "", "qwen_2"), ("phi3", "", "v1")]
)
def test_answers_at_load_of_other_language_models(kind, vocab, template, tmp_path, pictures):
    vision = tiny_vision(tmp_path / "vision")
    language = tiny_language(tmp_path / "language", kind, vocab=vocab)
    assemble(vision=str(vision), language=str(language), out=tmp_path / "model", template=template, image="pad")
    loaded = load(tmp_path / "model")
    works = [one for one in some(loaded, pictures, 16, 2, most=12) if len(one.ids) < 200]
    assert len(works) > 4
    engine, heard = at_load(loaded, works, rows=6, prefill_ms=5)
    engine.stop()
    check_parity(loaded, works, heard)


def test_a_stop_of_ones_own_cuts_the_text(loaded, pictures):
    work = asked(loaded, ["What is it?"], pictures[:1], max_new_tokens=40)
    text = alone(loaded, work)[0]
    stop = text[7:12]
    engine = Engine(loaded, Limits())
    engine.start()
    try:
        heard = Listener()
        engine.submit(replace(work, stops=(stop, "never")), heard)
        assert heard.end().reason == "stop" and heard.text == text[: text.index(stop)].rstrip()
        assert heard.end().tokens < 40
    finally:
        engine.stop()


def test_what_can_never_be_answered_is_refused_at_once(loaded):
    engine = Engine(loaded, Limits(context=100, queue=2, rows=1, kv_bytes=1 << 20))
    with pytest.raises(Refused) as refused:
        engine.submit(Work(ids=[1] * 90, settings=Settings(max_new_tokens=11)), Listener())
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    assert "100" in refused.value.message
    with pytest.raises(Refused) as refused:
        engine.submit(Work(ids=[1], settings=Settings(max_new_tokens=9), adapter="nobody's"), Listener())
    assert refused.value.status == 404
    short = Work(ids=[1] * 9, settings=Settings(max_new_tokens=11))
    heard = [Listener() for _ in range(3)]
    for one in heard:
        engine.submit(short, one)
    with pytest.raises(Refused) as refused:
        engine.submit(short, Listener())
    assert (refused.value.status, refused.value.code) == (429, "queue_full") and refused.value.retry_after >= 1
    engine.stop()
    errors = [one.end().error for one in heard]
    assert {(error.status, error.code) for error in errors if error} == {(503, "stopping")} and all(errors)
    with pytest.raises(Refused, match="stopping"):
        engine.submit(short, Listener())
    assert not engine.state().alive


def test_a_small_memory_bounds_the_context(loaded):
    engine = Engine(loaded, Limits(kv_bytes=300 * 512, prefixes=0))
    assert engine.reader.kv_token_bytes == 512 and engine.context == 300
    shared = Engine(loaded, Limits(kv_bytes=300 * 512, prefixes=0.25))
    assert shared.context == 225 and shared.scheduler.reading.prefixes.most == 75 // 32


def test_a_containers_limit_is_its_memory(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    1000 kB\n")
    assert engine_module._free_of_machine(tmp_path / "meminfo", tmp_path) == 1000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300000\n")
    assert engine_module._free_of_machine(tmp_path / "meminfo", tmp_path) == 1000 * 1024
    (tmp_path / "memory.max").write_text("400000\n")
    assert engine_module._free_of_machine(tmp_path / "meminfo", tmp_path) == 100_000
    assert engine_module._free_of_machine(tmp_path / "nothing", tmp_path / "nothing") == 8 << 30


def test_pictures_that_wait_are_bounded_in_bytes(loaded, pictures):
    work = asked(loaded, ["?"], pictures[:1], max_new_tokens=4)
    engine = Engine(loaded, Limits(waiting_bytes=work.nbytes * 2))
    heard = [Listener() for _ in range(2)]
    for one in heard:
        engine.submit(work, one)
    with pytest.raises(Refused) as refused:
        engine.submit(work, Listener())
    assert refused.value.status == 429
    engine.start()
    for one in heard:
        one.end()
    engine.submit(work, again := Listener())
    assert again.end().reason in ("stop", "length")
    engine.stop()


def endless(loaded: Loaded, tokens: int = 1500) -> Work:
    """A prompt whose greedy answer is long."""
    for first in range(40, 400):
        work = Work(ids=[1, first, first + 7], settings=Settings(max_new_tokens=60))
        if alone(loaded, work)[1] == 60:
            return replace(work, settings=Settings(max_new_tokens=tokens))
    raise AssertionError("this model says little")


def test_stopping_lets_answers_end_within_the_drain_and_no_longer(loaded):
    engine = Engine(loaded, Limits())
    engine.start()
    long, short = Listener(), Listener()
    engine.submit(endless(loaded), long)
    engine.submit(Work(ids=[1, 50], settings=Settings(max_new_tokens=3)), short)
    assert until(lambda: long.pieces)
    engine.stop(drain=0.2)
    assert short.end().reason in ("stop", "length")
    end = long.end()
    assert end.error is None or (end.error.status, end.error.code) == (503, "stopping")
    assert long.text


def test_who_leaves_frees_its_row(loaded):
    engine = Engine(loaded, Limits(rows=1))
    engine.start()
    try:
        first, second = Listener(), Listener()
        ticket = engine.submit(endless(loaded), first)
        engine.submit(Work(ids=[1, 50], settings=Settings(max_new_tokens=3)), second)
        assert until(lambda: first.pieces) and not second.pieces
        ticket.leave()
        assert first.end().reason == "left" and second.end().reason in ("stop", "length")
    finally:
        engine.stop()


def test_three_failures_in_a_row_end_the_engine_and_one_does_not(loaded):
    engine = Engine(loaded, Limits())
    reader: Any = engine.reader
    step, fails = reader.step, [RuntimeError("lost")]

    def broken(*given: Any) -> Any:
        if fails:
            raise fails.pop()
        return step(*given)

    reader.step = broken
    engine.start()
    work = Work(ids=[1, 50, 60], settings=Settings(max_new_tokens=3))
    engine.submit(work, first := Listener())
    error = first.end().error
    assert error is not None and (error.status, error.code) == (500, "engine_error") and "lost" in error.message
    engine.submit(work, second := Listener())
    assert second.end().reason in ("stop", "length") and engine.state().alive
    reader.read = broken
    for _ in range(3):
        fails.append(RuntimeError("lost"))
        engine.submit(work, last := Listener())
        assert last.end().reason == "error"
    assert until(lambda: not engine.state().alive)
    with pytest.raises(Refused) as refused:
        engine.submit(work, Listener())
    assert refused.value.code == "engine_dead"


def test_a_failure_of_the_scheduler_itself_ends_those_who_are_here(loaded, monkeypatch):
    engine = Engine(loaded, Limits())
    admit, fails = engine.scheduler._admit, [KeyError("x")]

    def broken() -> None:
        if fails:
            raise fails.pop()
        admit()

    monkeypatch.setattr(engine.scheduler, "_admit", broken)
    engine.start()
    work = Work(ids=[1, 50, 60], settings=Settings(max_new_tokens=3))
    engine.submit(work, first := Listener())
    assert first.end().reason == "error"
    engine.submit(work, second := Listener())
    assert second.end().reason in ("stop", "length")
    engine.stop()


def test_pictures_of_requests_together_are_seen_once(loaded, pictures):
    engine = Engine(loaded, Limits(rows=2))
    seen = Seen.by(engine)
    works = [asked(loaded, [f"What {i}?"], pictures[:2], max_new_tokens=3) for i in range(6)]
    heard = [Listener() for _ in works]
    for work, one in zip(works, heard, strict=True):
        engine.submit(work, one)
    engine.start()
    for one in heard:
        one.end()
    assert sum(seen.calls) == 2 and engine.state().pictures_again == 10
    engine.stop()


def test_where_the_memory_gave_out_in_the_midst_of_a_step_the_others_go_on_unharmed(loaded):
    """The failing step wrote keys and values already."""
    engine = Engine(loaded, Limits())
    reader: Any = engine.reader
    step, at = reader.step, iter(range(1000))

    def small(*given: Any) -> Any:
        logits = step(*given)
        if next(at) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits

    reader.step = small
    works = [Work(ids=[1, 50 + i, *range(60, 63 + i)], settings=Settings(max_new_tokens=20)) for i in range(4)]
    heard = [Listener() for _ in works]
    for work, one in zip(works, heard, strict=True):
        engine.submit(work, one)
    engine.start()
    ends = [one.end() for one in heard]
    engine.stop()
    assert [end.error.code if end.error else "" for end in ends] == ["", "", "", "out_of_memory"]
    check_parity(loaded, works[:3], heard[:3])


def test_an_answer_that_is_late_ends_and_what_was_said_stands(loaded):
    engine = Engine(loaded, Limits())
    engine.start()
    work = endless(loaded)
    engine.submit(replace(work, until=time.monotonic() + 0.3), heard := Listener())
    error = heard.end().error
    engine.stop()
    assert error is not None and (error.status, error.code) == (504, "deadline")
    assert heard.text and heard.end().tokens >= len(heard.pieces)


def test_nothing_of_a_request_is_held_when_it_is_over(loaded, pictures):
    engine = Engine(loaded, Limits(pictures_held=0))
    engine.start()
    work = asked(loaded, ["What?"], pictures[:2], max_new_tokens=4)
    heard = Listener()
    ticket = engine.submit(work, heard)
    heard.end()
    assert until(lambda: not engine.scheduler.busy)
    gone = [weakref.ref(one) for one in (work, heard, ticket, work.pictures[0].pixels)]
    del work, heard, ticket

    def all_gone() -> bool:
        gc.collect()
        return all(ref() is None for ref in gone)

    assert until(all_gone) and not engine.scheduler.lanes
    engine.stop()


@pytest.mark.slow
def test_adapters_each_answer_as_if_they_were_merged(folder, tmp_path, pictures):
    """Requests for the model and for two adapters on it, together, one of which sees otherwise."""
    loaded, adapters = load(folder), {}
    kinds: dict[str, dict[str, Any]] = {"": {}, "speaks": {}, "sees": {"target_modules": r".*vision_tower.*q_proj"}}
    on = Adapters(loaded)
    for name, config in kinds.items():
        if name:
            on.add(name, trained(tmp_path / name, folder, len(name), **config))
            adapters[name] = load(merge(tmp_path / name, tmp_path / f"{name} merged", base=folder))
    works = [
        replace(work, adapter=name, settings=replace(work.settings, temperature=0.0))
        for name in kinds
        for work in some(loaded, pictures[:2], 6, 5, most=12)
    ]
    random.Random(0).shuffle(works)
    engine = Engine(loaded, Limits(rows=8), adapters=on)
    heard = [Listener() for _ in works]
    for work, one in zip(works, heard, strict=True):
        engine.submit(work, one)
    engine.start()
    for one in heard:
        one.end()
    seen = engine.state().pictures_seen
    engine.stop()
    on.wear("")
    for name in kinds:
        mine = [(work, one) for work, one in zip(works, heard, strict=True) if work.adapter == name]
        check_parity(adapters.get(name, loaded), [work for work, _ in mine], [one for _, one in mine])
    assert seen == 4  # two pictures, by the model's own eyes and by those of the adapter that has others
