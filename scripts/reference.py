"""Write what docs/ says of the code itself: recipes.md from vistune/recipe.py, the table of modules in map.md from the
first sentence of every file."""

from __future__ import annotations

import ast
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vistune import recipe
from vistune.recipe import Recipe, Section

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

OPENING = """\
<!-- Made by scripts/reference.py from vistune/recipe.py (make docs). Change the descriptions there. -->
# Recipes

A recipe is one stage, written as one TOML file. `vistune train RECIPE` runs it.

```toml
run = "runs/first"

[model]
start = "runs/stage0"

[[data.sources]]
path = "playground/data/rows.json"
images = "playground/data"

[learn]
connector = 1e-3
```

That is a whole recipe: what is not said has the default below, and what `[learn]` does not name is frozen. There is no
word for a stage: aligning is a recipe in which the connector learns, instruction tuning one in which the language model
learns too.

**On the command line** `section.key=value` words lie over the file: `vistune train RECIPE run=elsewhere train.steps=60
data.sources.0.images=pictures learn.language=2e-5`. A value is read as TOML and, if it is none, as text.

**The run folder** holds the resolved recipe (`recipe.toml`), which makes the same run again; see
[checkpoints.md](checkpoints.md) for the rest of it.

**A mistake** names file, key, value and the nearest known key, all mistakes at once, with exit code 2:

```text
recipe one.toml: unknown key train.bach = 3. Did you mean batch?
recipe one.toml: optimizer.schedule = 'cosin': Input should be 'cosine', 'linear' or 'constant'
```

The published recipes lie in `recipes/`; comments there say where each number is from.
"""

LEARN = """
Keys are parts, or layers of a part; the more exact key wins. A value is a rate, or a table of the keys below.

| key | names |
|---|---|
| `vision`, `connector`, `language` | the whole part; `language` has the embeddings and the head |
| `"vision.layers.-4:"` | layers from the fourth last on; also `layers.2`, `layers.:6`, `layers.4:8` |

```text
[learn]
connector = 1e-3
language = { lr = 2e-5, min_lr = 2e-6 }
"vision.layers.-4:" = 2e-6
```
"""


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Every page that is made, or has a part that is made, as it should be."""
    return {DOCS / "recipes.md": recipes(), DOCS / "map.md": map_of_the_house()}


def map_of_the_house() -> str:
    """docs/map.md with its table of modules made anew."""
    page = (DOCS / "map.md").read_text(encoding="utf-8")
    rows = [f"| `{path.relative_to(ROOT)}` | {first_sentence(path)} |" for path in modules()]
    made = "\n".join(["| module | what it does |", "|---|---|", *rows])
    begin, end = "<!-- modules:begin -->\n", "\n<!-- modules:end -->"
    return re.sub(f"(?s)(?<={begin}).*?(?={end.strip()})", lambda _: made + "\n", page)


def modules() -> list[Path]:
    """Files of the package, a package's own __init__ first, then its modules, then the packages in it."""
    return sorted(
        (ROOT / "vistune").rglob("*.py"), key=lambda path: (path.parent.parts, path.stem != "__init__", path.stem)
    )


def first_sentence(path: Path) -> str:
    opening = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = re.match(r"(?s).*?[.](?=\s|$)", opening)
    return " ".join((sentence[0] if sentence else opening).split()).replace("|", "\\|")


def recipes() -> str:
    """docs/recipes.md as text."""
    parts = [OPENING, "\n## At the top of the file\n", table(plain(Recipe))]
    for name, field in Recipe.model_fields.items():
        if name not in plain(Recipe):
            parts += section(f"[{name}]", model_of(field.annotation))
    return "".join(parts)


def section(title: str, model: type[BaseModel]) -> list[str]:
    """A heading, what the section is, its keys, and then the sections inside it."""
    about = " ".join((model.__doc__ or "").split())
    parts = [f"\n## `{title}`\n\n{about}\n"]
    if model is recipe.Learn:
        return [*parts, LEARN, table(recipe.Rate.model_fields)]
    parts.append(table(model.model_fields))
    for name, field in model.model_fields.items():
        if name not in plain(model):
            parts += section(f"[[{title.strip('[]')}.{name}]]", model_of(field.annotation))
    return parts


def plain(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The keys that are values, not sections."""
    return {name: field for name, field in model.model_fields.items() if model_of(field.annotation) is BaseModel}


def model_of(kind: Any) -> type[BaseModel]:
    """The section that a type is, or is a list of; BaseModel itself if it is neither."""
    inner = get_args(kind)[0] if get_origin(kind) is list else kind
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else BaseModel


def table(fields: typing.Mapping[str, FieldInfo]) -> str:
    rows = [
        f"| `{name}` | {values(field)} | {default(field)} | {field.description or ''} |"
        for name, field in fields.items()
    ]
    return "\n| key | values | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def values(field: FieldInfo) -> str:
    """The type in words, with its bounds."""
    bounds = [
        f"{sign} {getattr(rule, name):g}" for rule in field.metadata for name, sign in SIGNS if hasattr(rule, name)
    ]
    return ", ".join([kind_of(field.annotation), *bounds])


SIGNS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
WORDS = {str: "text", int: "whole number", float: "number", bool: "true, false"}


def kind_of(kind: Any) -> str:
    if kind in WORDS:
        return WORDS[kind]
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(kind_of(one) for one in inside if one is not type(None))
    if origin is tuple:
        return f"list of {len(inside)} {kind_of(inside[0])}s"
    if origin is dict:
        return "table"
    if origin is list:
        if get_origin(inside[0]) is dict:
            return "list of tables"
        return "tables" if issubclass(model_of(kind), Section) else f"list of {kind_of(inside[0])}"
    raise TypeError(f"no words for the type {kind}")


def default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "must be given"
    if field.default is None:
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else repr(value)}`".replace("'", '"')


if __name__ == "__main__":
    main()
