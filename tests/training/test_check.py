"""Numbers of a config are finite and in range."""

import math

import pytest
import tiny

from speedit_jax.config import complete, flatten, get_config
from speedit_jax.errors import UserError
from speedit_jax.training.check import check_backbone, check_numbers

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


@pytest.mark.parametrize("eps", [-1e-8, 0.0, 1e-60])
def test_adam_divides_by_a_positive_number(eps):
    """The first gradient of most weights is 0, because the last layer begins at zero: their update would be 0 / 0."""
    with pytest.raises(UserError, match=f"optim.eps={eps}: must be positive"):
        check_numbers(tiny.make_config(optim__eps=eps))
    check_numbers(tiny.make_config(optim__eps=1e-30))


@pytest.mark.parametrize("path", ["vp", "linear"])
def test_a_variance_that_is_misspelt(path):
    with pytest.raises(UserError, match=r"unknown diffusion.variance 'learned-range'; choose one of learned_range"):
        check_numbers(tiny.make_config(diffusion__path=path, diffusion__variance="learned-range"))


def test_a_trace_of_no_step():
    for at in (0, 49):
        check_numbers(tiny.make_config(training__num_steps=50, training__profile_at=at))
    with pytest.raises(UserError, match=r"training.profile_at=50: must be below training.num_steps=50"):
        check_numbers(tiny.make_config(training__num_steps=50, training__profile_at=50))


OF_ONE = {"DiT": {"mlp_ratio": 2.0, "qk_norm": True}, "DiG": {"gla": "xla", "directions": 2, "convolution": "none"}}


@pytest.mark.parametrize(("backbone", "key"), [(backbone, key) for backbone, keys in OF_ONE.items() for key in keys])
def test_a_key_of_the_other_backbone(backbone, key):
    value = OF_ONE[backbone][key]
    with_key = {name: tiny.make_config(**{"model.name": f"{name}-tiny/2", f"model.{key}": value}) for name in OF_ONE}
    check_backbone(with_key.pop(backbone).model)
    ((other, config),) = with_key.items()
    with pytest.raises(UserError, match=f"model.{key}={value} is for {backbone}, and {other}-tiny/2 does not look at it"):
        check_backbone(config.model)


def test_a_run_with_a_key_of_the_other_backbone_goes_on_without_it():
    """Earlier versions took them."""
    for backbone, keys in OF_ONE.items():
        (other,) = OF_ONE.keys() - {backbone}
        read = complete({"model": {"name": f"{other}-S/2", **keys}}).model
        assert all(read[key] == get_config().model[key] for key in keys)
        kept = complete({"model": {"name": f"{backbone}-S/2", **keys}}).model
        assert {key: kept[key] for key in keys} == keys


def test_the_defaults_pass():
    check_backbone(get_config().model)
    check_numbers(get_config())
