"""The proof after assembly: the parts inside a model folder still compute what their sources compute.

Opens everything anew from disk and knows nothing of how it was assembled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistune.models import checkpoints
from vistune.models.assembling import fastvlm as assemble_fastvlm
from vistune.models.assembling.parts import inside, read_language, read_vision
from vistune.models.families import Family
from vistune.models.folders import Described
from vistune.models.hub import resolve
from vistune.models.load import build, nonfinite
from vistune.models.proving.finite import first_nonfinite
from vistune.models.proving.report import TOLERANCE, Report, Row, difference
from vistune.models.proving.rice import compare_vision
from vistune.models.weights import Entry

__all__ = ["Report", "Row", "verify"]


@torch.no_grad()
def verify(folder: Path | str, *, vision: str | Path, language: str | Path, dtype: torch.dtype | None = None) -> Report:
    """Compare the model in `folder` with the sources of its parts, layer by layer, on fixed inputs.

    Parts are held in the precision of the folder. In fp16, or in `dtype` when it is given, a picture and a text also go
    through the whole model, and the first module whose output is not finite is named. Raises ValueError when something
    cannot be opened at all.
    """
    folder = Path(folder)
    report = Report(str(folder))
    found = checkpoints.read(folder)
    family = found.said.family
    model: Any = build(family, found.said.config, found.tensors, "auto", str(folder), finite=False)
    bad = nonfinite(model)
    report.rows.append(Row("all", "values are finite", sum(1 for _ in model.parameters()), 0.0, _cause_nonfinite(bad)))
    if narrow := dtype or (torch.float16 if model.dtype == torch.float16 else None):
        report.rows.append(_check_range(found.said, model, narrow))

    parts = family.parts(model)
    report.rows += _compare_vision(family, vision, found.tensors, model)

    source, tokenizer = read_language(resolve(language, "language"), model.dtype, finite=False)
    # Rows beyond the tokenizer's are nobody's: assembling may give them to tokens of its own.
    rows = min(len(source.get_input_embeddings().weight), len(tokenizer))
    ids = torch.randint(0, rows, (1, 24), generator=torch.Generator().manual_seed(0))
    report.rows += _compare("language", inside(source), parts["language"][0], {"input_ids": ids}, rows)
    report.rows.append(_compare_head(source.lm_head, family.head(model), rows))
    return report


def _compare_vision(family: Family, vision: str | Path, tensors: Mapping[str, Entry], model: Any) -> list[Row]:
    """Towers of our own are compared by those who know their sources' names, stock ones with the stock class."""
    if family.name == "onevision15":
        return compare_vision(resolve(vision, "vision"), tensors, model.visual)
    ours = family.parts(model)["vision"][0]
    if family.name == "fastvlm":
        source = Path(vision) if Path(vision).is_file() else resolve(vision, "vision")
        return assemble_fastvlm.compare_vision(source, ours)
    dtype = next(ours.parameters()).dtype
    stock, _ = read_vision(resolve(vision, "vision"), dtype, finite=False)
    size = stock.config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    return _compare("vision", stock, ours, {"pixel_values": pixels})


def _check_range(said: Described, model: Any, dtype: torch.dtype) -> Row:
    """A picture of noise and a few words through the whole model."""
    pixels, grid = said.layout.blank(112, 112), said.layout.grid(112, 112)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    ids = [said.image_token_id] * said.layout.tokens(112, 112) + said.tokenizer("a picture")["input_ids"]
    inputs = said.family.inputs([noise], [grid] if grid else [])
    first = first_nonfinite(model, {"input_ids": torch.tensor([ids]), **inputs}, dtype)
    wrong = f"{first}: its output leaves the range of {dtype}; use bfloat16 or float32" if first else ""
    return Row("all", f"finite in {str(dtype).removeprefix('torch.')}", sum(1 for _ in model.modules()), 0.0, wrong)


