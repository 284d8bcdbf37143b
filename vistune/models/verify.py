"""The proof after assembly: the parts inside a model folder still compute what their sources compute.

Opens everything anew from disk and knows nothing of how it was assembled.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistune import console
from vistune.models import checkpoints
from vistune.models.assemble import read_language, read_vision, resolve
from vistune.models.load import build, nonfinite

# Relative to the largest value. Hidden states come out bit-equal; the head's product may add in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Row:
    """One check: of what, on how many modules, the greatest difference, and what is wrong (empty: nothing)."""

    part: str
    check: str
    modules: int
    difference: float
    wrong: str = ""


@dataclass
class Report:
    """What was proved. `ok` when nothing is wrong."""

    folder: str
    rows: list[Row] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(row.wrong for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        return {"folder": self.folder, "ok": self.ok, "rows": [asdict(row) for row in self.rows]}

    def show(self) -> None:
        """A table on stdout; what is wrong on stderr."""
        cells = [(r.part, r.check, r.modules, f"{r.difference:.2g}", "no" if r.wrong else "yes") for r in self.rows]
        console.table(
            f"{self.folder}: is it what it was made of", ["part", "check", "of", "difference", "holds"], cells
        )
        for row in self.rows:
            if row.wrong:
                console.err.print(f"{row.part}: {row.wrong}", markup=False)


@torch.no_grad()
def verify(folder: Path | str, *, vision: str | Path, language: str | Path) -> Report:
    """Compare the model in `folder` with the sources of its parts, layer by layer, on fixed inputs.

    Parts are held in the precision of the folder. Raises ValueError when something cannot be opened at all.
    """
    folder = Path(folder)
    report = Report(str(folder))
    found = checkpoints.read(folder)
    model: Any = build(found.said.family, found.said.config, found.tensors, "auto", str(folder), finite=False)
    bad = nonfinite(model)
    report.rows.append(Row("all", "values are finite", sum(1 for _ in model.parameters()), 0.0, _cause_nonfinite(bad)))

    source, _ = read_vision(resolve(vision, "vision"), model.dtype, finite=False)
    ours = model.model.vision_tower
    size = source.config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    report.rows += _compare("vision", source, ours, {"pixel_values": pixels})
    del source
    gc.collect()

    source, _ = read_language(resolve(language, "language"), model.dtype, finite=False)
    rows = len(source.get_input_embeddings().weight)
    ids = torch.randint(0, rows, (1, 24), generator=torch.Generator().manual_seed(0))
    report.rows += _compare("language", source.model, model.model.language_model, {"input_ids": ids})
    report.rows.append(_compare_head(source.lm_head, model.lm_head, rows))
    return report


def _cause_nonfinite(names: Sequence[str]) -> str:
    if not names:
        return ""
    first = names[0]
    if "multi_modal_projector" in first:
        cause = "the connector's file holds it, or its fresh weights overflowed in half precision"
    elif first.endswith(("inv_freq", "position_ids")):
        cause = "this buffer is not stored but computed, and was left uninitialised; open the folder anew"
    else:
        cause = "the source holds it too, or it was cast to a type too narrow for it (fp16 ends at 65,504)"
    return f"{first} is not finite (and {len(names) - 1} more); likely cause: {cause}"


def _compare(part: str, source: nn.Module, ours: nn.Module, inputs: dict[str, Tensor]) -> list[Row]:
    """Two rows: every weight, then the hidden states after every layer."""
    return [_compare_weights(part, source, ours), _compare_states(part, source, ours, inputs)]


def _compare_weights(part: str, source: nn.Module, ours: nn.Module) -> Row:
    """Rows of the embedding beyond the source's are new and not compared."""
    held, worst, wrong = dict(ours.named_parameters()), 0.0, ""
    wanted = dict(source.named_parameters())
    if missing := wanted.keys() ^ held.keys():
        wrong = f"{min(missing)} is on one side only; likely cause: the source is not the one it was assembled from"
    for name in (name for name in wanted if name in held):
        one, other = wanted[name], held[name][: len(wanted[name])] if wanted[name].ndim else held[name]
        if not torch.equal(one, other):
            worst = max(worst, _difference(one, other))
            wrong = wrong or f"{name} differs; likely cause: other weights, or a cast between the two"
    return Row(part, "weights", len(wanted), worst, wrong)


def _compare_states(part: str, source: Any, ours: Any, inputs: dict[str, Tensor]) -> Row:
    pair = [model(**inputs, output_hidden_states=True) for model in (source, ours)]
    states = [[*out.hidden_states, out.last_hidden_state] for out in pair]
    tolerance, worst = TOLERANCE.get(states[0][0].dtype, 1e-5), 0.0
    for depth, (one, other) in enumerate(zip(*states, strict=True)):
        difference = _difference(one, other)
        worst = max(worst, difference)
        if not difference <= tolerance:  # also when it is NaN
            return Row(part, "hidden states", len(states[0]), difference, _cause(part, depth, one, other, source, ours))
    return Row(part, "hidden states", len(states[0]), worst)


def _difference(one: Tensor, other: Tensor) -> float:
    """Greatest difference relative to the greatest value; NaN when either holds one."""
    scale = one.float().abs().max().clamp_min(1.0)
    return float(((one.float() - other.float()).abs().max() / scale).item())


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
    """The first `rows` rows of the head; those after are new."""
    equal = torch.equal(source.weight[:rows], ours.weight[:rows])
    wrong = "" if equal else "lm_head.weight differs; likely cause: the head was tied to the embedding, or untied"
    return Row("language", "head", 1, _difference(source.weight[:rows], ours.weight[:rows]), wrong)
