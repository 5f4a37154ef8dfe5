"""Single calls of orchestrations with right inputs: asked as the topologies ask, answered as the task is solved."""

import pytest

from stretto import LLM
from stretto.threads.measure_calls import calls, right_calls
from stretto.training.agent_data import cases
from stretto.zoo.pages.orchestra import KINDS, claims


@pytest.mark.parametrize("kind", KINDS)
def test_right_answers_state_the_values_of_the_task(kind):
    for case in cases("test", kind, 3, 5):
        found = list(calls(case))
        parts = [*case.subs, *([case.merge] if case.merge else [])]
        before = [c for c in found if c[1] == "all before"]
        assert len(before) == len(parts) == len([c for c in found if c[1] == "direct"])
        for part, (_, _, text, answer) in zip(parts, before, strict=True):
            assert claims(answer)[part.id] == case.values[part.id], "told everything before, the task's own value"
            assert text.splitlines()[-1].strip() == f"{part.id}: {part.text}"
        whole = next(c for c in found if c[1] == "one call")
        assert {i: claims(whole[3])[i] for i in case.values} == case.values
        assert ("plan" in {c[0] for c in found}) == (kind == "dense")


def test_shares_of_the_trained_model():
    found = right_calls(LLM("zoo:tiny-agents", max_num_seqs=64), 2, 5)
    assert set(found) == set(KINDS) and all(0 <= x <= 1 for rows in found.values() for x in rows.values())
    assert found["deep"]["plus, direct"] >= 0.8 and found["wide"]["steps, direct"] >= 0.8
