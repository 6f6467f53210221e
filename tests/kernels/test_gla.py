"""Gated linear attention: every implementation against the definition in float64, for every kind of gate.

The kernels for TPU and GPU run in Pallas' interpreters, or with `-m tpu` and `-m gpu` on the real thing; test_pallas_tpu.py and
test_pallas_gpu.py lower and compile them.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from speedit_jax.kernels import pallas_gpu
from speedit_jax.kernels.gla import IMPLEMENTATIONS, gla

B, H, K, V = 2, 2, 16, 24


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


# What a token's state is multiplied by, from DiG's own slow forgetting to resets; x is standard normal.
GATES = {
    "dig": lambda x, rng: log_sigmoid(x) / 16,
    "sigmoid": lambda x, rng: log_sigmoid(x),
    "harsh": lambda x, rng: 5 * log_sigmoid(x),
    "extreme": lambda x, rng: 20 * log_sigmoid(x),
    "spikes": lambda x, rng: np.where(rng.random(x.shape) < 0.05, -200.0, log_sigmoid(x) / 16),
    "resets": lambda x, rng: np.where(rng.random(x.shape) < 0.05, -1e4, log_sigmoid(x) / 16),
}


def make_inputs(gate: str, tokens: int, dtype):
    """q, k, v in `dtype`, log_g float32, and the output's cotangent; every value is one that `dtype` can hold."""
    rng = np.random.default_rng(0)
    shapes = [(B, tokens, H, K), (B, tokens, H, K), (B, tokens, H, V), (B, tokens, H, V)]
    q, k, v, d_out = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    return (q, k, v, jnp.asarray(GATES[gate](rng.normal(size=shapes[0]), rng), jnp.float32)), d_out


def definition(inputs, d_out, reverse):
    """Output and gradients in float64 NumPy: eq. (1) and (2) of docs/gla.md, token by token, and their derivatives by hand."""
    q, k, v, g, d_out = (np.asarray(x.astype(jnp.float32), np.float64) for x in (*inputs, d_out))
    order = range(q.shape[1])[::-1] if reverse else range(q.shape[1])
    scale, state, states, out = K**-0.5, np.zeros((B, H, K, V)), {}, np.zeros_like(v)
    for t in order:
        states[t] = state
        state = np.exp(g[:, t])[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        out[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], state)
    dq, dk, dv, dg = (np.zeros_like(x) for x in (q, k, v, g))
    d_state = np.zeros_like(state)
    for t in reversed(order):
        decay = np.exp(g[:, t])[..., None]
        after = decay * states[t] + k[:, t, :, :, None] * v[:, t, :, None]
        dq[:, t] = scale * np.einsum("bhv,bhkv->bhk", d_out[:, t], after)
        d_state = d_state + scale * q[:, t, :, :, None] * d_out[:, t, :, None]
        dk[:, t] = np.einsum("bhkv,bhv->bhk", d_state, v[:, t])
        dv[:, t] = np.einsum("bhkv,bhk->bhv", d_state, k[:, t])
        dg[:, t] = (d_state * decay * states[t]).sum(axis=-1)
        d_state = decay * d_state
    return out, (dq, dk, dv, dg)


def relative_error(x, reference):
    return np.linalg.norm(np.asarray(x, np.float64) - reference) / np.linalg.norm(reference)


DEVICES = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}


@contextlib.contextmanager
def interpreted(implementation):
    """Where the kernel's device is not there."""
    if jax.default_backend() == DEVICES.get(implementation):
        yield
    elif implementation == "pallas_tpu":
        with pltpu.force_tpu_interpret_mode():
            yield
    elif implementation == "pallas_gpu":
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(IMPLEMENTATIONS, "pallas_gpu", functools.partial(pallas_gpu.gla, interpret=True))
            yield
    else:
        yield


def on_devices(implementation):
    marks = [getattr(pytest.mark, device) for device in ("tpu", "gpu") if DEVICES.get(implementation, device) == device]
    return pytest.param(implementation, marks=marks)


# Ragged: no chunk divides it; more than one chunk of each implementation.
TOKENS = {"reference": 77, "xla": 77, "pallas_tpu": 150, "pallas_gpu": 150}


@functools.partial(jax.jit, static_argnames=("implementation", "reverse", "batch_axes", "head_axis"))
def output_and_gradients(inputs, d_out, **kwargs):
    out, pullback = jax.vjp(lambda *x: gla(*x, **kwargs), *inputs)
    return out, pullback(d_out)


# float32: a few roundings of 6e-8 over sums of a hundred terms. bfloat16: inputs are exact, outputs are rounded to 8 bits,
# 2e-3 on average; the gate's gradient is a float32 sum of products of exact inputs.
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(("dtype", "tolerance", "gate_tolerance"), [(jnp.float32, 1e-6, 1e-5), (jnp.bfloat16, 6e-3, 1.5e-2)])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("implementation", [on_devices(name) for name in IMPLEMENTATIONS])
def test_against_the_definition(implementation, gate, dtype, tolerance, gate_tolerance, reverse):
    inputs, d_out = make_inputs(gate, TOKENS[implementation], dtype)
    reference, reference_grads = definition(inputs, d_out, reverse)
    with interpreted(implementation):
        out, grads = output_and_gradients(inputs, d_out, implementation=implementation, reverse=reverse)
    assert out.dtype == dtype and [g.dtype for g in grads] == [dtype, dtype, dtype, jnp.float32]
    assert relative_error(out, reference) <= tolerance
    for gradient, expected, bound in zip(grads, reference_grads, (tolerance,) * 3 + (gate_tolerance,), strict=True):
        assert relative_error(gradient, expected) <= bound


