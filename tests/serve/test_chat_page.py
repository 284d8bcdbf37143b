"""The page's files: what they are sent with, what they may not contain, that both languages say the same."""

from __future__ import annotations

import asyncio
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from tests.serve.browser import Stub
from vistune.serve import page
from vistune.serve.limits import Limits

FILES = sorted(path for path in page.HERE.iterdir() if path.suffix in (".js", ".css", ".html"))
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in FILES if path.suffix == ".js"}
PAGES = "".join(path.read_text(encoding="utf-8") for path in FILES if path.suffix == ".html")


def table(name: str) -> dict[str, str]:
    """A language's words: the file is JSON but for its first two words."""
    return json.loads(SCRIPTS[name].removeprefix("export default ").rstrip().removesuffix(";"))


def got(path: str, stub: Stub | None = None, root: str = "", method: str = "GET", **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        place = httpx.ASGITransport(app=(stub or Stub()).app, root_path=root)
        async with httpx.AsyncClient(transport=place, base_url="http://here") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(ask())


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_every_file_is_sent_with_its_type_a_tag_and_the_policy() -> None:
    names = ["/", "/page/style.css", *(f"/page/{path.name}" for path in FILES if path.suffix != ".html")]
    kinds = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", "": "text/html; charset=utf-8"}
    stub = Stub()
    for name in names:
        answer = got(name, stub)
        assert answer.status_code == 200 and answer.content
        assert answer.headers["content-type"] == kinds[Path(name).suffix]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-cache"
        policy = answer.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"} <= set(policy)
        assert "unsafe" not in answer.headers["content-security-policy"]
        again = got(name, stub, **{"if-none-match": f'"other", W/{answer.headers["etag"]}'})
        assert again.status_code == 304 and not again.content


def test_nothing_but_the_pages_files_is_sent() -> None:
    for name in ("votes.py", "__init__.py", "index.html", "..%2flimits.py", "%2e%2e/limits.py", "nothing.js"):
        assert got(f"/page/{name}").status_code == 404
    assert got("/", method="HEAD").status_code == 200


def test_addresses_are_relative_or_under_the_root_path() -> None:
    def addresses(root: str) -> list[str]:
        tags = Tags(got("/", root=root).text).found
        return [str(value) for _, have in tags for name, value in have.items() if name in ("src", "href")]

    plain = [one for one in addresses("") if not one.startswith(("data:", "#"))]
    assert len(plain) == 4 and all(one.startswith("page/") for one in plain)
    rooted = [one for one in addresses("/lab/x") if not one.startswith(("data:", "#"))]
    assert rooted == [f"/lab/x/{one}" for one in plain]
    assert '"/&quot;&gt;&lt;b/page/theme.js"' in got("/", root='/"><b').text


def test_nothing_is_inline_and_nothing_is_from_elsewhere() -> None:
    for tag, have in Tags(PAGES).found:
        assert not [name for name in have if name.startswith("on") or name == "style"]
        assert tag != "style" and (tag != "script" or have.get("src"))
    for name, text in SCRIPTS.items():
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|srcdoc", text
        ), name
    for path in FILES:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"""["'(]\s*(https?:)?//\w""", text), path.name


def test_both_languages_have_the_same_words_with_the_same_values() -> None:
    en, zh = table("en.js"), table("zh.js")
    assert list(en) == list(zh)
    for name in en:
        assert en[name] and zh[name]
        assert set(re.findall(r"\{\w+\}", en[name])) == set(re.findall(r"\{\w+\}", zh[name])), name
    assert not [name for name in en if name != "other_language" and re.search(r"[\u4e00-\u9fff]", en[name])]


def test_every_word_that_is_used_is_there_and_every_one_there_is_used() -> None:
    known = set(table("en.js"))
    in_page = {
        str(v) for _, have in Tags(PAGES).found for k, v in have.items() if k.startswith("data-") and k != "data-vote"
    }
    code = "".join(text for name, text in SCRIPTS.items() if name not in ("en.js", "zh.js"))
    called = set(re.findall(r'\bword\("(\w+)"', code))
    assert called | in_page <= known
    quoted = set(re.findall(r'"(\w+)"', code)) | in_page
    built = {name for name in known if name.startswith("fault_")}  # `fault_${kind}`
    assert known - quoted - built == set()


def test_the_page_learns_what_the_server_allows(tmp_path: Path) -> None:
    known = got("/page/settings", Stub(tmp_path / "votes", pictures=3, picture_bytes=1000)).json()
    assert known["votes"] is True and known["name"] == "a stub" and known["version"]
    assert known["limits"]["pictures"] == 3 and known["limits"]["picture_bytes"] == 1000
    assert set(known["limits"]) <= set(vars(Limits())) and "hosts" not in known["limits"]
    assert got("/page/settings").json()["votes"] is False
    assert str(tmp_path) not in json.dumps(known)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_fits_the_eye(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400
    assert path.suffix != ".js" or path.name in ("en.js", "zh.js") or lines[0].startswith("// ")
