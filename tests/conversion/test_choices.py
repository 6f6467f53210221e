"""What is chosen for a network, and what wins: flags, then what its file says, then what is usual and printed."""

import dataclasses

import numpy as np
import pytest
from errors import assert_one_line

from speedit_jax.config import get_config
from speedit_jax.conversion.configure import fill_config
from speedit_jax.conversion.importing import fit
from speedit_jax.interop.dit import Architecture
from speedit_jax.interop.weights import Weights

NETWORK = Architecture("DiT", width=64, depth=2, patch=2, channels=4, out_channels=8, label_rows=11, tokens=16, heads=4)
WEIGHTS = Weights({}, {})


def filled(weights=WEIGHTS, given=(), **network):
    """(config, its classes, the lines)."""
    config, given = get_config(), dict(given)
    config.update_from_flattened_dict(given)
    source, lines = fill_config(config, weights, dataclasses.replace(NETWORK, **network), given)
    return config, source.class_names, lines


LABELS = [
    # rows, what the file says, flags, classes, dropout, a line
    (11, {}, {}, 10, 0.1, True),
    (11, {}, {"model.label_dropout": 0.0}, 11, 0.0, False),
    (11, {"num_classes": 10}, {}, 10, 0.1, False),
    (11, {"num_classes": 10, "label_dropout": 0.3}, {}, 10, 0.3, False),
    (10, {"num_classes": 10, "label_dropout": 0.0}, {}, 10, 0.0, False),
    (10, {"num_classes": 10}, {}, 10, 0.0, False),
    (10, {"label_dropout": 0.0}, {}, 10, 0.0, False),
    (10, {"label_dropout": 0.2}, {}, 9, 0.2, False),
    (10, {"label_dropout": 0.2}, {"model.label_dropout": 0.0}, 10, 0.0, False),
    # The default of argparse, of another data set: the file does not tell.
    (11, {"num_classes": 1000}, {}, 10, 0.1, True),
    (1, {"num_classes": 1, "label_dropout": 0.0}, {}, 1, 0.0, False),
    (1, {}, {"model.label_dropout": 0.0}, 1, 0.0, False),
    (0, {}, {}, 0, 0.1, False),
]


@pytest.mark.parametrize("rows, told, given, classes, dropout, line", LABELS)
def test_the_null_label(rows, told, given, classes, dropout, line):
    config, names, lines = filled(dataclasses.replace(WEIGHTS, **told), given, label_rows=rows)
    assert names == tuple(map(str, range(classes)))
    assert config.model.label_dropout == dropout
    assert any("--config.model.label_dropout=0" in text for text in lines) == line


@pytest.mark.parametrize("given", [{}, {"model.label_dropout": 0.1}])
@pytest.mark.parametrize("told", [{}, {"label_dropout": 0.1}])
def test_one_row_wants_a_flag(given, told):
    weights = dataclasses.replace(WEIGHTS, **told)
    assert_one_line(lambda: filled(weights, given, label_rows=1), "one row", "--config.model.label_dropout=0")


@pytest.mark.parametrize(
    "channels, given, clip, guided, line",
    [
        (1, {}, True, 0, ""),
        (3, {}, True, 0, ""),
        (3, {"data.vae": "x"}, False, 0, "all channels"),
        (3, {"data.vae": "x", "sampling.clip": True}, True, 0, "all channels"),
        (4, {}, False, 3, "the first 3 of 4 channels"),
        (4, {"sampling.guidance_channels": 0}, False, 0, ""),
        (8, {}, False, 0, "all channels"),
        (32, {}, False, 0, "all channels"),
        (32, {"sampling.guidance_channels": 3}, False, 3, ""),
    ],
)
def test_latents_and_guidance(channels, given, clip, guided, line):
    config, _, lines = filled(given=given, channels=channels, out_channels=2 * channels)
    assert (config.sampling.clip, config.sampling.guidance_channels) == (clip, guided)
    told = [text for text in lines if "guidance acts" in text]
    assert len(told) == bool(line) and all(line in text for text in told)


def test_without_a_null_label_guidance_is_no_choice():
    assert not any("guidance" in text for text in filled(given={"model.label_dropout": 0.0})[2])


