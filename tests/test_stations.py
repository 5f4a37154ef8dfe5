"""The cluster simulator by hand, and the price of a barrier."""

import numpy as np
import pytest

from stretto.errors import InputError, OptionError
from stretto.planning.stations import Barrier, Meet, Station, Use, simulate
from stretto.threads.barrier import Cluster, intensity, run


def job(*steps):
    yield from steps


def test_a_queue_is_served_in_order_of_arrival():
    s = Station("s", 1)
    assert simulate([job(Use(s, 2.0)), job(Use(s, 3.0)), job(Use(s, 1.0))]) == 6.0
    assert s.busy == 6.0 and s.waited == 2.0 + 5.0
    two = Station("s", 2)
    assert simulate([job(Use(two, 2.0)), job(Use(two, 3.0)), job(Use(two, 1.0))]) == 3.0
    assert two.waited == 2.0 and two.free == 2


def test_stations_work_at_the_same_time():
    a, b = Station("a", 1), Station("b", 1)
    assert simulate([job(Use(a, 1.0), Use(b, 1.0)) for _ in range(4)]) == 5.0


def test_a_barrier_holds_all_until_the_last():
    a, gate = Station("a", 9), Barrier(3)
    jobs = [job(Use(a, x), Meet(gate), Use(a, y)) for x, y in ((1.0, 5.0), (4.0, 1.0), (2.0, 1.0))]
    assert simulate(jobs) == 9.0 and gate.waited == 3.0 + 0.0 + 2.0


def test_who_leaves_is_waited_for_no_longer():
    a, gate = Station("a", 9), Barrier(2)
    assert simulate([job(Use(a, 1.0), Meet(gate), Use(a, 1.0)), job(Use(a, 3.0), Meet(gate, leave=True))]) == 4.0
    with pytest.raises(InputError, match="wait for ever"):
        simulate([job(Meet(Barrier(2)))])
    with pytest.raises(OptionError):
        Station("s", 0)


def test_with_servers_for_all_in_step_is_the_sum_of_maxima_and_alone_the_maximum_of_sums():
    c = Cluster(k=8, turns=6, alpha=0.0, score=0.0, draft_slots=8, score_slots=8)
    rng = np.random.default_rng(3)
    lengths = c.draft * c.length * rng.lognormal(-c.sigma**2 / 2, c.sigma, (c.turns, c.k))
    assert run(c, in_step=True, seed=3).seconds == pytest.approx(lengths.max(1).sum())
    assert run(c, in_step=False, seed=3).seconds == pytest.approx(lengths.sum(0).max())


@pytest.mark.parametrize("seed", range(3))
def test_the_barrier_costs_with_heavy_tails_and_nothing_with_equal_lengths(seed):
    heavy = Cluster(draft_slots=16, score_slots=16, target_slots=16)
    step, alone = (run(heavy, in_step=s, seed=seed) for s in (True, False))
    assert step.seconds > 1.3 * alone.seconds and step.held > 0 == alone.held
    assert step.busy == pytest.approx(alone.busy)
    even = Cluster(sigma=0.0, alpha=0.0, draft_slots=16, score_slots=16)
    assert run(even, in_step=True, seed=seed).seconds == pytest.approx(run(even, in_step=False, seed=seed).seconds)


def test_waiting_lowers_the_intensity():
    assert intensity(8.0, 2.0, 3.0, 0.0) == 4.0 and intensity(8.0, 2.0, 3.0, 2.0) == 1.0
