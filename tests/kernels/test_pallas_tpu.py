"""The TPU kernels: lowered for TPU, under a mesh, in groups of heads, and what the interpreter's detectors say of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from speedit_jax.errors import UserError
from speedit_jax.kernels import chunked, pallas_tpu
from speedit_jax.kernels.gla import choose_gla, gla
from speedit_jax.training import topologies


def inputs(batch=1, tokens=150, heads=2, dk=8, dv=16, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(batch, tokens, heads, d) for d in (dk, dk, dv, dv, dk)]
    q, k, v, d_out, x = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return [x.astype(dtype) for x in (q, k, v)] + [jax.nn.log_sigmoid(x)], d_out.astype(dtype)


def output_and_gradients(f, arguments, d_out):
    out, pullback = jax.vjp(f, *arguments)
    return out, *pullback(d_out)


def kernels(f, *shapes):
    """How many TPU kernels `f` lowers to."""
    return jax.jit(f).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call")


# The heads of DiG's sizes; XL's 18 heads in groups.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("heads", "dk", "dv"), [(6, 32, 64), (16, 32, 64), (18, 32, 64), (6, 64, 64), (6, 36, 72), (18, 72, 72)])
@pytest.mark.parametrize("tokens", [64, 300])
def test_lowers_for_tpu(tokens, heads, dk, dv, dtype):
    shapes = [jax.ShapeDtypeStruct((2, tokens, heads, d), dtype) for d in (dk, dk, dv)]
    shapes.append(jax.ShapeDtypeStruct((2, tokens, heads, dk), jnp.float32))

    def forward(*x):
        return gla(*x, implementation="pallas_tpu")

    assert kernels(forward, *shapes) == 1
    # The states again, and the gradients; nobody asks for the output.
    assert kernels(jax.grad(lambda *x: forward(*x).astype(jnp.float32).sum(), argnums=range(4)), *shapes) == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("heads", "dk", "dv"), [(6, 32, 64), (18, 32, 64), (6, 64, 64), (6, 36, 72), (6, 72, 72), (18, 72, 72)])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiles_for_tpu(topology, heads, dk, dv, dtype):
    """By the TPU's own compiler, which also sees to it that the kernel fits VMEM."""
    pytest.importorskip("libtpu")
    (device, *_), _ = topologies.devices(topology)
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct((2, 1024, heads, d), dtype, sharding=sharding) for d in (dk, dk, dv, dv)]
    d_out = shapes.pop()
    shapes.append(jax.ShapeDtypeStruct((2, 1024, heads, dk), jnp.float32, sharding=sharding))

    def forward(*x):
        return pallas_tpu.gla(*x, scale=1.0, reverse=False)

    compiled = jax.jit(lambda d_out, *x: output_and_gradients(forward, x, d_out)).lower(d_out, *shapes).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 3


@pytest.mark.parametrize(
    ("heads", "dk", "dv", "expected"),
    [(6, 32, 64, 6), (18, 32, 64, 6), (16, 32, 64, 8), (12, 32, 64, 6), (18, 72, 72, 6), (2, 300, 300, 2), (3, 12, 4, 3)],
)
def test_heads_per_step(heads, dk, dv, expected):
    assert pallas_tpu.heads_per_step(heads, dk, dv) == expected


@pytest.mark.parametrize("reverse", [False, True])
def test_groups_of_heads(monkeypatch, reverse):
    monkeypatch.setattr(pallas_tpu, "_ROWS", 16)
    arguments, d_out = inputs(batch=2, heads=3)
    assert pallas_tpu.heads_per_step(3, 8, 16) == 1
    with pltpu.force_tpu_interpret_mode():
        got = output_and_gradients(lambda *x: pallas_tpu.gla(*x, scale=0.5, reverse=reverse), arguments, d_out)
    expected = output_and_gradients(lambda *x: chunked.gla(*x, scale=0.5, reverse=reverse), arguments, d_out)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_no_races_and_nothing_read_before_it_is_written():
    arguments, d_out = inputs(tokens=256)
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(parameters):
        got = output_and_gradients(lambda *x: pallas_tpu.gla(*x, scale=0.5, reverse=False), arguments, d_out)
    expected = output_and_gradients(lambda *x: chunked.gla(*x, scale=0.5, reverse=False), arguments, d_out)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_under_a_mesh_each_device_computes_its_own():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    arguments, _ = inputs(batch=2, tokens=100)
    sharded = jax.jit(lambda *x: gla(*x, implementation="pallas_tpu", batch_axes=("data",), head_axis="tensor"))
    with jax.set_mesh(mesh):
        text = sharded.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
        assert "tensor<1x16x128xf32>" in text  # one image, one head, its 100 tokens in a whole chunk
        with pltpu.force_tpu_interpret_mode():
            got = sharded(*arguments)
    np.testing.assert_allclose(got, gla(*arguments, implementation="xla"), atol=1e-5)


@pytest.mark.parametrize(
    ("requested", "platform", "chosen"),
    [("auto", "tpu", "pallas_tpu"), ("auto", "cpu", "xla"), ("auto", "gpu", "pallas_gpu"), ("xla", "tpu", "xla")],
)
def test_choice(requested, platform, chosen):
    assert choose_gla(requested, platform) == chosen


def test_impossible_choices():
    with pytest.raises(UserError, match=r"model\.gla=pallas_tpu needs a tpu, not gpu"):
        choose_gla("pallas_tpu", "gpu")
    with pytest.raises(UserError, match=r"unknown model\.gla 'fast'"):
        choose_gla("fast", "tpu")


def test_float64_is_refused():
    with jax.enable_x64(True), pytest.raises(TypeError, match="not float64"):
        gla(*[jnp.zeros((1, 4, 1, 4))] * 4, implementation="pallas_tpu")