@pytest.mark.parametrize("reversed_time, line", [(None, True), (False, False), (True, False)])
def test_a_flow_says_how_its_time_is_taken(reversed_time, line):
    lines = filled(dataclasses.replace(WEIGHTS, path="linear", reversed_time=reversed_time))[2]
    assert any("--reverse_time" in text for text in lines) == line
    assert any("--reverse_time" in text for text in filled(given={"diffusion.path": "gvp"})[2])


def state(seed, **changes):
    """A DiT's tensors, those in `changes` others or, where None, missing."""
    rng = np.random.default_rng(seed)
    width, found = 8, {}

    def linear(name, inputs, outputs):
        found[f"{name}.weight"] = rng.standard_normal((outputs, inputs), np.float32)
        found[f"{name}.bias"] = rng.standard_normal(outputs, np.float32)

    found["x_embedder.proj.weight"] = rng.standard_normal((width, 4, 2, 2), np.float32)
    found["x_embedder.proj.bias"] = rng.standard_normal(width, np.float32)
    sizes = {"t_embedder.mlp.0": (256, 1), "t_embedder.mlp.2": (8, 1), "final_layer.adaLN_modulation.1": (8, 2)}
    block = {"attn.qkv": (8, 3), "attn.proj": (8, 1), "mlp.fc1": (8, 4), "mlp.fc2": (32, 1), "adaLN_modulation.1": (8, 6)}
    for name, (inputs, outputs) in (sizes | {f"blocks.0.{name}": size for name, size in block.items()}).items():
        linear(name, inputs, outputs * width)
    linear("final_layer.linear", width, 32)
    found["y_embedder.embedding_table.weight"] = rng.standard_normal((11, width), np.float32)
    found |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in found.items() if value is not None}


GIVEN = {"model.heads": 2, "data.height": 4, "data.width": 4}
BROKEN = {"blocks__0__mlp__fc2__bias": None}


def fitted(raw, ema, given=GIVEN):
    config = get_config()
    config.update_from_flattened_dict(given)
    return fit(Weights(raw, ema), config, given)


def test_both_weights():
    found = fitted(state(0), state(1))
    np.testing.assert_array_equal(found.params["patch"]["bias"], state(0)["x_embedder.proj.bias"])
    np.testing.assert_array_equal(found.ema["patch"]["bias"], state(1)["x_embedder.proj.bias"])


@pytest.mark.parametrize("change", [BROKEN, {"final_layer__linear__bias": np.zeros(3, np.float32)}, {"extra": np.zeros(3)}])
def test_where_one_does_not_fit_the_other_stands_for_both(change):
    for weights, kept, words in (
        ((state(0, **change), state(1)), 1, "its raw weights do not fit"),
        ((state(0), state(1, **change)), 0, "its EMA does not fit"),
    ):
        found = fitted(*weights)
        for tree in (found.params, found.ema):
            np.testing.assert_array_equal(tree["patch"]["bias"], state(kept)["x_embedder.proj.bias"])
        assert any(words in note and "both" in note for note in found.notes)


def test_where_none_fits_the_average_is_named():
    assert_one_line(lambda: fitted(state(0, extra=np.zeros(3)), state(1, **BROKEN)), "missing blocks.0.mlp.fc2.bias")


def test_turned_weights_need_a_flow():
    turned = Weights(*[state(0)] * 2, reversed_time=True)
    config = get_config()
    config.update_from_flattened_dict(GIVEN)
    assert_one_line(lambda: fit(turned, config, GIVEN), "--config.diffusion.path=linear")
    config.diffusion.path = "linear"
    found = fit(turned, config, GIVEN | {"diffusion.path": "linear"})
    np.testing.assert_array_equal(found.ema["final"]["bias"].reshape(-1), -state(0)["final_layer.linear.bias"])
    assert any("time is reversed" in note for note in found.notes)


def test_the_size_of_a_run_stays():
    """Another one would stand in the settings alone: the network would go on drawing the run's."""
    of_run, given = Weights({}, {}, run={"image_shape": [8, 8, 1]}), {"data.height": 8, "data.width": 16}
    assert_one_line(lambda: fit(of_run, get_config(), given), "--config.data.width=16", "a run that draws 8 x 8 x 1", "init_from")
