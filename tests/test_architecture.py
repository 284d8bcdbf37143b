"""The floors of the house, held: who may import whom, and the habits that a reader relies on.

A new room or module is one line in `ROOMS`. See docs/map.md for what each floor is.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vistune"

ROOMS: dict[str, tuple[int, tuple[str, ...]]] = {
    # room: (floor, its modules and packages under vistune). Inside a room modules import each other freely.
    "version": (0, ("",)),
    "limits": (0, ("limits",)),
    "samples": (1, ("samples",)),
    "files": (1, ("files",)),
    "recipe": (1, ("recipe",)),
    "ranks": (1, ("ranks",)),
    "console": (1, ("console",)),
    "pages": (1, ("pages",)),
    "images": (2, ("images", "native", "anyres")),
    "chat": (2, ("chat", "templates", "text_encoder", "word_cache")),
    "data": (3, ("data",)),
    "models": (3, ("models",)),
    "inputs": (4, ("inputs",)),
    "generate": (5, ("generate", "asking", "decoding", "speech")),
    "evaluate": (6, ("evaluate",)),
    "train": (7, ("train",)),
    "prove": (8, ("prove",)),
    "serve": (8, ("serve",)),
    "quickstart": (9, ("quickstart",)),
    "preflight": (9, ("preflight",)),
    "doctor": (9, ("doctor",)),
    "report": (9, ("report",)),
    "cli": (10, ("cli", "cli_data", "cli_evaluate", "cli_models", "cli_preflight", "cli_serve", "__main__")),
}

LATE: dict[str, str] = {
    # what a function may import by itself, and why it is not at the top of the file
    "matplotlib": "extra report",
    "bitsandbytes": "extra quant",
    "wandb": "extra track",
    "trackio": "extra track",
    "torch.utils.tensorboard": "extra track",
    "openai": "extra eval",
    "openpyxl": "extra eval",
    "webdataset": "extra data",
    "datasets": "extra data",
    "lmms_eval": "extra lmms-eval",
    "peft": "takes seconds to import, and only LoRA needs it",
    "torch.nn.attention.varlen": "not on every device and build",
}
LATE_FILES = dict.fromkeys(
    ("__main__.py", "cli.py", "cli_data.py", "cli_evaluate.py", "cli_models.py", "cli_preflight.py", "cli_serve.py"),
    "a verb imports its room when it is asked for, so that --help answers at once",
)

EXTRA_FILES = {
    "evaluate/lmms_model.py": {"lmms_eval"},
    "serve/": {"fastapi", "starlette", "uvicorn", "h11", "prometheus_client", "httpx"},
}
"""What a file (or all of a folder) that only an extra's own program imports may take from it at the top."""

SAME_AS = {"PIL": "pillow", "huggingface_hub": "transformers", "yaml": "pyyaml"}
"""Import name -> the dependency in pyproject.toml that brings it, where the names differ."""

NO_NAMES = {"utils", "util", "common", "core", "helpers", "helper", "misc", "manager", "base", "v2"}
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_OPENING = 400, 60, 5

FILES = sorted(PACKAGE.rglob("*.py"))


