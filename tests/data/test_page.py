"""The pages: everything of the data is text, nothing is fetched from anywhere, and what they say is what was found."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from tests.data.small import make_language, turns
from tests.parsed import Page
from vistune.anyres import AnyresLayout, standard_pinpoints
from vistune.data.checking.check import check
from vistune.data.checking.page import show_page
from vistune.data.formats import open_source
from vistune.data.index import build_index
from vistune.data.plan import Plan
from vistune.data.tokenize import tokenize

EVIL = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>&amp;{{ 7 * 7 }}</style>"


def judged(text: str) -> Page:
    """Parses, and holds what every page must: one known script, no address to fetch, all pictures inside."""
    page = Page(text)
    scripts = page.of("script")
    assert 1 <= len(scripts) <= 2 and not any("alert" in script for script in scripts)
    for tag, known in page.tags:
        assert not [key for key in known if key.startswith("on")] or tag in ("button", "select")
        assert "href" not in known and known.get("src", "data:image/").startswith("data:image/")
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", "".join(page.of("style") + scripts))
    return page


@pytest.fixture
def evil(write_rows, pictures):
    rows = [
        {"id": EVIL, "conversations": turns(EVIL, f"Yes {EVIL}")},
        {"id": EVIL, "image": "a.png", "conversations": turns(EVIL, EVIL)},
        {"id": "gone", "image": f"{EVIL}.png", "conversations": turns(f"<image>\n{EVIL}", EVIL)},
        {"id": "stranger", "conversations": [{"from": EVIL, "value": EVIL}]},
        {"id": "b", "image": ["b.jpg", "torn.jpg"], "conversations": turns("<image><image>\nWhat?", "A cup.")},
        {"id": "mute", "image": "c.png", "conversations": turns("<image>\nWhat?", "")},
        [EVIL],
    ]
    return open_source(str(write_rows(rows)), images=str(pictures), name=f"mine {EVIL}")


def test_a_check_page_holds_its_findings_as_text(evil, tmp_path):
    report = check([evil, evil], make_language(), 200, out=tmp_path / "out", workers=1)
    text = (tmp_path / "out" / "index.html").read_text()
    page = judged(text)
    assert len(text) < 400_000
    codes = report.summary["codes"]
    assert sorted(page.of("count")) == sorted(f"{facts['findings']:,}" for facts in codes.values())
    cards = [known for tag, known in page.tags if tag == "article"]
    shown = {(card["data-code"], card["data-source"]) for card in cards}
    assert shown == {(one.code, str(one.number)) for one in report.findings()}
    assert any(EVIL in where for where in page.of("where")) and any(EVIL[:40] in one for one in page.of("excerpt"))
    pictures = [known for tag, known in page.tags if tag == "img"]
    assert pictures and "no picture" in page.of("none")
    assert page.of("verdict")[0].strip().rstrip(".").lower() == report.summary["verdict"].lower()


def test_the_first_findings_of_every_code_and_no_more(write_rows, tmp_path):
    rows = [{"id": str(i + 5), "conversations": turns("Hi", "" if i % 2 else "word " * 99)} for i in range(80)]
    source = open_source(str(write_rows(rows)))
    check([source], make_language(), 60, out=tmp_path / "out", workers=1)
    page = judged((tmp_path / "out" / "index.html").read_text())
    cards = [known["data-code"] for tag, known in page.tags if tag == "article"]
    assert cards.count("empty_answer") == cards.count("shortened") == 6
    assert len(page.of("histogram")) == 1 and "room of a sample: 60" in page.of("histogram")[0]


def test_a_clean_source(write_rows, tmp_path):
    source = open_source(str(write_rows([{"id": "a", "conversations": turns("Hi", "Hello")}])))
    report = check([source], None, 60, out=tmp_path / "out", workers=1)
    page = judged((tmp_path / "out" / "index.html").read_text())
    assert report.ok and report.summary["codes"] == {} and not page.of("article")


def test_a_show_page_has_every_token_with_its_id(evil, tmp_path):
    language = make_language()
    show_page([evil], language, 300, tmp_path / "show.html")
    page = judged((tmp_path / "show.html").read_text())
    assert len(page.of("sample")) == 7 and len(page.of("fault")) == 5
    kinds = {"b": [], "i": [], "u": []}
    for tag, known, _ in page.texts:
        if "data-t" in known:
            kinds[tag].append(known["data-t"])
    ids = {tag: [int(re.search(r"id (\d+)", one)[1]) for one in found] for tag, found in kinds.items()}
    wanted = [tokenize(evil[row], language, 300) for row in (0, 4)]
    placeholders = [one.ids == language.image_token_id for one in wanted]
    assert ids["b"] == [i for one in wanted for i in one.ids[one.loss_mask].tolist()]
    plain = [~one.loss_mask & ~mark for one, mark in zip(wanted, placeholders, strict=True)]
    assert ids["i"] == [i for one, keep in zip(wanted, plain, strict=True) for i in one.ids[keep].tolist()]
    assert len(kinds["u"]) == 2 and all(one.startswith("4 placeholders") for one in kinds["u"])
    learned = [text.strip() for text in page.of("learned")]
    assert learned == [f"Yes {EVIL}</s>", "A cup.</s>"]
    pictures = [known for tag, known in page.tags if tag == "img"]
    assert len(pictures) == 3 and len([one for one in page.of("none") if "torn.jpg" in one]) == 1


@pytest.mark.parametrize("tokenizer", ["llama_like", "qwen2_like"])
def test_tokens_spell_the_prompt(write_rows, tmp_path, tokenizer):
    """Piece by piece, also where a character is several tokens."""
    text = "Grüße, 你好 😀👩‍👩‍👧 \n\n  two  spaces\tand a tab"
    source = open_source(str(write_rows([{"id": "a", "conversations": turns("Hi", text)}])))
    language = make_language(tokenizer, "v1" if tokenizer == "llama_like" else "qwen_2")
    show_page([source], language, 500, tmp_path / "show.html")
    page = judged((tmp_path / "show.html").read_text())
    shown = "".join(text for tag, known, text in page.texts if tag == "b" and "data-t" in known)
    (learned,) = page.of("learned")
    assert "".join(shown.replace("↵\n", "\n").replace("·", "").split()) == "".join(learned.split())
    assert text.replace("\n", "↵\n") in shown.replace("·", "")


def test_places_in_the_pack(write_rows, pictures, tmp_path, language):
    rows = [
        {"id": f"r{i}", "image": "a.png", "conversations": turns("<image>\nHi", "Yes " * (1 + i % 7))}
        for i in range(40)
    ]
    source = open_source(str(write_rows(rows)), images=str(pictures))
    index = build_index([source], language, 300)
    plan = Plan(index, batch=20, length=300, seed=5)
    show_page([source], language, 300, tmp_path / "show.html", plan=plan, rows=12)
    page = judged((tmp_path / "show.html").read_text())
    first = plan.step(0)
    shown = [int(re.search(r"row (\d+)", text)[1]) for text in page.of("h2") + page.of("header") if "row " in text]
    flat = [position for pack in first for position in pack]
    count = len(page.of("sample"))
    assert count >= 12 and shown == flat[:count]
    places = page.of("at")
    lengths = index.tokens(list(first[0])).tolist()
    assert places[1] == (
        f"sample 2 of {len(first[0])}, positions {lengths[0]} to {lengths[0] + lengths[1] - 1} of the pack"
    )
    show_page([source], language, 300, tmp_path / "wanted.html", plan=plan, wanted=[(0, 7), (0, 31)])
    page = judged((tmp_path / "wanted.html").read_text())
    assert sorted(text.strip() for text in page.of("h2")) == ["r31", "r7"] and len(page.of("at")) == 2


def test_wanted_rows_and_every_source_without_a_plan(write_rows, tmp_path, language):
    rows = [{"id": f"r{i}", "conversations": turns("Hi", "Yes")} for i in range(9)]
    source = open_source(str(write_rows(rows)))
    show_page([source, source], language, 100, tmp_path / "a.html", rows=4)
    assert judged((tmp_path / "a.html").read_text()).of("h2") == ["r0", "r1", "r0", "r1"]
    show_page([source], language, 100, tmp_path / "b.html", wanted=[(0, 8), (0, 2)], title=EVIL)
    page = judged((tmp_path / "b.html").read_text())
    assert page.of("h2") == ["r8", "r2"] and page.of("h1") == [EVIL]


def test_an_error_leaves_the_old_page(write_rows, tmp_path, language):
    (tmp_path / "a.html").write_text("old")
    source = open_source(str(write_rows([{"id": "a", "conversations": turns("Hi", "Yes")}])))
    with pytest.raises(IndexError):
        show_page([source], language, 100, tmp_path / "a.html", wanted=[(0, 99)])
    assert (tmp_path / "a.html").read_text() == "old" and json.loads((tmp_path / "rows.json").read_text())


def test_a_picture_in_tiles_says_so(write_rows, pictures, tmp_path):
    """Its size, its tiles and its tokens stand under it; the page's other pictures say nothing."""
    plain = make_language()
    tiles = replace(plain, layout=AnyresLayout(size=56, pinpoints=standard_pinpoints(56)))
    rows = [{"id": "a", "image": "a.png", "conversations": turns("<image>\nWhat?", "A cup.")}]
    source = open_source(str(write_rows(rows)), images=str(pictures))
    for language, said in ((plain, False), (tiles, True)):
        show_page([source], language, 300, tmp_path / "show.html")
        text = (tmp_path / "show.html").read_text()
        assert ("pixels: whole, and in" in text) == said
