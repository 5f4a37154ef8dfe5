"""Evidence side by side: every figure against the first arm of the same run."""

import pytest

from stretto.bench.compare import accuracy, compare
from stretto.bench.measure import Arm
from stretto.bench.replay import replay
from stretto.llm import LLM


def test_rows_say_what_the_runs_did():
    llm = LLM("zoo:tiny", deterministic=True)
    arms = [Arm(llm, "zoo:tiny", "ar"), Arm(llm, "zoo:tiny", "suffix"), Arm(llm, "zoo:tiny", "ar", {}, "twin")]
    rows = compare(arms, tasks=["list_copy", "text_notice"], each=1, rounds=2, warm=1)
    assert {f for _, f in rows} == {"lists", "text", "all"} and {a for a, _ in rows} == {"ar", "suffix", "twin"}
    for (label, family), row in rows.items():
        assert (row.arm, row.family, row.n) == (label, family, 4 if family == "all" else 2)
        assert row.low <= row.speedup <= row.high and row.equal == 1.0 and 0 <= row.right <= 1
        assert row.rows >= 1.0 and row.per_forward >= 1.0
    assert rows["ar", "all"].speedup == 1.0 and rows["twin", "all"].per_forward == 1.0
    assert rows["suffix", "all"].plain()["arm"] == "suffix"


def test_accuracy_is_by_task():
    found = accuracy(LLM("zoo:tiny"), n=2)
    assert len(found) > 10 and all(0 <= v <= 1 for v in found.values())
    assert abs(found["all"] - sum(v for k, v in found.items() if k != "all") / (len(found) - 1)) < 1e-9


def test_lines_over_time_are_one_well_formed_picture():
    from xml.dom import minidom

    from stretto.bench.over_time import over_time

    lines = {"a <b>": [(1.0, 0.0), (2.0, 4.0)], "c": []}
    svg = minidom.parseString(over_time({"up": lines, "down": {"c": [(1.0, 1.0)]}}, title="t", x_label="x", marks={"m": 1.5}))
    points = [p.getAttribute("points").split() for p in svg.getElementsByTagName("polyline")]
    assert [len(p) for p in points] == [2, 0, 1]
    (_, low), (_, high) = (map(float, p.split(",")) for p in points[0])
    assert high < low  # larger is further up
    with pytest.raises(ValueError, match="no point"):
        over_time({"up": {}}, title="t", x_label="x")


def test_a_replay_times_every_kind_of_drafter():
    """The acceptance of a small model with the step of another shape; who was switched off has none."""
    kinds = ("draft", "specmemo", "hidden_transfer", "medusa", "suffix", "jacobi_forcing")
    found = [{"method": m, "model": "zoo:x", "tokens_per_forward": 3.0, "rows_per_forward": 6.0} for m in kinds]
    off = {"method": "eagle", "tokens_per_forward": 1.05, "rows_per_forward": 1.1}
    out = replay([*found, off, {"method": "mirror", "tokens_per_forward": 2.0}], ["tiny"], threads=1, steps=2)
    assert [r["method"] for r in out["rows"]] == list(kinds)
    assert [s["method"] for s in out["skipped"]] == ["eagle", "mirror"]
    for row in out["rows"]:
        assert row["rows"] == 6 and row["step_ms"] > 0
        assert row["speedup"] == pytest.approx(3 * row["plain_ms"] / row["step_ms"])
