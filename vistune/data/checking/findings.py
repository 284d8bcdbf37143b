"""What a check of data can find, each with a code, and the report that a check ends in. Looks at no data itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vistune import console
from vistune.samples import Fault, FaultCode

Severity = Literal["error", "warning"]

WHAT: dict[str, tuple[Severity, str]] = {
    # A run sets a row with an error aside. The first eleven are the run's own codes (`samples.FaultCode`).
    "row_unreadable": ("error", "no JSON, no object, a key missing or of the wrong type"),
    "role_order": ("error", "turns do not alternate, or a role is unknown"),
    "empty_answer": ("error", "an answer without text"),
    "image_missing": ("error", "the file is not there, nor under another extension"),
    "image_broken": ("error", "empty, no file, or not to be decoded"),
    "image_without_mark": ("error", "more pictures than <image>"),
    "mark_without_image": ("error", "more <image> than pictures"),
    "mark_in_answer": ("error", "<image> in an answer"),
    "nothing_supervised": ("error", "no token of it would be learned"),
    "image_does_not_fit": ("error", "its pictures need more tokens than a sample has room for"),
    "template": ("error", "the conversation does not fit the template"),
    "image_extension": ("error", "the file is there under another extension"),
    "image_truncated": ("error", "the picture's bytes end too early"),
    "image_bomb": ("error", "more pixels than any picture has"),
    "source_unreadable": ("error", "a container of rows cannot be read: a run stops there"),
    "not_held": ("error", "the format of the copy cannot hold it"),
    "image_slow": ("warning", "its decoding took longer than the time limit and was given up"),
    "image_format": ("warning", "its content is of another format than its name says"),
    "image_aspect": ("warning", "more than 200 times as long as wide, or as wide as long"),
    "id_missing": ("warning", "no id: it is called by its number"),
    "id_duplicate": ("warning", "an earlier row of the source has this id"),
    "row_duplicate": ("warning", "an earlier row has the same messages and pictures"),
    "shortened": ("warning", "longer than a sample may be: it loses rounds from its end, or the end of an answer"),
    "round_trip": ("warning", "decoding its tokens does not give its text back"),
    "row_count": ("warning", "the source has another number of rows than it should"),
}
assert set(get_args(FaultCode)) <= set(WHAT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of `findings.jsonl`. `row` is -1 for what is said of a whole source. `found` is the file to use."""

    source: str
    row: int
    id: str
    code: str
    severity: Severity
    message: str
    path: str = ""
    found: str = ""
    number: int = 0  # of the source, since two may have one name


def finding(source: str, number: int, row: int, id: str, code: str, message: str, path: str = "") -> Finding:
    return Finding(
        source=source, number=number, row=row, id=id, code=code, severity=WHAT[code][0], message=message, path=path
    )


def of_fault(fault: Fault, number: int) -> Finding:
    return finding(fault.source, number, fault.row, fault.id, fault.code, fault.reason, fault.path)


def as_line(found: Finding) -> str:
    """JSON in ASCII, so that whatever bytes a row holds can be written down."""
    return json.dumps(asdict(found)) + "\n"


@dataclass(frozen=True)
class Report:
    """What a check ended in: `summary` (also in summary.json) beside findings.jsonl and index.html in `out`."""

    out: Path
    summary: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether a run on this data would go through: see `verdict` in the summary for why not."""
        return bool(self.summary["ok"])

    def as_dict(self) -> dict[str, Any]:
        return self.summary

    def findings(self) -> Iterator[Finding]:
        """All of them, by source and row, read from disk one at a time."""
        with open(self.out / "findings.jsonl", encoding="utf-8") as lines:
            for line in lines:
                yield Finding(**json.loads(line))

    def show(self) -> None:
        """Tables for the terminal."""
        sources = self.summary["sources"]
        console.table("rows", ROWS, [_rows(one) for one in sources])
        if self.summary["lengths"]:
            console.table("tokens", TOKENS, [_tokens(one) for one in sources if one["tokens"]])
        if codes := self.summary["codes"]:
            rows = [(name, code["severity"], f"{code['findings']:,}", code["what"]) for name, code in codes.items()]
            console.table("findings", ("code", "severity", "how many", "what"), rows)
        if lengths := self.summary["lengths"]:
            title = f"tokens a sample, as the rows are; a sample has room for {lengths['room']:,}"
            shares = [(name, f"{value:,}") for name, value in lengths["percentiles"].items()]
            console.table(title, ("percentile", "tokens"), shares)
        console.say(self.summary["verdict"])
        console.say(f"page: {self.out / 'index.html'}   all of them: {self.out / 'findings.jsonl'}")


ROWS = ("source", "rows", "usable", "set aside", "shortened", "pictures")
TOKENS = ("source", "median", "p95", "max", "supervised")


def _rows(one: dict[str, Any]) -> tuple[str, ...]:
    rows = f"{one['rows']:,}" + (f" of {one['expect']:,}" if one["expect"] else "")
    return one["name"], rows, *(f"{one[key]:,}" for key in ("usable", "set_aside", "shortened", "pictures"))


def _tokens(one: dict[str, Any]) -> tuple[str, ...]:
    shares = (f"{one['tokens'][key]:,}" for key in ("median", "p95", "max"))
    return one["name"], *shares, f"{one['supervised_share']:.1%}"
