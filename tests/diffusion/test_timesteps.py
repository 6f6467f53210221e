"""Strategies as users choose them: presets, overrides and mistakes; and their draws against their tables."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from speedit_jax.diffusion.schedules import make_schedule
from speedit_jax.diffusion.timesteps import PRESETS, SAMPLINGS, WEIGHTINGS, TableStrategy, make_strategy
from speedit_jax.errors import UserError

MANY = 10**12  # an even batch so large that half of it is duals to twelve digits

LINEAR = make_schedule("linear", 1000)
COSINE = make_schedule("squaredcos_cap_v2", 1000)


@pytest.mark.parametrize(
    "key, value",
    [
        ("gamma", 0),
        ("gamma", np.inf),
        ("sigma_data", 0),
        *((f"{name}_std", 0) for name in ("log_sigma", "logit", "clts")),
        *((f"{name}_mean", np.nan) for name in ("log_sigma", "logit", "clts", "laplace")),
        ("clts_steps", 0),
        ("laplace_scale", 0),
        ("probe_every", 0),
    ],
)
def test_numbers_out_of_range(key, value):
    with pytest.raises(UserError, match=f"timesteps.{key}={value}"):
        make_strategy(LINEAR, "uniform", **{key: value})


UNFIXED = ("clts", "loss_second_moment", "gradient_noise")  # densities that are not one table


def parts(strategy):
    tables = [getattr(strategy, name).tobytes() for name in ("density", "first", "last") if hasattr(strategy, name)]
    sampling = (type(strategy).__name__, *tables)
    return {"sampling": sampling, "weighting": strategy.weights.tobytes(), "dual": getattr(strategy, "pivot", None)}


@pytest.mark.parametrize("strategy", PRESETS)
def test_presets_are_their_three_parts(strategy):
    sampling, weighting, dual = PRESETS[strategy]
    preset = make_strategy(LINEAR, strategy)
    spelled_out = make_strategy(LINEAR, "uniform", sampling=sampling, weighting=weighting, dual=dual)
    assert parts(preset) == parts(spelled_out)
    assert parts(preset) == parts(make_strategy(LINEAR, strategy, sampling=None, weighting=None, dual=None))


@pytest.mark.parametrize("strategy", PRESETS)
@pytest.mark.parametrize(
    "part, value",
    [("sampling", v) for v in SAMPLINGS] + [("weighting", v) for v in WEIGHTINGS] + [("dual", v) for v in (False, True)],
)
def test_an_override_changes_only_its_part(strategy, part, value):
    before, chosen = make_strategy(LINEAR, strategy), dict(zip(("sampling", "weighting", "dual"), PRESETS[strategy], strict=True))
    chosen[part] = value
    if chosen["sampling"] in UNFIXED and chosen["dual"]:
        with pytest.raises(UserError, match=f"timesteps.dual .* timesteps.sampling={chosen['sampling']} has none"):
            make_strategy(LINEAR, strategy, **{part: value})
        return
    after = make_strategy(LINEAR, strategy, **{part: value})
    same = value == PRESETS[strategy][["sampling", "weighting", "dual"].index(part)]
    changed = {key for key in parts(before) if parts(before)[key] != parts(after)[key]}
    # The asymmetric density brings the pivot of its own boundary along.
    allowed = {"sampling", "dual"} if part == "sampling" and chosen["dual"] and value == "speed" else {part}
    assert changed == (set() if same else allowed)
    assert (before.name == after.name) == same
    assert same or f"{part}={value}" in after.name


def test_pivots():
    assert make_strategy(LINEAR, "uniform", dual=True).pivot == 642
    assert make_strategy(LINEAR, "speed_cvpr25", dual=True).pivot == 700
    assert make_strategy(LINEAR, "speed_cvpr25", dual=True, tau=500).pivot == 500
    # About its own boundary the pairing keeps the suppression.
    m = make_strategy(COSINE, "speed_cvpr25", dual=True).marginal(MANY)
    np.testing.assert_allclose(m[701:].sum(), 0.0789 / 2, atol=2e-4)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"strategy": "speedy"}, r"timesteps\.strategy 'speedy'.*uniform, p2, speedit, speed_cvpr25"),
        ({"sampling": "p2"}, r"timesteps\.sampling 'p2'.*uniform, speedit, speed"),
        ({"weighting": "speed"}, r"timesteps\.weighting 'speed'.*none, p2, change_aware"),
        ({"k": 0.5}, r"timesteps\.k=0\.5"),
        ({"k": float("inf")}, r"timesteps\.k=inf"),
        ({"k": float("nan")}, r"timesteps\.k=nan"),
        ({"tau": 0}, r"timesteps\.tau=0"),
        ({"tau": 1000}, r"timesteps\.tau=1000"),
        ({"tau": 0.7}, r"timesteps\.tau=0\.7: .*thousandths"),
        ({"tau": 999.9}, r"timesteps\.tau=999\.9 is step 1000 of 1000"),
        ({"lam": 0.4}, r"timesteps\.lam=0\.4"),
        ({"lam": 1.1}, r"timesteps\.lam=1\.1"),
    ],
)
def test_user_errors_name_the_key(keys, message):
    with pytest.raises(UserError, match=message):
        make_strategy(LINEAR, **({"strategy": "speed_cvpr25"} | keys))


PAIRED = [("speedit", {}), ("uniform", {"dual": True}), ("speed_cvpr25", {"dual": True})]
INDEPENDENT = [("uniform", {}), ("p2", {}), ("speed_cvpr25", {})]


@pytest.mark.parametrize(
    "n, strategy, keys",
    [(n, "speedit", {}) for n in (1, 2, 3, 7)] + [(256, *s) for s in PAIRED + INDEPENDENT + [("laplace", {})]],
)
def test_structure_of_a_draw(n, strategy, keys):
    strategy = make_strategy(LINEAR, strategy, **keys)
    state = strategy.init()
    t, weight, importance = jax.jit(strategy.sample, static_argnums=1)(jax.random.key(3), n, 7, state)
    assert t.shape == weight.shape == (n,)
    assert jnp.issubdtype(t.dtype, jnp.integer)
    assert weight.dtype == importance.dtype == jnp.float32
    np.testing.assert_array_equal(importance, 1)
    assert ((t >= 0) & (t < 1000)).all()
    np.testing.assert_array_equal(weight, strategy.weights.astype(np.float32)[t])
    if strategy.pivot is not None:
        drawn = n // 2 + 1
        np.testing.assert_array_equal(t[drawn:], strategy.dual[t[: n - drawn]])
    assert strategy.update(state, t, weight) == state == ()


def test_draws_depend_on_the_key_alone():
    strategy = make_strategy(LINEAR, "speedit")
    draw = lambda seed, step: np.asarray(strategy.sample(jax.random.key(seed), 64, step, ())[0])  # noqa: E731
    np.testing.assert_array_equal(draw(0, 0), draw(0, 5))
    assert (draw(0, 0) != draw(1, 0)).any()


@pytest.mark.parametrize("n, strategy, keys", [(256, *s) for s in PAIRED + INDEPENDENT] + [(7, *s) for s in PAIRED])
def test_drawn_frequencies_are_the_marginal(n, strategy, keys):
    """z-scores of all 1,000 counts over about 1.5 million draws.

    Bounds: were all normal, one beyond 5.5 has a chance of 1000 x 4e-8; the mean of z^2 is 1 with a standard deviation of
    sqrt(2 / 1000), or sqrt(4 / 1000) where the counts of t and dual(t) go together; 5 of the latter are 0.32.
    """
    strategy = make_strategy(LINEAR, strategy, **keys)
    batches = 1_500_000 // n
    sample = jax.jit(jax.vmap(lambda key: strategy.sample(key, n, 0, ())[0]))
    counts = np.bincount(np.asarray(sample(jax.random.split(jax.random.key(11), batches))).ravel(), minlength=1000)
    expected = batches * n * strategy.marginal(n)
    variance = expected.copy()
    if strategy.pivot is not None and strategy.pivot % 2 == 0:
        # The step that is its own dual is counted in twos.
        fixed = strategy.pivot // 2
        assert strategy.dual[fixed] == fixed
        variance[fixed] += 2 * batches * (n - n // 2 - 1) * strategy.density[fixed]
    z = (counts - expected) / np.sqrt(variance)
    assert np.abs(z).max() < 5.5
    assert abs(np.mean(z**2) - 1) < 0.32


def test_the_draw_is_the_same_on_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    strategy, key = make_strategy(LINEAR, "speedit"), jax.random.key(0)
    draw = lambda key: strategy.sample(key, 64, 0, ())  # noqa: E731
    alone = jax.jit(draw)(key)
    sharded = jax.jit(draw, out_shardings=NamedSharding(mesh, PartitionSpec("data")))(key)
    assert len(sharded[0].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, sharded, alone)


def test_the_log_line_says_what_is_drawn():
    line = make_strategy(LINEAR, "speedit").describe(MANY)
    assert line == (
        "speedit: T=1000, E[t]=338.9, E[weight]=0.5815, density max/min=11, dual draw about 642, 5.1% of draws at t >= 642"
    )
    assert "dual" not in make_strategy(LINEAR, "uniform").describe(256)


def test_a_density_may_be_zero_somewhere():
    with warnings.catch_warnings(action="error"):
        assert "density max/min=inf" in make_strategy(LINEAR, "laplace", laplace_scale=0.01).describe(256)


def test_a_strategy_is_its_tables():
    strategy = TableStrategy("two", np.array([0.0, 1.0]), np.array([3.0, 4.0]))
    t, weight, _ = strategy.sample(jax.random.key(0), 5, 0, ())
    np.testing.assert_array_equal(t, 1)
    np.testing.assert_array_equal(weight, 4)
    np.testing.assert_array_equal(strategy.marginal(5), strategy.density)
