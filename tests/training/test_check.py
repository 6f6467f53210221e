"""Numbers of a config are finite and in range."""

import math

import pytest
import tiny

from speedit_jax.config import flatten, get_config
from speedit_jax.errors import UserError
from speedit_jax.training.check import check_numbers

FLOATS = [key for key, value in flatten(get_config().to_dict()).items() if isinstance(value, float)]


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_number_is_finite(key, value):
    with pytest.raises(UserError, match=f"{key}={value}: must be a finite number"):
        check_numbers(tiny.make_config(**{key: value}))


def test_numbers_in_lists_are_finite():
    with pytest.raises(UserError, match=r"training.extra_ema_decays=nan: must be a finite number"):
        check_numbers(tiny.make_config(training__extra_ema_decays=(0.5, math.nan)))


@pytest.mark.parametrize("key", ["seed", "evaluation.seed"])
def test_seeds(key):
    for seed in (0, 2**32 - 1):
        check_numbers(tiny.make_config(**{key: seed}))
    for seed, bound in ((-1, "at least 0"), (2**32, "at most 4294967295"), (2**64, "at most 4294967295")):
        with pytest.raises(UserError, match=f"{key}={seed}: must be {bound}"):
            check_numbers(tiny.make_config(**{key: seed}))


@pytest.mark.parametrize("key", ["optim.warmup_steps", "training.num_steps", "regularizer.align_until", "timesteps.clts_steps"])
def test_steps_are_counted_in_32_bits(key):
    for value in (2**31 - 1, 0 if "until" in key else 1):
        check_numbers(tiny.make_config(**{key: value}))
    with pytest.raises(UserError, match=f"{key}=2147483648: must be at most 2147483647"):
        check_numbers(tiny.make_config(**{key: 2**31}))


def test_adam_divides_by_no_negative_number():
    with pytest.raises(UserError, match=r"optim.eps=-1e-08: must be at least 0"):
        check_numbers(tiny.make_config(optim__eps=-1e-8))


@pytest.mark.parametrize("path", ["vp", "linear"])
def test_a_variance_that_is_misspelt(path):
    with pytest.raises(UserError, match=r"unknown diffusion.variance 'learned-range'; choose one of learned_range"):
        check_numbers(tiny.make_config(diffusion__path=path, diffusion__variance="learned-range"))


def test_a_trace_of_no_step():
    for at in (0, 49):
        check_numbers(tiny.make_config(training__num_steps=50, training__profile_at=at))
    with pytest.raises(UserError, match=r"training.profile_at=50: must be below training.num_steps=50"):
        check_numbers(tiny.make_config(training__num_steps=50, training__profile_at=50))


def test_the_defaults_pass():
    check_numbers(get_config())
