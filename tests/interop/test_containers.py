"""Networks under all the names that training code gives them."""

import numpy as np
import pytest
from errors import assert_one_line

from speedit_jax.interop.containers import find, saved_settings
from speedit_jax.interop.pickles import Inert

STATE = {
    name: np.full(2, i, np.float32) for i, name in enumerate(("x_embedder.proj.weight", "blocks.0.mlp.fc1.bias", "pos_embed"))
}
EMA = {name: value + 10 for name, value in STATE.items()}
MOMENTS = {"state": {0: {"exp_avg": np.zeros(2)}}, "param_groups": [{"lr": 1.0}]}


def prefixed(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


def assert_same(found, state):
    assert found.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net.", "module._orig_mod.", "a.b.never_heard_of."])
@pytest.mark.parametrize("container", [None, "state_dict", "model_state_dict", "ema_state_dict", "params_ema", "net", "weights"])
def test_one_network(prefix, container):
    content = prefixed(prefix)
    content = {container: content, "epoch": 3, "optimizer": MOMENTS} if container else content
    found = find(content)
    assert found.raw is found.ema
    assert_same(found.raw, STATE)
    (note,) = found.notes
    assert note == f"the weights are its tensors under {f'{container}.' if container else ''}{prefix[:-1]}"


@pytest.mark.parametrize("content", [STATE, {"model": STATE}, {"model": STATE, "ema": EMA, "opt": MOMENTS, "args": Inert()}])
def test_what_everybody_writes_needs_no_note(content):
    assert find(content).notes == ()


@pytest.mark.parametrize(
    "content",
    [
        {"model": STATE, "ema": EMA},
        {"model": prefixed("module."), "ema": EMA},
        {
            "state_dict": prefixed("model.")
            | prefixed("ema_model.", EMA)
            | prefixed("first_stage_model.decoder.", {"w": np.ones(1)})
        },
        {"params": STATE, "params_ema": EMA},
        {"net": {"deeper": prefixed("online_model.") | prefixed("ema_model.", EMA)}},
        STATE | {"ema_0.9999": EMA},
        {"model": STATE, "averaged_model": prefixed("module.", EMA)},
        # Adam's moments have the names of their tensors.
        {"model": STATE, "ema": EMA, "opt": {"exp_avg": STATE}, "optim": {"state": prefixed("model.")}},
    ],
)
def test_raw_and_averaged(content):
    found = find(content)
    assert_same(found.raw, STATE)
    assert_same(found.ema, EMA)


@pytest.mark.parametrize(
    "content", [{"model": None, "ema": EMA}, {"model": {}, "ema": EMA}, {"model": {"a": np.ones(1)}, "ema": EMA}]
)
def test_one_stands_for_both(content):
    found = find(content)
    assert_same(found.raw, EMA)
    assert found.notes == ("its 'model' holds no network: the other weights stand for both, raw and ema",)
    found = find({"model": STATE, "ema": content["model"]})
    assert_same(found.ema, STATE)
    assert found.notes == ("its 'ema' holds no network: the other weights stand for both, raw and ema",)


def test_an_average_of_parameters_alone_has_the_positions_too():
    found = find({"model": STATE, "ema": {name: value for name, value in EMA.items() if name != "pos_embed"}})
    assert_same(found.ema, EMA | {"pos_embed": STATE["pos_embed"]})


@pytest.mark.parametrize(
    "content, words",
    [
        (MOMENTS, ["optimizer"]),
        ({}, ["missing x_embedder.proj.weight", "nothing"]),
        ({"lr": 1.0}, ["missing x_embedder.proj.weight", "lr (float)"]),
        ({"a": np.ones(1), "b": {"c": np.ones(1)}}, ["missing x_embedder.proj.weight", "a, b.c"]),
        ({"student": STATE, "teacher": EMA}, ["several networks: student, teacher"]),
        ({"ema_0.9": EMA, "ema_0.99": EMA}, ["several networks: ema_0.9, ema_0.99"]),
        ({"decoder.conv_in.weight": np.ones(1)}, ["autoencoder", "--config.data.vae"]),
        ({"transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.bias": np.ones(1)}, ["diffusers", "config.json"]),
    ],
)
def test_nothing_to_choose(content, words):
    assert_one_line(lambda: find(content), *words)


def saved(state):
    inert = Inert()
    inert.saved = state
    return inert


@pytest.mark.parametrize(
    "content",
    [
        {"args": saved({"num_classes": 10, "lr": 1.0})},
        {"config": {"model": {"num_classes": 10}, "lr": 1.0}},
        {"hyper_parameters": saved({"num_classes": 10, "lr": 1.0, "optimizer": saved(None)})},
        # OmegaConf's
        {
            "args": saved(
                {"_metadata": saved({"key": "x"}), "_content": {"num_classes": saved({"_val": 10}), "lr": saved({"_val": 1.0})}}
            )
        },
        {"args": saved({"num_classes": 10, "lr": 1.0, "a": {"seed": 1}}), "config": {"num_classes": 10, "b": {"seed": 2}}},
    ],
)
def test_settings(content):
    assert saved_settings(content | {"model": STATE}) == {"num_classes": 10, "lr": 1.0}
