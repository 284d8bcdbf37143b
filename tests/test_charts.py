"""Charts: axes end where people expect it, thinning keeps what is seen, the running mean has no edge effects."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vistune.pages import charts, words
from vistune.pages.charts import Line, chart


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
@settings(max_examples=200, deadline=None)
def test_a_linear_axis_holds_its_values_and_has_few_ticks(low: float, wide: float) -> None:
    high = low + wide
    axis = charts.linear(low, high)
    slack = 1e-6 * max(abs(low), abs(high), axis.high - axis.low)
    assert axis.low <= low + slack and axis.high >= high - slack
    places = [place for place, _ in axis.ticks]
    labels = [label for _, label in axis.ticks]
    assert len(set(labels)) == len(labels) or wide < 1e-6 * abs(low)
    assert 2 <= len(places) <= 8 and places == sorted(places)
    assert places[0] == pytest.approx(0, abs=0.01) and places[-1] == pytest.approx(100, abs=0.01)


def test_axes_that_people_would_draw() -> None:
    assert [label for _, label in charts.linear(0.0, 0.48).ticks] == ["0", "0.1", "0.2", "0.3", "0.4", "0.5"]
    assert [label for _, label in charts.linear(1, 189, 6, tight=True).ticks] == ["50", "100", "150"]
    assert [label for _, label in charts.linear(0, 12_000).ticks][-2:] == ["10k", "12.5k"]
    assert [label for _, label in charts.linear(3, 3).ticks]
    assert [label for _, label in charts.logarithmic(0.02, 5).ticks] == [
        "0.02",
        "0.05",
        "0.1",
        "0.2",
        "0.5",
        "1",
        "2",
        "5",
    ]
    assert len(charts.logarithmic(3.99, 4.01).ticks) > 2
    assert next(label for _, label in charts.logarithmic(1e-6, 1e3).ticks) in ("1e-6", "1e-5")


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=400), st.integers(2, 20))
@settings(max_examples=100, deadline=None)
def test_thinning_keeps_ends_extremes_and_gaps(values: list[float], buckets: int) -> None:
    y = np.array(values)
    kept = charts.thin(y, buckets)
    assert kept[0] == 0 and kept[-1] == len(y) - 1 and (np.diff(kept) > 0).all()
    assert len(kept) <= 3 * buckets + 2
    if np.isfinite(y).any():
        assert np.nanmin(y[kept]) == np.nanmin(y) and np.nanmax(y[kept]) == np.nanmax(y)
    assert np.isnan(y[kept]).any() == np.isnan(y).any()


def test_the_running_mean_is_a_mean() -> None:
    assert np.allclose(charts.smoothed(np.full(50, 3.0), 7), 3.0)
    slope = np.arange(100.0)
    assert np.allclose(charts.smoothed(slope, 9)[20:-20], slope[20:-20])
    broken = np.where(np.arange(60) % 10 == 0, np.nan, 2.0)
    assert np.allclose(charts.smoothed(broken, 5), 2.0)
    assert np.isnan(charts.smoothed(np.full(9, np.nan), 3)).all()


def test_a_line_is_interrupted_where_it_is_not_finite() -> None:
    made = chart("loss", [Line("loss", [1, 2, 3, 4], [1.0, math.nan, 3.0, 4.0])])
    assert made is not None and made.views[0].lines[0].strong.count("M") == 2 and len(made.breaks) == 1
    assert json.loads(made.data)[0]["y"] == [1.0, None, 3.0, 4.0]
    assert chart("nothing", [Line("loss", [1, 2], [math.nan, math.nan])]) is None


def test_zero_and_below_have_no_logarithm() -> None:
    made = chart("norm", [Line("norm", [1, 2, 3], [0.0, 1.0, 100.0])], log=True)
    assert made is not None and [view.kind for view in made.views] == ["linear", "log"]
    assert "nan" not in made.views[1].lines[0].strong and made.views[1].lines[0].strong.count("L") == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.48421, "0.4842"),
        (1510.73, "1,510.7"),
        (3e-5, "3e-5"),
        (0.00075, "0.00075"),
        (0.027912, "0.02791"),
        (85.9, "85.9"),
        (7, "7"),
        ("x", "x"),
    ],
)
def test_figures_as_people_write_them(value: object, said: str) -> None:
    assert words.figure(value) == said


def test_sizes_and_durations() -> None:
    assert words.size(0) == "0 B" and words.size(1536) == "1.5 KiB" and words.size(14e9) == "13.0 GiB"
    assert [words.duration(s) for s in (4.25, 65, 3600, 90_000)] == ["4.25 s", "1 min 5 s", "1 h", "1 d 1 h"]
