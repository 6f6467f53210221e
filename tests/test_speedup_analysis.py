"""From the comparison's raw numbers to speed-ups, against closed forms."""

import numpy as np
import pytest

from benchmarks.speedup.analysis import SHARES, Curve, first_reached, over_plain, speed_up

STEPS = np.arange(1, 17) * 250


def decaying(*rates):
    return Curve(STEPS, np.array([100 * np.exp(-rate * STEPS / 1000) for rate in rates]))


@pytest.mark.parametrize("share", SHARES)
def test_a_curve_that_falls_twice_as_fast_is_twice_as_fast(share):
    """Between two steps the distance is taken to fall exponentially, as these do: exact, whatever the grid of steps."""
    found = speed_up(decaying(1.0, 1.0), decaying(2.0, 2.0), share)
    assert found.reached
    np.testing.assert_allclose([found.ratio, found.low, found.high], 2, rtol=1e-9)
    np.testing.assert_allclose(speed_up(decaying(1.0), decaying(1.0), share).ratio, 1, rtol=1e-9)
    odd = speed_up(decaying(1.0), decaying(1.7), share)
    np.testing.assert_allclose(odd.ratio, 1.7, rtol=1e-9)


def test_a_strategy_like_the_baseline_gets_there_as_soon():
    """Whatever the rounding: some of these targets would be missed by the last digit."""
    for seed in range(15):
        distances = np.sort(np.random.default_rng(seed).uniform(1, 100, (2, len(STEPS))))[:, ::-1]
        for share in SHARES:
            found = speed_up(Curve(STEPS, distances), Curve(STEPS, distances.copy()), share)
            assert found.reached
            np.testing.assert_allclose([found.ratio, found.low, found.high], 1, rtol=1e-9)


def test_a_target_that_is_not_reached_is_a_bound():
    found = speed_up(decaying(1.0), decaying(0.4), 0.5)
    assert (found.ratio, found.reached) == (0.5, False)
    broken = Curve(STEPS, np.where(STEPS > 500, np.inf, 50.0)[None])
    assert not speed_up(decaying(1.0), broken, 1.0).reached


def test_the_first_time_counts():
    distances = np.array([8.0, 2.0, 4.0, 1.0])
    assert first_reached(np.array([1, 2, 3, 4]), distances, 4.0) == pytest.approx(1.5)
    assert first_reached(np.array([1, 2, 3, 4]), distances, 9.0) == 1
    assert first_reached(np.array([1, 2, 3, 4]), distances, 0.5) is None


def test_intervals_show_how_far_seeds_differ():
    found = speed_up(decaying(1.0, 1.0, 1.0), decaying(1.2, 2.0, 3.0), 1.0)
    assert 1.2 - 1e-9 <= found.low < found.ratio < found.high <= 3.0 + 1e-9
    with pytest.raises(ValueError, match="same seeds"):
        speed_up(decaying(1.0), decaying(1.0, 2.0), 1.0)


def test_a_method_is_compared_with_a_plain_run_of_as_many_flops():
    steps = np.array([1, 2, 4])
    plain, method = Curve(steps, np.array([[8.0, 4.0, 2.0]])), Curve(steps, np.array([[6.0, 3.0, 1.0]]))
    # Of half of its steps is the plain run in the first case, and the method in the third.
    for share, ratio in ((0.5, 1 / 4), (1.0, 1 / 2), (2.0, 3 / 2)):
        np.testing.assert_allclose(over_plain(plain, method, share), [ratio], rtol=1e-14)
    second = Curve(np.array([1]), np.array([[0.5]])), 1.0
    np.testing.assert_allclose(over_plain(plain, method, 0.25, second), [1 / 8], rtol=1e-14)