def _cause_nonfinite(names: Sequence[str]) -> str:
    if not names:
        return ""
    first = names[0]
    if "multi_modal_projector" in first or ".merger." in first:
        cause = "the connector's file holds it, or its fresh weights overflowed in half precision"
    elif first.endswith(("inv_freq", "position_ids")):
        cause = "this buffer is not stored but computed, and was left uninitialised; open the folder anew"
    else:
        cause = "the source holds it too, or it was cast to a type too narrow for it (fp16 ends at 65,504)"
    return f"{first} is not finite (and {len(names) - 1} more); likely cause: {cause}"


def _compare(
    part: str, source: nn.Module, ours: nn.Module, inputs: dict[str, Tensor], rows: int | None = None
) -> list[Row]:
    """Two rows: every weight (of the embedding its first `rows`), then the hidden states after every layer."""
    return [_compare_weights(part, source, ours, rows), _compare_states(part, source, ours, inputs)]


def _compare_weights(part: str, source: Any, ours: nn.Module, rows: int | None) -> Row:
    """Rows of the embedding beyond the source's are new and not compared."""
    embedding = source.get_input_embeddings().weight if rows is not None else None
    held, worst, wrong = dict(ours.named_parameters()), 0.0, ""
    wanted = dict(source.named_parameters())
    if missing := wanted.keys() ^ held.keys():
        wrong = f"{min(missing)} is on one side only; likely cause: the source is not the one it was assembled from"
    for name in (name for name in wanted if name in held):
        one: Tensor = wanted[name]
        other: Tensor = held[name]
        if one is embedding:
            one, other = one[:rows], other[:rows]
        if not torch.equal(one, other):
            worst = max(worst, difference(one, other))
            wrong = wrong or f"{name} differs; likely cause: other weights, or a cast between the two"
    return Row(part, "weights", len(wanted), worst, wrong)


def _compare_states(part: str, source: Any, ours: Any, inputs: dict[str, Tensor]) -> Row:
    pair = [model(**inputs, output_hidden_states=True) for model in (source, ours)]
    states = [[*out.hidden_states, out.last_hidden_state] for out in pair]
    tolerance, worst = TOLERANCE.get(states[0][0].dtype, 1e-5), 0.0
    for depth, (one, other) in enumerate(zip(*states, strict=True)):
        found = difference(one, other)
        worst = max(worst, found)
        if not found <= tolerance:  # also when it is NaN
            return Row(part, "hidden states", len(states[0]), found, _cause(part, depth, one, other, source, ours))
    return Row(part, "hidden states", len(states[0]), worst)


def _cause(part: str, depth: int, one: Tensor, other: Tensor, source: Any, ours: Any) -> str:
    where = "the embedding" if depth == 0 else f"layers.{depth - 1}"
    for name, state in (("the source's", one), ("the assembled model's", other)):
        if not torch.isfinite(state).all():
            return (
                f"{where}: {name} output is not finite; likely cause: {state.dtype} is too narrow, or the weights are"
            )
    keys = [key for key, value in source.config.to_dict().items() if getattr(ours.config, key, None) != value]
    keys = [
        key
        for key in keys
        if key not in ("vocab_size", "dtype", "_name_or_path", "architectures", "transformers_version")
    ]
    cause = f"config keys differ: {', '.join(keys)}" if keys else "its weights differ, see the row above"
    return f"{where}: outputs differ; likely cause: {cause}"


def _compare_head(source: nn.Linear, ours: nn.Linear, rows: int) -> Row:
    """The first `rows` rows of the head, and its bias where it has one; those after are new."""
    wrong, held = "", dict(ours.named_parameters())
    for name, one in source.named_parameters():
        if name not in held or not torch.equal(one[:rows], held[name][:rows]):
            wrong = wrong or f"lm_head.{name} differs; likely cause: the head was tied to the embedding, or untied"
    return Row("language", "head", 1, difference(source.weight[:rows], ours.weight[:rows]), wrong)
