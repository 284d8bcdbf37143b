"""What preflight found, as people read it."""

from __future__ import annotations

from typing import Any

from vistune import console
from vistune.preflight.check import Report
from vistune.preflight.counting import Micro
from vistune.preflight.parts import PARTS, Memory
from vistune.preflight.sizes import GB, GIB, Card, both
from vistune.preflight.timing import Time

WIDE = 18
"""Characters of a bar that is as long as the card."""


TIGHT = 0.03
"""Less of the card than this is nothing to rely on."""


def show(report: Report) -> None:
    """Tables of the run, of the memory and of what would fit, and the verdict."""
    console.say(f"model: {report.subject.family.name}, {report.subject.found}")
    for line in report.run.assumed:
        console.say(f"assumed: {line}")
    console.table("the run", ("what", "value"), _run(report))
    show_memory(report.memory, report.card, f"memory of each GPU{_cards(report)}, in {_micro(report.micro)}")
    console.say(verdict(report))
    if report.remedies:
        show_remedies(report)


def _cards(report: Report) -> str:
    world = report.gpus * report.nodes
    shard = report.recipe.parallel.shard
    return "" if world == 1 else f" of {world} ({'whole weights on each' if shard == 'none' else shard})"


def _micro(one: Micro) -> str:
    return f"a micro-batch of {one.tokens:,} tokens, {len(one.lengths)} samples, {one.images} images"


def _run(report: Report) -> list[tuple[str, str]]:
    facts = {name.replace("_", " "): _number(value) for name, value in report.run.facts.items()}
    facts["micro-batches a step and GPU"] = str(report.run.micro_batches)
    facts |= _time(report.time)
    return list(facts.items())


def _time(time: Time | None) -> dict[str, str]:
    if time is None:
        return {"time of a step": "give --peak-tflops or a card's name"}
    found = {
        "work of a step": f"{time.tflop:,.0f} TFLOP, recomputation apart",
        "time of a step": f"{time.step:,.2f} s at {time.mfu:.0%} of {time.peak_tflops:,.0f} TFLOP/s ({time.basis})",
    }
    return found | ({"time of the run": _hours(time.run)} if time.run else {})


def _hours(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _number(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def show_memory(memory: Memory, card: Card, title: str) -> None:
    """Every part in both units, with a bar against the card."""
    named = [(name, memory.parts[name]) for name in PARTS] + list(memory.beside.items())
    rows = [_row(name, size, card) for name, size in named if size]
    rows.insert(len(rows) - len(memory.beside), _row("= peak of tensors", memory.peak, card))
    rows.append(_row("= needed", memory.needed, card))
    rows.append(_row(f"the card ({card.name})", card.memory, card))
    console.table(title, ("part", "GB", "GiB", "of the card", ""), rows)
    console.say(f"the most is needed at: {memory.moment}")
    if memory.host:
        console.say(f"in the host's memory, each rank: {both(memory.host)}")


def _row(name: str, size: int, card: Card) -> tuple[str, str, str, str, str]:
    share = size / card.memory
    bar = "█" * min(WIDE, round(WIDE * share)) + ("▶" if share > 1 else "")
    return name, f"{size / GB:,.2f}", f"{size / GIB:,.2f}", f"{share:.1%}", bar


def verdict(report: Report) -> str:
    """Whether it fits, and by how much."""
    if report.fits and -report.missing < TIGHT * report.card.memory:
        return f"fits barely: {both(-report.missing)} of {report.card.name} are left, nothing to rely on"
    if report.fits:
        return f"fits: {both(-report.missing)} of {report.card.name} are left"
    return f"does NOT fit: {both(report.missing)} too much for {report.card.name}"


def show_remedies(report: Report) -> None:
    rows = [
        ("\n".join(one.words), "yes" if one.fits else "no", f"{one.memory.needed / GB:,.1f}",
         f"{one.memory.needed / GIB:,.1f}", f"{one.memory.needed / report.card.memory:.0%}", one.note)
        for one in report.remedies
    ]  # fmt: skip
    title = "what would fit, the least change first" if any(one.fits for one in report.remedies) else "nothing fits"
    console.table(title, ("change", "fits", "GB", "GiB", "of the card", "what it is"), rows)
