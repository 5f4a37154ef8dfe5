"""Evidence side by side: every figure against the first arm of the same run."""

from stretto.bench.compare import accuracy, compare
from stretto.bench.measure import Arm
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
