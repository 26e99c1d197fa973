"""Charts: round ticks that cover the data, every mark told in words, nothing that could break out of the page."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from pipeline.scoring.charts import Bar, Mark, Series, curves, intervals, number, stacked, ticks

FIXTURES = Path(__file__).parents[1] / "fixtures"
finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(finite, finite)
def test_ticks_cover_their_range_evenly(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    found = ticks(low, high)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 12
    steps = [y - x for x, y in pairwise(found)]
    assert all(math.isclose(step, steps[0], rel_tol=1e-3, abs_tol=1e-9) for step in steps)


def test_numbers_are_short() -> None:
    assert [number(x) for x in (0.25, 3.0, 1200.0, 0.000001, 0.12345)] == ["0.25", "3", "1200", "1e-06", "0.123"]


def test_every_mark_is_in_its_place_and_told() -> None:
    marks = [Mark("first", 0.25, 0.2, 0.3, "sft"), Mark("second <b>", 0.75, 0.7, 1.4, "grpo")]
    svg = intervals(marks, 0.0, 1.0, lines=[(0.5, "coin")], title="F1 & more")
    root = ElementTree.fromstring(svg)
    circles = [float(c.attrib["cx"]) for c in root.iter("circle")]
    bars = [(float(b.attrib["x1"]), float(b.attrib["x2"])) for b in root.iter("line") if b.attrib["class"] == "bar"]
    reference = next(float(e.attrib["x1"]) for e in root.iter("line") if e.attrib["class"] == "reference")
    assert circles[0] < reference < circles[1]
    assert math.isclose(reference - circles[0], circles[1] - reference)
    assert all(left <= dot <= right for dot, (left, right) in zip(circles, bars, strict=True))
    assert bars[1][1] <= 510  # an interval beyond the axis ends at it
    assert "second &lt;b&gt;: 0.750 (0.700 … 1.400)" in svg


def test_a_curve_passes_through_its_points() -> None:
    svg = curves([Series("loss", ((0, 2.0), (50, 1.0), (100, 0.5)), "sft")], title="loss")
    path = next(p.attrib["d"] for p in ElementTree.fromstring(svg).iter("path"))
    points = [tuple(map(float, part[1:].split())) for part in path.replace(" L", "|L").split("|")]
    assert len(points) == 3
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[0][1] < points[1][1] < points[2][1]  # down the page, as the loss falls
    assert curves([Series("nothing", (), "sft")], title="nothing") == ""


def test_the_parts_of_a_bar_follow_each_other() -> None:
    bars = [Bar("sft <b>", (("start", 2.0), ("forward/backward", 6.0))), Bar("grpo", (("start", 4.0),))]
    svg = stacked(bars, ["forward/backward", "start"], title="time", unit="minutes")
    found = [rect.attrib for rect in ElementTree.fromstring(svg).iter("rect") if "rx" not in rect.attrib]
    (first, second, other) = ((float(one["x"]), float(one["width"])) for one in found)
    assert math.isclose(first[0] + first[1], second[0], abs_tol=0.11)
    assert math.isclose(second[1], 3 * first[1], rel_tol=0.01)
    assert other == (first[0], 2 * first[1])
    assert second[0] + second[1] < 510
    assert [one["class"] for one in found] == ["part-start", "part-forward-backward", "part-start"]
    assert "sft &lt;b&gt;, forward/backward: 6 minutes (75 %)" in svg
    legend = [rect.attrib["class"] for rect in ElementTree.fromstring(svg).iter("rect") if "rx" in rect.attrib]
    assert legend == ["part-forward-backward", "part-start"]
    ElementTree.fromstring(stacked([], [], title="nothing", unit="seconds"))


def test_a_chart_in_full() -> None:
    svg = intervals([Mark("tiny SFT", 0.7, 0.65, 0.75, "sft")], 0.0, 1.0, lines=[(0.5, "coin")], title="F1")
    assert svg + "\n" == (FIXTURES / "intervals.svg").read_text(encoding="utf-8")
