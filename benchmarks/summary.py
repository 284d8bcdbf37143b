"""Runs of all contenders -> medians, ratios, a table. Pure functions of the recorded steps; measures nothing."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from stages import Stage

FOREIGN = 0.12
"""Cores that other processes may use during a step before it counts as contended."""

GOALS = {
    ("speed", 1, "trl"): (2.5, 3.0),
    ("speed", 2, "trl"): (3.0, 3.5),
    ("speed", 2, "trl_forced"): (1.6, 2.2),
    ("speed", "lora", "trl"): (None, 2.5),
    ("memory", "8k", "trl"): (0.75, 0.7),
    ("memory", "32k", "trl"): (0.5, 0.45),
}
"""What must hold (None: nothing), and what is aimed at. Speed in bf16: tokens per CPU-second at least so many times the
peer's; peak memory at most that share of it."""
MFU_AIMS = {"fp32": 0.7, "bf16": 0.4}
"""By the type that was computed in."""

Run = dict[str, Any]
Cell = tuple[Stage, str, str]  # stage, vocabulary, precision


def steps_that_count(run: Run, dropped: int) -> tuple[list[dict[str, Any]], bool]:
    """The run's steps after the first `dropped`: the uncontended ones if there are three, else all, and whether so."""
    steps = run["steps"][dropped:]
    clean = [s for s in steps if s["foreign_cores"] <= FOREIGN]
    return (clean, False) if len(clean) >= min(3, len(steps)) else (steps, True)


def figures(run: Run, dropped: int) -> dict[str, Any]:
    """Medians over the steps of one run; MFU of the matrix peak that was measured just before it."""
    peak = run["matmul_peak"][computed(run)]
    steps, contended = steps_that_count(run, dropped)
    return {
        "tokens_per_cpu_s": median(s["tokens"] / s["cpu_s"] for s in steps),
        "tokens_per_s": median(s["tokens"] / s["wall_s"] for s in steps),
        "supervised_per_cpu_s": median(s["supervised"] / s["cpu_s"] for s in steps),
        "cpu_s": median(s["cpu_s"] for s in steps),
        "mfu": median(s["flops"] / s["wall_s"] for s in steps) / peak,
        "padding": 1 - sum(s["tokens"] for s in steps) / sum(s["positions"] for s in steps),
        "peak_bytes": run["peak_bytes"],
        "contended": contended,
        "steps": len(steps),
        "last_loss": run["steps"][-1]["loss"],
        "computed": computed(run),
    }


def computed(run: Run) -> str:
    """The type that the run multiplied in: vistune's bf16 is fp32 on a CPU without bf16 instructions."""
    return run.get("computed") or run["cell"][2]


def summarise(runs: list[Run], dropped: int) -> list[dict[str, Any]]:
    """One row per (stage, vocabulary, precision, contender): medians over rounds, vistune's ratios to each peer."""
    done = [{**{k: run[k] for k in ("cell", "round", "who")}, **figures(run, dropped)} for run in runs]
    rows = []
    for cell in dict.fromkeys(tuple(one["cell"]) for one in done):
        here = [one for one in done if tuple(one["cell"]) == cell]
        for who in dict.fromkeys(one["who"] for one in here):
            mine = [one for one in here if one["who"] == who]
            row = {"stage": cell[0], "vocab": cell[1], "precision": cell[2], "who": who, "rounds": len(mine)}
            row["computed"] = mine[0]["computed"]
            for key in ("tokens_per_cpu_s", "tokens_per_s", "supervised_per_cpu_s", "mfu", "padding", "peak_bytes"):
                row[key] = median(one[key] for one in mine)
            values = [one["tokens_per_cpu_s"] for one in mine]
            row |= {"lowest": min(values), "highest": max(values), "contended": sum(one["contended"] for one in mine)}
            if who != "vistune":
                row |= _ratios(here, who)
            rows.append(row)
    return rows


def _ratios(here: list[dict[str, Any]], who: str) -> dict[str, Any]:
    """vistune against `who`, round by round, and the median of that."""
    by = {(one["who"], one["round"]): one for one in here}
    pairs = [(by["vistune", r], by[who, r]) for w, r in by if w == who and ("vistune", r) in by]
    if not pairs:
        return {}
    made: Callable[[str], list[float]] = lambda key: [ours[key] / theirs[key] for ours, theirs in pairs]  # noqa: E731
    speed = made("tokens_per_cpu_s")
    memory = made("peak_bytes")
    return {"speed": median(speed), "speed_range": [min(speed), max(speed)], "memory": median(memory)}