def over(paths: Sequence[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """A check of one file becomes one test of all `paths`, which names every file that fails it: thousands of tests of
    a millisecond would cost more than what they check."""

    def made(check: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            wrong = {}
            for path in paths:
                try:
                    check(path)
                except (AssertionError, pytest.fail.Exception) as error:
                    wrong[path.relative_to(ROOT).as_posix()] = str(error).splitlines()[0]
            assert not wrong

        test.__doc__ = check.__doc__
        return test

    return made


each_file = over(FILES)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_of(path: Path) -> str:
    """`vistune/data/plan.py` -> "data.plan"; the package's own __init__ -> ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@cache
def room_of(module: str) -> str:
    """The room of a module under vistune. Fails for one that is in no room yet."""
    for room, (_, names) in ROOMS.items():
        if any(module == name or (name and module.startswith(name + ".")) for name in names):
            return room
    pytest.fail(f"vistune.{module} is in no room: add it to ROOMS in {Path(__file__).name}, and to docs/map.md")


@cache
def is_module(dotted: str) -> bool:
    place = PACKAGE.joinpath(*dotted.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def imported(node: ast.AST) -> list[str]:
    """Full dotted names that an import statement brings in; `from a import b` gives a.b where b is a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        source = node.module or ""
        if source.split(".")[0] != "vistune":
            return [source]
        inner = source.removeprefix("vistune").removeprefix(".")
        names = [f"{inner}.{alias.name}".removeprefix(".") for alias in node.names]
        return [f"vistune.{name}" if is_module(name) else source for name in names]
    return []


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree(path)))


@cache
def imports(path: Path) -> tuple[tuple[ast.stmt, str], ...]:
    """Every import of a file, those under TYPE_CHECKING and in functions too."""
    found = [node for node in nodes(path) if isinstance(node, ast.Import | ast.ImportFrom)]
    return tuple((node, name) for node in found for name in imported(node))


def late_imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    functions = [n for n in nodes(path) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    inside = {id(node): node for function in functions for node in ast.walk(function)}
    return ((node, name) for node, name in imports(path) if id(node) in inside)


def starts_with(name: str, names: dict[str, str]) -> bool:
    return any(name == known or name.startswith(known + ".") for known in names)


def breaches(path: Path, module: str) -> list[str]:
    """Imports that go up a floor, or across to a neighbour."""
    room = room_of(module)
    floor, found = ROOMS[room][0], []
    for node, name in imports(path):
        if name.split(".")[0] != "vistune":
            continue
        other = room_of(name.removeprefix("vistune").removeprefix("."))
        if other != room and ROOMS[other][0] >= floor:
            found.append(
                f"line {node.lineno}: {room} (floor {floor}) imports {name} ({other}, floor {ROOMS[other][0]})"
            )
    return found


@each_file
def test_a_room_imports_lower_floors_only(path: Path) -> None:
    assert not breaches(path, module_of(path))


def test_the_check_sees_what_it_is_for(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from vistune.models import families\n"
        "def f():\n    import vistune.train.loss\n"
        "from vistune import data, console\n"
    )
    assert len(breaches(wrong, "data.wrong")) == 2  # models, train; data is its own room, console is below
    assert len(breaches(wrong, "models.wrong")) == 2  # train, data
    assert len(breaches(wrong, "samples")) == 4
    assert not breaches(wrong, "quickstart.wrong")
    assert [name for _, name in late_imports(wrong)] == ["vistune.train.loss"]


@each_file
def test_imports_are_absolute(path: Path) -> None:
    relative = [n.lineno for n in nodes(path) if isinstance(n, ast.ImportFrom) and n.level]
    assert not relative, f"relative imports on lines {relative}"


@each_file
def test_functions_import_only_what_may_be_absent(path: Path) -> None:
    if path.relative_to(PACKAGE).as_posix() in LATE_FILES:
        return
    late = [f"line {node.lineno}: {name}" for node, name in late_imports(path) if not starts_with(name, LATE)]
    assert not late, f"imports in functions: {late}. Move them to the top, or say in LATE why not"


@each_file
def test_what_is_imported_at_the_top_is_a_dependency(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = {re.split(r"[^\w-]", name)[0] for name in project["dependencies"]}
    late = {id(node) for node, _ in late_imports(path)}
    tops = {name.split(".")[0] for node, name in imports(path) if id(node) not in late}
    foreign = {top for top in tops if top not in sys.stdlib_module_names and top != "vistune"}
    place = path.relative_to(PACKAGE).as_posix()
    extra = set().union(*(tops for prefix, tops in EXTRA_FILES.items() if place.startswith(prefix)))
    unknown = {top for top in foreign - extra if SAME_AS.get(top, top) not in installed}
    assert not unknown, f"{unknown}: not among the dependencies of pyproject.toml"


@each_file
def test_a_file_opens_with_what_it_does(path: Path) -> None:
    opening = ast.get_docstring(tree(path)) or ""
    lines = [line for line in opening.splitlines() if line.strip()]
    assert 1 <= len(lines) <= LONGEST_OPENING, f"{len(lines)} lines of docstring; one to three say it"


@each_file
def test_files_and_functions_fit_the_eye(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    functions = [n for n in nodes(path) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: size for f in functions if (size := (f.end_lineno or 0) - f.lineno + 1) > LONGEST_FUNCTION}
    assert not long, f"over {LONGEST_FUNCTION} lines: {long}"


def test_no_file_is_named_after_nothing() -> None:
    everything = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    vague = [p.relative_to(ROOT).as_posix() for p in everything if NO_NAMES & set(p.stem.split("_"))]
    assert not vague
    assert not [p for p in PACKAGE.rglob("*") if p.is_dir() and p.name in NO_NAMES]


def test_no_test_imports_a_conftest() -> None:
    """Every folder's has the same module's name: which of them is found depends on what ran before."""
    borrows = re.compile(r"^\s*(from|import) .*\bconftest\b", re.MULTILINE)
    assert not [path.name for path in (ROOT / "tests").rglob("*.py") if borrows.search(path.read_text("utf-8"))]


def swallows(handler: ast.ExceptHandler) -> bool:
    """A handler for everything, or one that does nothing at all."""
    idle = all(
        isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in handler.body
    )
    return handler.type is None or idle


@each_file
def test_no_exception_is_swallowed(path: Path) -> None:
    everything = nodes(path)
    silent = [n.lineno for n in everything if isinstance(n, ast.ExceptHandler) and swallows(n)]
    silent += [
        n.lineno
        for n in everything
        if isinstance(n, ast.Call) and ast.unparse(n.func).endswith("suppress") and "Exception" in ast.unparse(n)
    ]
    assert not silent, f"bare or idle except on lines {silent}"


TEXTS = [
    path
    for folder in ("vistune", "tests", "docs", "recipes", "benchmarks", "scripts", ".ci", "")
    for path in sorted((ROOT / folder).glob("*" if folder in ("", ".ci", "scripts") else "**/*"))
    if path.is_file() and (path.suffix in (".py", ".md", ".toml", ".sh", ".yaml") or not path.suffix)
    if "golden" not in path.parts and path.name != "LICENSE" and not path.name.startswith(".git")
]
PLACES = re.compile(
    r"(?<![\w.~>)}\"])/(?:home|root|work|mnt|opt(?!/rocm|/dtk|/hpc)|tmp)/\w|\bissues? #?\d+\b|\bfile:///",
    re.IGNORECASE,
)
"""Absolute paths of somebody's machine, and numbers of somebody's list of things to do."""


@over(TEXTS)
def test_nothing_speaks_of_the_place_it_was_written_in(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = [line for line in text.splitlines() if PLACES.search(line) and path != Path(__file__)]
    assert not found