def border_gates(bound: float, tokens: int) -> np.ndarray:
    """log_g [B, T, H, K] around the GPU kernels' bound for a chunk: batch 0 is just within it, batch 1 over it."""
    g = np.zeros((B, tokens, H, K), np.float32)
    at = np.arange(tokens) % pallas_gpu.CHUNK
    g[0, :, 0] = -bound / pallas_gpu.CHUNK  # equal gates
    g[0, :, 1] = np.where(at[:, None] == np.arange(K) * 4, -bound, 0)  # all at one token, another one for each feature
    g[1, :, 0] = -bound / pallas_gpu.CHUNK * (1 + 2**-8)
    g[1, :, 1] = -1e-3
    g[1, at == 5, 1, 3] = -1e4  # a single feature
    return g


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(("dtype", "tolerance", "gate_tolerance"), [(jnp.float32, 1e-6, 1e-5), (jnp.bfloat16, 6e-3, 1.5e-2)])
@pytest.mark.gpu
def test_border_of_bounded_gates(dtype, tolerance, gate_tolerance, reverse):
    """Each head against the definition: heads over the bound, whose gradients of gates are small, are not hidden by others."""
    (q, k, v, _), d_out = make_inputs("dig", 150, dtype)
    inputs = q, k, v, jnp.asarray(border_gates(pallas_gpu.BOUND[jnp.dtype(dtype)], 150))
    expected = jax.tree.leaves(definition(inputs, d_out, reverse))
    with interpreted("pallas_gpu"):
        got = jax.tree.leaves(output_and_gradients(inputs, d_out, implementation="pallas_gpu", reverse=reverse))
    for x, wanted, bound in zip(got, expected, (tolerance,) * 4 + (gate_tolerance,), strict=True):
        for b, h in np.ndindex(B, H):
            assert relative_error(x[b, :, h], wanted[b, :, h]) <= bound


@pytest.mark.gpu
def test_one_product_is_what_the_levels_are():
    """A feature that adds nothing and forgets everything sends its chunks through the levels; others take one product."""
    (q, k, v, g), d_out = make_inputs("dig", 70, jnp.float32)
    q, k = q.at[..., 0].set(0), k.at[..., 0].set(0)
    with interpreted("pallas_gpu"):
        results = [
            output_and_gradients((q, k, v, g.at[..., 0].set(gate)), d_out, implementation="pallas_gpu") for gate in (0, -1e3)
        ]
    (fast, fast_grads), (levels, levels_grads) = results
    assert not np.array_equal(fast, levels)
    assert relative_error(fast, np.asarray(levels, np.float64)) <= 1e-6
    for x, wanted in zip(fast_grads, levels_grads, strict=True):
        assert relative_error(x[..., 1:], np.asarray(wanted[..., 1:], np.float64)) <= 1e-5


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64])
def test_any_number_of_tokens(tokens):
    inputs, d_out = make_inputs("dig", tokens, jnp.float32)
    for reverse in (False, True):
        reference, grads = definition(inputs, d_out, reverse)
        out, ours = output_and_gradients(inputs, d_out, reverse=reverse)
        assert relative_error(out, reference) <= 1e-6
        for gradient, expected in zip(ours[:3], grads[:3], strict=True):
            assert relative_error(gradient, expected) <= 1e-6


def test_reverse_is_the_flipped_forward():
    inputs, _ = make_inputs("sigmoid", 40, jnp.float32)
    flipped = gla(*(x[:, ::-1] for x in inputs))[:, ::-1]
    np.testing.assert_allclose(gla(*inputs, reverse=True), flipped, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_shard_map(implementation):
    inputs, d_out = make_inputs("dig", 33, jnp.float32)
    expected = output_and_gradients(inputs, d_out, implementation=implementation)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        sharded = jax.jit(
            lambda *x: output_and_gradients(x[:4], x[4], implementation=implementation, batch_axes=("data",), head_axis="tensor")
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), sharded(*inputs, d_out), expected)
        # Batch elements and heads do not meet: nothing need be sent.
        spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "tensor", None))
        compiled = sharded.lower(*(jax.device_put(x, spec) for x in (*inputs, d_out))).compile().as_text()
    assert "all-gather" not in compiled and "all-reduce" not in compiled


def test_wrong_inputs_are_named():
    (q, k, v, g), _ = make_inputs("dig", 8, jnp.float32)
    with pytest.raises(ValueError, match=r"\[B, T, H, K\]"):
        gla(q, k[:, :4], v, g)
    with pytest.raises(ValueError, match="v"):
        gla(q, k, v[0], g)
    with pytest.raises(TypeError, match="log_g in float32"):
        gla(q, k, v, g.astype(jnp.bfloat16))
    with pytest.raises(TypeError, match="q, k and v"):
        gla(q, k, v.astype(jnp.bfloat16), g)
    with pytest.raises(ValueError, match="choose one of reference, xla, pallas_tpu, pallas_gpu"):
        gla(q, k, v, g, implementation="fast")
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="'tensor' of size 4 does not divide the 2 heads"):
        gla(q, k, v, g, head_axis="tensor")


@pytest.mark.parametrize("factor", [-1, np.inf], ids=["positive", "minus infinity"])
def test_impossible_gates_are_found_in_debug_mode(factor):
    """0 times minus infinity would be NaN where a matrix sums the gates; -1e4 resets the state as well."""
    inputs, _ = make_inputs("dig", 8, jnp.float32)
    gla(*inputs, check_gates=True).block_until_ready()
    with pytest.raises(Exception, match="gates must be <= 0 and finite"):
        gla(*inputs[:3], factor * inputs[3], check_gates=True).block_until_ready()
        jax.effects_barrier()
