"""What may differ between a run and its continuation."""

import pytest
import tiny

from speedit_jax.config import flatten, get_config
from speedit_jax.data.sources import open_source
from speedit_jax.training import changes, run
from speedit_jax.training.changes import KEYS, Kind


def describe(latents=None, **settings):
    config = tiny.make_config(**settings)
    source = open_source(config.data)
    return run.describe(config, source, source.image_shape, latents)


def compare(new, old=None, older=(), started=True):
    return changes.compare(old or describe(), new, older, started)


def test_every_key_is_classified_once():
    """By itself or by its section, and no other is."""
    keys = flatten(get_config().to_dict())
    by_itself, sections = {key for key in keys if key in KEYS}, {key.partition(".")[0] for key in keys if key not in KEYS}
    assert by_itself | sections == set(KEYS)


# One value of another kind for each of the keys, but for those of whole sections.
OTHER = {
    "init_from": ("runs/a", Kind.FREE),
    "seed": (1, Kind.CHANGES),
    "data.flip": (True, Kind.CHANGES),
    "data.max_broken": (3, Kind.FREE),
    "data.threads": (1, Kind.FREE),
    "data.vae": ("moved", Kind.FREE),
    "data.split": ("test", Kind.FREE),
    "model.name": ("DiT-S/2", Kind.FORM),
    "model.width": (64, Kind.FORM),
    "model.depth": (3, Kind.FORM),
    "model.heads": (2, Kind.FORM),
    "model.mlp_ratio": (2.0, Kind.FORM),
    "model.time_freq_shift": (1, Kind.CHANGES),
    "model.label_dropout": (0.2, Kind.CHANGES),
    "model.qk_norm": (True, Kind.FORM),
    "model.rope": (True, Kind.CHANGES),
    "model.mlp": ("swiglu", Kind.FORM),
    "model.patch_bottleneck": (4, Kind.FORM),
    "model.attention": ("chunked", Kind.ROUNDING),
    "model.gla": ("reference", Kind.ROUNDING),
    "model.directions": (2, Kind.FORM),
    "model.convolution": ("random", Kind.FREE),
    "model.norm": ("rms", Kind.FORM),
    "model.remat": ("lean", Kind.ROUNDING),
    "model.scan_unroll": (2, Kind.ROUNDING),
    "model.dtype": ("bfloat16", Kind.CHANGES),
    "diffusion.schedule": ("cosine", Kind.CHANGES),
    "diffusion.prediction": ("v", Kind.CHANGES),
    "tokens.method": ("route", Kind.CHANGES),
    "regularizer.dispersive": (0.5, Kind.CHANGES),
    "regularizer.align": (0.5, Kind.FORM),
    "regularizer.align_depth": (1, Kind.CHANGES),
    "regularizer.align_target": ("features", Kind.CHANGES),
    "regularizer.align_head": ("conv", Kind.CHANGES),
    "regularizer.align_until": (9, Kind.CHANGES),
    "timesteps.strategy": ("uniform", Kind.CHANGES),
    "timesteps.sampling": ("uniform", Kind.CHANGES),
    "optim.learning_rate": (1.0, Kind.CHANGES),
    "optim.clip_norm": (0.5, Kind.CHANGES),
    "training.num_steps": (1000, Kind.FREE),
    "training.batch_size": (32, Kind.CHANGES),
    "training.accumulation": (2, Kind.ROUNDING),
    "training.ema_decay": (0.5, Kind.CHANGES),
    "training.extra_ema_decays": ((0.5,), Kind.FORM),
    "training.ema_warmup": (True, Kind.CHANGES),
    "training.log_every": (1, Kind.FREE),
    "training.sample_every": (1, Kind.FREE),
    "training.profile_at": (1, Kind.FREE),
    "training.profile_steps": (1, Kind.FREE),
    "training.wandb_project": ("x", Kind.FREE),
    "training.max_skipped_in_a_row": (1, Kind.FREE),
    "checkpoint.every": (1, Kind.FREE),
    "sampling.guidance_scale": (3.0, Kind.FREE),
    "evaluation.every": (5, Kind.FREE),
    "mesh.fsdp": (2, Kind.ROUNDING),
}


@pytest.mark.parametrize("key", OTHER)
def test_a_key_alone(key):
    value, kind = OTHER[key]
    new = describe()
    config = get_config()
    config.update_from_flattened_dict(flatten(new["config"]) | {key: value})
    new["config"] = config.to_dict()
    found = compare(new)
    where = {Kind.ROUNDING: found.rounding, Kind.CHANGES: found.changes, Kind.FORM: found.misfits}
    assert {kind: list(names) for kind, names in where.items() if names} == ({kind: [key]} if kind is not Kind.FREE else {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model__label_dropout", 0.0),
        ("optim__clip_norm", 0.0),
        ("diffusion__variance", "fixed_small"),
        ("model__convolution", "none"),
    ],
)
def test_a_value_that_gives_arrays_another_form(key, value):
    """The tree of the state says the same, where the key is of the model at hand."""
    found = compare(describe(**{key: value}))
    assert list(found.misfits) == [key.replace("__", ".")] and not found.changes
    name = "DiG-tiny/2" if "convolution" in key else "DiT-tiny/2"
    before, after = (tiny.make_trainer(model__name=name, **of).shapes for of in ({}, {key: value}))
    assert str(before) != str(after)


def test_the_fusion_of_sprint_is_another_form():
    for methods in (("none", "sprint"), ("sprint", "route")):
        old, new = (describe(tokens__method=method) for method in methods)
        assert list(compare(new, old).misfits) == ["tokens.method"]
    old, new = (describe(tokens__method="sprint", tokens__rate=rate) for rate in (0.75, 0.0))
    assert list(compare(new, old).changes) == ["tokens.rate"]


