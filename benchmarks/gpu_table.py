"""Rows of a run on a GPU -> a page: medians over repeats, ratios, losses side by side. Pure functions of the result."""

from __future__ import annotations

from statistics import median
from typing import Any

import gpu_cases
from kinds import KINDS, USEFUL

Row = dict[str, Any]
GB = 1e9


def tokens_per_s(row: Row) -> float:
    return row["tokens"] / row["seconds"]


def mfu(row: Row) -> float:
    """Useful FLOPs a second as a share of the matrix peak measured in the same process."""
    return row["useful_flops"] / row["seconds"] / row["matmul_peak"]


def hfu(row: Row) -> float | None:
    """With what was computed twice; None where that is not known (some of a layer)."""
    if row["checkpointing"] not in ("none", "full"):
        return None
    twice = row["forward_flops"] if row["checkpointing"] == "full" else 0.0
    return (row["useful_flops"] + twice) / row["seconds"] / row["matmul_peak"]


def line(row: Row) -> str:
    """One row as it comes, for the terminal."""
    head = f"{row['case']:20} {row['who']:8} round {row['round']}"
    if "failed" in row:
        return f"{head}  FAILED: {row['failed']}"
    return (
        f"{head}  {tokens_per_s(row):9,.0f} tokens/s  mfu {mfu(row):6.1%}  peak {row['peak_bytes'] / GB:6.1f} GB  "
        f"{row['steps']} steps in {row['seconds']:.1f} s  waited {row['waited_s']:.1f} s  "
        f"loss {row['losses'][0]:.4f} to {row['losses'][-1]:.4f}"
    )


def summary(rows: list[Row], preflight: dict[str, Row] | None = None) -> list[Row]:
    """One entry per case and contender: medians over its repeats, vistune's ratio to the stock stack; what preflight
    said of the case."""
    found = []
    for name in dict.fromkeys(row["case"] for row in rows):
        here = [row for row in rows if row["case"] == name]
        for who in dict.fromkeys(row["who"] for row in here):
            found.append(_one(name, who, [row for row in here if row["who"] == who]))
    by = {(one["case"], one["who"]): one for one in found}
    for one in found:
        one["preflight"] = (preflight or {}).get(one["case"], {})
        ours = by.get((one["case"], "vistune"))
        if one["who"] == "stock" and ours and "failed" not in ours and "failed" not in one:
            one["ratio"] = ours["tokens_per_s"] / one["tokens_per_s"]
            one["first_loss_difference"] = abs(ours["losses"][0] - one["losses"][0])
    return found


def _one(name: str, who: str, rows: list[Row]) -> Row:
    good = [row for row in rows if "failed" not in row]
    if not good:
        return {"case": name, "who": who, "failed": rows[-1]["failed"]}
    shares = [hfu(row) for row in good]
    last = good[-1]
    return {
        "case": name,
        "who": who,
        "repeats": len(good),
        "tokens_per_s": median(map(tokens_per_s, good)),
        "supervised_per_s": median(row["supervised"] / row["seconds"] for row in good),
        "mfu": median(map(mfu, good)),
        "hfu": None if None in shares else median(share for share in shares if share is not None),
        "padding": 1 - last["tokens"] / max(1, last["positions"]),
        "waited": median(row["waited_s"] / row["seconds"] for row in good),
        "peak_bytes": max(row["peak_bytes"] for row in good),
        **{key: last[key] for key in ("losses", "checkpointing", "compile", "precision", "steps")},
    }