def parity(ours: Run, theirs: Run) -> dict[str, Any]:
    """Largest relative difference of the losses, step by step, and whether ids and labels were the same."""
    pairs = list(zip(ours["steps"], theirs["steps"], strict=True))
    same = [_samples(a) == _samples(b) for a, b in pairs]
    return {
        "steps": len(pairs),
        "same_ids": all(same),
        "first_other_ids": same.index(False) + 1 if not all(same) else None,
        "largest_relative_difference": max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs),
        "first_loss": pairs[0][1]["loss"],
        "last_loss": pairs[-1][1]["loss"],
    }


def _samples(step: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """The step's (ids, labels), sorted: the order of samples within a step is no difference."""
    return sorted(zip(step["ids"], step["labels"], strict=True))


def goal(row: dict[str, Any], kind: str) -> str:
    """What must hold and what is aimed at, and whether it was reached; empty where nothing is."""
    key = (kind, row["stage"] if kind == "speed" else row["vocab"], row["who"])
    if key not in GOALS or kind not in row or (kind == "speed" and row["precision"] != "bf16"):
        return ""
    more = kind == "speed"
    said = [
        f"{word}{'>=' if more else '<='} {wanted:g}: {'yes' if (row[kind] >= wanted) == more else 'NO'}"
        for word, wanted in zip(("", "aim "), GOALS[key], strict=True)
        if wanted is not None
    ]
    return f" ({', '.join(said)})"


def mfu(row: dict[str, Any]) -> str:
    """Share of the measured matrix peak of the type that was computed in; for vistune with its aim."""
    said = f"{row['mfu']:.1%} of {row['computed']}"
    aim = MFU_AIMS[row["computed"]]
    return said if row["who"] != "vistune" else f"{said} (aim >= {aim:.0%}: {'yes' if row['mfu'] >= aim else 'NO'})"


def markdown(result: dict[str, Any], who: dict[str, str]) -> str:
    """The whole result as a page."""
    machine, rows = result["machine"], result["summary"]
    measured = [result["matmul_peak"], *(run["matmul_peak"] for run in result["runs"])]
    best = {name: max(one[name] for one in measured) for name in result["matmul_peak"]}
    peaks = ", ".join(f"{name} {value / 1e9:,.0f} GFLOP/s" for name, value in best.items())
    lines = [
        "# One training step, side by side",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {result['threads']} threads; "
        f"instructions {', '.join(machine['instructions'])}; matrix product at best: {peaks}.",
        f"{result['rounds']} rounds of {result['steps']} steps, the first {result['dropped']} not counted, "
        f"batch {result['batch']}; the same samples in the same order for everybody. tok = non-padding tokens.",
        f"Peak memory is above what was resident after the imports ({result['memory']}).",
        f"A run is contended when other processes used more than {FOREIGN} cores in most of its steps.",
        "",
    ]
    lines += [f"- `{name}`: {who[name]}" for name in dict.fromkeys(row["who"] for row in rows)]
    head = "stage|vocab|precision|who|tok / CPU-s [range]|tok / s|supervised / CPU-s|MFU|padding|peak MB|contended"
    head += "|vistune's speed|vistune's memory"
    lines += ["", f"|{head}|", "|" + "---|" * (head.count("|") + 1)]
    lines += [f"|{'|'.join(_cells(row))}|" for row in rows]
    for name, found in result.get("parity", {}).items():
        lines += ["", _told(name, found)]
    versions = {who: run["versions"] for run in result["runs"] for who in [run["who"]]}
    lines += ["", *(f"- {name}: {', '.join(f'{k} {v}' for k, v in found.items())}" for name, found in versions.items())]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    speed = f"{row['speed']:.2f}x [{row['speed_range'][0]:.2f}-{row['speed_range'][1]:.2f}]" if "speed" in row else ""
    memory = f"{row['memory']:.2f}x" if "memory" in row else ""
    return [
        str(row["stage"]),
        row["vocab"],
        row["precision"],
        row["who"],
        f"{row['tokens_per_cpu_s']:,.0f} [{row['lowest']:,.0f}-{row['highest']:,.0f}]",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['supervised_per_cpu_s']:,.0f}",
        mfu(row),
        f"{row['padding']:.1%}",
        f"{row['peak_bytes'] / 1e6:,.0f}",
        f"{row['contended']} of {row['rounds']}",
        speed + goal(row, "speed"),
        memory + goal(row, "memory"),
    ]


def _told(name: str, found: dict[str, Any]) -> str:
    ids = "the same ids and labels" if found["same_ids"] else f"OTHER ids from step {found['first_other_ids']}"
    return (
        f"Losses, {name}: {found['steps']} steps in fp32, unpacked, {ids}; largest relative difference "
        f"{found['largest_relative_difference']:.1e} (at most {found['allowed']:g}); "
        f"{found['first_loss']:.4f} to {found['last_loss']:.4f}."
    )
