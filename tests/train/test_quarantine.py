"""The ledger: every faulty row once, also after a kill; the cap; strict."""

import pytest

from vistune.samples import Fault
from vistune.train.guarding.quarantine import Ledger


def fault(row):
    return Fault(
        source="a.json", row=row, id=f"id{row}", code="image_missing", reason="no such file", path=f"{row}.jpg"
    )


def test_each_row_once_and_read_back(tmp_path):
    ledger = Ledger(tmp_path, samples=100, cap=0.001, strict=False)
    ledger.add([fault(1), fault(2)])
    ledger.add([fault(2)])
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write('{"source": "a.js')  # a kill in the middle of a line
    again = Ledger(tmp_path, samples=100, cap=0.001, strict=False)
    again.add([fault(1), fault(3)])
    assert [f.row for f in again.faults.values()] == [1, 2, 3]
    assert len(Ledger(tmp_path, 100, 0.001, False).faults) == 3


def test_cap_is_ten_or_a_share(tmp_path):
    ledger = Ledger(tmp_path, samples=100, cap=0.001, strict=False)
    ledger.add([fault(i) for i in range(10)])
    with pytest.raises(
        ValueError, match=r"11 rows are faulty.*10.*a\.json:0 \(id id0\): image_missing.*quarantine\.jsonl"
    ):
        ledger.add([fault(10)])
    assert Ledger(tmp_path / "other", samples=50_000, cap=0.001, strict=False).limit == 50


def test_strict_stops_at_the_first(tmp_path):
    with pytest.raises(ValueError, match=r"data\.strict.*a\.json:4"):
        Ledger(tmp_path, samples=10**6, cap=0.5, strict=True).add([fault(4)])