@pytest.mark.parametrize(("key", "value"), [("align_target", "features"), ("align_head", "conv")])
def test_the_head_is_of_another_form_where_there_is_one(key, value):
    old, new = (describe(regularizer__align=0.5, **{f"regularizer__{key}": of}) for of in (get_config().regularizer[key], value))
    assert list(compare(new, old).misfits) == [f"regularizer.{key}"]


def test_masked_training_has_arrays_of_its_own():
    assert list(compare(describe(tokens__method="mask")).misfits) == ["tokens.method"]


@pytest.mark.parametrize(
    ("old", "new", "misfits"),
    [
        ({"strategy": "uniform"}, {"strategy": "gradient_noise"}, ["timesteps.strategy"]),
        ({"strategy": "uniform"}, {"strategy": "uniform", "sampling": "loss_second_moment"}, ["timesteps.sampling"]),
        ({"strategy": "loss_second_moment"}, {"strategy": "speedit"}, ["timesteps.strategy"]),
        ({"strategy": "loss_second_moment"}, {"strategy": "loss_second_moment", "num_steps": 500}, ["diffusion.num_steps"]),
        ({"strategy": "gradient_noise"}, {"strategy": "gradient_noise", "num_steps": 500}, []),
        ({"strategy": "gradient_noise"}, {"strategy": "uniform", "sampling": "gradient_noise"}, []),
    ],
)
def test_a_density_that_is_measured_is_part_of_the_state(old, new, misfits):
    """The tree of the state says the same."""
    named = {"num_steps": "diffusion__num_steps", "strategy": "timesteps__strategy", "sampling": "timesteps__sampling"}
    old, new = ({named[name]: value for name, value in of.items()} for of in (old, new))
    found = compare(describe(**new), describe(**old))
    assert list(found.misfits) == misfits and bool(found.changes) != bool(misfits)
    before, after = (str(tiny.make_trainer(**of).shapes) for of in (old, new))
    assert (before != after) == bool(misfits)


def test_what_keeps_the_form_of_the_state():
    """What may change on the word fits the state: its arrays, and their nesting, which orbax compares too."""
    state = tiny.make_trainer().shapes
    for settings in (
        {"optim__schedule": "cosine", "optim__warmup_steps": 5},
        {"optim__weight_decay": 0.1},
        {"optim__weight_decay": 0.1, "optim__decay_mask": "all"},
        {"optim__clip_norm": 1e9},
        {"diffusion__num_steps": 500, "diffusion__prediction": "v"},
        {"timesteps__strategy": "uniform"},
        {"training__batch_size": 32, "training__ema_warmup": True},
        {"model__label_dropout": 0.5, "model__dtype": "bfloat16", "model__time_freq_shift": 1},
    ):
        assert tiny.make_trainer(**settings).shapes == state, settings


def test_where_the_data_are_does_not_matter():
    moved = describe()
    moved["config"]["data"]["source"] = "folder:/elsewhere/"
    assert not compare(moved).changes
    others = moved | {"data_fingerprint": "0" * 16}
    assert list(compare(others).changes) == ["data.source", "data"]
    said = changes.spelled(compare(others).changes)
    assert said == "data.source was 'synthetic', now 'folder:/elsewhere/'; the data has changed"


def test_an_older_fingerprint_is_the_same_data():
    old = describe() | {"data_fingerprint": "a"}
    assert not compare(describe(), old, older=("b", "a")).changes
    assert list(compare(describe(), old, older=("b",)).changes) == ["data"]


def test_classes():
    renamed = describe() | {"class_names": [f"class {i}" for i in range(9)] + ["new"]}
    found = compare(renamed)
    assert changes.spelled(found.changes) == "1 classes have other names ('new' was 'class 9')"
    found = compare(describe(data__synthetic_classes=3))
    assert found.misfits == {"classes": [10, 3]}


def test_another_image_size():
    found = compare(describe(data__height=16))
    assert found.misfits == {"image_shape": [[8, 8, 1], [16, 8, 1]]}


def test_latents():
    one = {"vae": "here", "weights": "a", "config": {"scaling_factor": 0.18}}
    assert not compare(describe(one | {"vae": "there"}), describe(one)).misfits
    # A later version may say more of an autoencoder.
    more = one | {"config": {"scaling_factor": 0.18, "shift_factor": 0.0}}
    assert not compare(describe(more), describe(one)).misfits
    for other in (one | {"weights": "b"}, one | {"config": {"scaling_factor": 1.0}}, None):
        found = compare(describe(other), describe(one))
        assert list(found.misfits) == ["latents"] and "the autoencoder has changed" in changes.spelled(found.misfits)


def test_before_the_first_step():
    assert list(compare(describe(init_from="runs/a"), started=False).changes) == ["init_from"]


def test_auto_is_what_it_stands_for():
    assert not compare(describe(optim__decay_mask="matrices")).changes
    assert list(compare(describe(optim__decay_mask="all")).changes) == ["optim.decay_mask"]


def test_many_changes_are_counted():
    found = compare(describe(optim__b1=0.5, optim__b2=0.5, seed=1, model__dtype="bfloat16"))
    assert changes.spelled(found.changes).endswith("optim.b2 was 0.999, now 0.5 and 1 more")


def test_features_of_another_width_do_not_fit():
    """The head ends with it."""
    old, new, deeper = (describe() | {"features": {"encoder": {}, "shape": [4, 4, width]}} for width in (6, 8, 6))
    assert compare(new, old).misfits == {"features": [6, 8]} and not compare(deeper, old).misfits
    assert changes.spelled({"features": [6, 8]}) == "the width of data.features was 6, now 8"