def markdown(result: Row) -> str:
    """The whole result as a page."""
    rows = result["rows"]
    peaks = [row["matmul_peak"] for row in rows if "matmul_peak" in row]
    versions = next((row["versions"] for row in rows if "versions" in row), {})
    lines = [
        f"# Training steps on {'a CPU, tiny shapes: no figure counts' if result['tiny'] else result['device']}",
        "",
        f"Matrix product at best, in the type of the steps: {max(peaks, default=0) / 1e12:,.2f} TFLOP/s. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f". Up to {result['steps']} steps after {result['warmup']} that do not count.",
        "Tokens are real ones, padding apart. MFU counts what the loss and its gradients need, frozen parts and vision "
        "included; HFU also what is computed twice. The stock stack's batches were made beforehand; vistune reads, "
        "decodes and packs while it trains.",
    ]
    if result["words"]:
        lines.append(f"Over every recipe of vistune: {' '.join(result['words'])}.")
    head = "case|who|tokens/s|supervised/s|MFU|HFU|padding|peak GB|preflight GB|checkpointing|compile|weights|repeats"
    head += "|waiting for data|vistune's speed"
    lines += ["", f"|{head}|", "|" + "---|" * (head.count("|") + 1)]
    found = summary(rows, result.get("preflight"))
    lines += [f"|{'|'.join(_cells(one))}|" for one in found]
    lines += [
        f"|{case.says}|stock|n/a: no stock class (none for OneVision; FastVLM's needs timm)|"
        for case in gpu_cases.CASES
        if not case.padded and any(one["case"] == case.name for one in found)
    ]
    lines += ["", *_losses(found), *_profile(result.get("profile"))]
    silent = [f"{name} ({said['failed']})" for name, said in result.get("preflight", {}).items() if "failed" in said]
    if silent:
        lines += ["", f"Preflight could not say: {', '.join(silent)}."]
    if dropped := [f"{one['case']} {one['who']} round {one['round']}" for one in result["dropped"]]:
        lines += ["", f"Dropped for time: {', '.join(dropped)}."]
    return "\n".join(lines) + "\n"


def _cells(one: Row) -> list[str]:
    says = next((case.says for case in gpu_cases.CASES if case.name == one["case"]), one["case"])
    if "failed" in one:
        return [says, one["who"], one["failed"].replace("|", "/")]
    told = one["preflight"]
    preflight = f"{told['peak_bytes'] / GB:.1f}" if "peak_bytes" in told else "n/a"
    if "peak_bytes" in told and one["peak_bytes"]:
        preflight += f" ({told['peak_bytes'] / one['peak_bytes'] - 1:+.1%})"
    return [
        says,
        one["who"],
        f"{one['tokens_per_s']:,.0f}",
        f"{one['supervised_per_s']:,.0f}",
        f"{one['mfu']:.1%}",
        "n/a" if one["hfu"] is None else f"{one['hfu']:.1%}",
        f"{one['padding']:.1%}",
        f"{one['peak_bytes'] / GB:.1f}" if one["peak_bytes"] else "n/a",
        preflight if one["who"] == "vistune" else "",
        one["checkpointing"],
        "yes" if one["compile"] else "no",
        one["precision"],
        str(one["repeats"]),
        f"{one['waited']:.1%}",
        f"{one['ratio']:.2f}x" if "ratio" in one else "",
    ]


def _losses(found: list[Row]) -> list[str]:
    """Of both on the same samples and weights."""
    by = {(one["case"], one["who"]): one for one in found if "failed" not in one}
    lines = []
    for (case, who), one in by.items():
        ours = by.get((case, "vistune"))
        if who == "stock" and ours:
            pairs = list(zip(ours["losses"], one["losses"], strict=False))
            shown = ", ".join(f"{a:.4f} / {b:.4f}" for a, b in pairs[:4])
            worst = max(abs(a - b) / abs(b) for a, b in pairs)
            lines.append(
                f"- Losses, {case}, vistune / stock: {shown}; over {len(pairs)} steps at most {worst:.1e} apart, "
                f"relative; the first {abs(pairs[0][0] - pairs[0][1]) / abs(pairs[0][1]):.1e}."
            )
    return lines


def _profile(told: Row | None) -> list[str]:
    """Where the time of the profiled steps went."""
    if not told:
        return []
    if told.get("failed") or "kinds" not in told:
        return ["", f"Profile of {told['case']}: {told.get('failed')}"]
    busy, wall = told["busy_s"], told["wall_s"]
    useful = sum(told["kinds"].get(kind, 0.0) for kind in USEFUL)
    lines = [
        "",
        f"## Profile: {told['case']}, {told['steps']} steps",
        "",
        f"{wall:.3f} s of clock, {busy:.3f} s of kernels; {1 - useful / busy:.1%} of these outside products, attention "
        f"and convolutions; the device idle for {max(0.0, 1 - busy / wall):.1%} of the clock (the profiler's own cost "
        "among it).",
        "",
        "|kind|seconds|share|",
        "|---|---|---|",
        *(
            f"|{kind}|{told['kinds'][kind]:.4f}|{told['kinds'][kind] / busy:.1%}|"
            for kind in KINDS
            if kind in told["kinds"]
        ),
        "",
        "|kernel|kind|calls|seconds|share|",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"|`{one['name'].replace('|', '/')}`|{one['kind']}|{one['calls']}|{one['seconds']:.4f}"
        f"|{one['seconds'] / busy:.1%}|"
        for one in told["kernels"]
    ]
