"""The order of steps with a known image: time travel and its noise, strength, and which latents are known."""

import numpy as np
import pytest

from speedit_jax.diffusion.flow import PATHS
from speedit_jax.diffusion.inverse import Plan, latent_mask, travel_times
from speedit_jax.diffusion.schedules import make_schedule
from speedit_jax.errors import UserError

LINEAR = make_schedule("linear", 1000)
LEVELS = np.linspace(0, 1, 21)[:-1][::-1]
SCHEDULES = {
    "diffusion": (np.sqrt(LINEAR.alphas_cumprod[::50]), LINEAR.sigmas[::50]),
    "linear flow": (LEVELS, 1 - LEVELS),
    "gvp flow": PATHS["gvp"](LEVELS, np)[:2],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_jump_has_the_law_of_its_steps(name):
    """x_t is N(alpha_t x_0, sigma_t^2) before and after it, and two jumps are one."""
    alpha, sigma = SCHEDULES[name]
    jumps = {j: Plan(resample=2, jump=j).rows(alpha, sigma) for j in (1, 2, 4, 8)}
    for j, rows in jumps.items():
        at = rows["travelled"]
        assert at.sum() == len(range(0, 20 - j, j))
        before = rows["level"][at] - j
        np.testing.assert_allclose(rows["u"][at] * alpha[before], rows["alpha"][at], atol=1e-12)
        np.testing.assert_allclose(
            rows["u"][at] ** 2 * sigma[before] ** 2 + rows["w"][at] ** 2, rows["sigma"][at] ** 2, atol=1e-12
        )
        np.testing.assert_array_equal([rows["u"][~at], rows["w"][~at]], [np.ones((~at).sum()), np.zeros((~at).sum())])
    single = jumps[1]
    step = {level: (u, w) for level, u, w, at in zip(*(single[k] for k in ("level", "u", "w", "travelled")), strict=True) if at}
    for j in (2, 4, 8):
        rows = jumps[j]
        for level, u, w in zip(*(rows[k][rows["travelled"]] for k in ("level", "u", "w")), strict=True):
            signal, noise = 1.0, 0.0
            for t in range(level - j + 1, level + 1):
                signal, noise = step[t][0] * signal, step[t][0] ** 2 * noise + step[t][1] ** 2
            np.testing.assert_allclose([u, w**2], [signal, noise], atol=1e-12)


def test_repaints_times_are_the_published_ones():
    times = travel_times(250, 10, 10)
    assert len(times) == 4571
    assert times[:21] == [*range(249, 229, -1), 231] and times[-2:] == [0, -1]
    steps = np.diff(times)
    assert set(steps) == {1, -1} and (steps == -1).sum() == 2410
    rows = Plan("repaint", resample=10).rows(np.sqrt(LINEAR.alphas_cumprod[::4]), LINEAR.sigmas[::4])
    assert len(rows["level"]) == 2410 and rows["travelled"].sum() == 216
    assert sorted(rows["number"]) == list(range(2410)), "no two steps share a noise"


def test_without_resampling_it_goes_straight_down():
    assert travel_times(250, 10, 1) == list(range(249, -2, -1))
    rows = Plan(strength=0.3).rows(np.linspace(1, 0, 50), np.linspace(0, 1, 50))
    assert rows["level"].tolist() == rows["number"].tolist() == list(range(15))[::-1]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Plan("magic"), "magic.*repaint"),
        (lambda: Plan(strength=0.0), "strength=0.0"),
        (lambda: Plan(strength=1.2), "strength=1.2"),
        (lambda: Plan(resample=0), "resample=0"),
        (lambda: Plan(jump=0), "jump=0"),
        (lambda: Plan(resample=2).rows(np.ones(10), np.ones(10)), "jump=10.*less than the 10"),
        (lambda: Plan(resample=2, strength=0.1).rows(np.ones(90), np.ones(90)), "jump=10.*less than the 9"),
    ],
)
def test_mistakes(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_latents_next_to_a_hole_are_not_known():
    mask = np.ones((2, 40, 24, 1), bool)
    mask[0, 13, 9] = False  # in cell (1, 1) of 5 x 3 cells of 8 pixels
    mask[1, -1, -1] = False
    found = latent_mask(mask, (5, 3, 4))[..., 0]
    assert found.shape == (2, 5, 3)
    assert not found[0, :3].any() and found[0, 3:].all()
    assert np.argwhere(~found[1]).tolist() == [[3, 1], [3, 2], [4, 1], [4, 2]]
    assert latent_mask(np.ones((1, 8, 8, 1), bool), (8, 8, 1)).all()
