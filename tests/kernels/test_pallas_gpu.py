"""The GPU kernels, lowered through Triton and compiled; their values are in test_gla.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speedit_jax.errors import UserError
from speedit_jax.kernels import chunked, pallas_gpu
from speedit_jax.kernels.gla import choose_gla, gla
from speedit_jax.training import topologies


# jax 0.11 and later compile Triton while lowering, for a GPU's compiler that is not here.
@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="lowering needs a GPU's compiler since jax 0.11")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("heads", "dk", "dv"), [(6, 32, 64), (18, 32, 64), (6, 64, 64), (6, 36, 72)])
def test_lowers_for_cuda(heads, dk, dv, dtype):
    shapes = [jax.ShapeDtypeStruct((2, 100, heads, d), dtype) for d in (dk, dk, dv)]
    shapes.append(jax.ShapeDtypeStruct((2, 100, heads, dk), jnp.float32))

    def forward(*x):
        return gla(*x, implementation="pallas_gpu")

    gradient = jax.grad(lambda *x: forward(*x).astype(jnp.float32).sum(), argnums=range(4))
    for f, kernels in ((forward, 3), (gradient, 7)):
        text = jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @__gpu$xla.gpu.triton") == kernels


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("dk", "dv"), [(32, 64), (64, 64), (36, 72)])
@pytest.mark.parametrize("topology", ["h100", "a100"])
def test_compiles_for_gpu(topology, dk, dv, dtype):
    pytest.importorskip("jax_cuda12_plugin")
    devices, _ = topologies.devices(topology)
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    shapes = [jax.ShapeDtypeStruct((2, 1024, 6, d), dtype) for d in (dk, dk, dv)]
    shapes.append(jax.ShapeDtypeStruct((2, 1024, 6, dk), jnp.float32))

    def loss(*x):
        return gla(*x, implementation="pallas_gpu").astype(jnp.float32).sum()

    # Since jax 0.11 Triton is compiled while lowering, for the mesh's kind of device.
    with jax.set_mesh(mesh):
        text = jax.jit(jax.value_and_grad(loss, argnums=range(4))).lower(*shapes).compile().as_text()
    assert text.count("triton") >= 6


def test_features_over_programs():
    """More of them than one program of the gradients' kernel has, padded; test_gla.py has fewer."""
    rng = np.random.default_rng(0)
    q, k, v, x, d_out = (jnp.asarray(rng.normal(size=(1, 70, 1, d)), jnp.float32) for d in (24, 24, 16, 24, 16))

    def output_and_gradients(f, **kwargs):
        def both(d_out, *x):
            out, pullback = jax.vjp(lambda *x: f(*x, scale=0.5, reverse=True, **kwargs), *x)
            return out, *pullback(d_out)

        return jax.jit(both)(d_out, q, k, v, jax.nn.log_sigmoid(x))

    got, expected = output_and_gradients(pallas_gpu.gla, interpret=True), output_and_gradients(chunked.gla)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chunks", [1, 16, 35])
def test_scan_over_chunks(chunks, reverse):
    """Fewer chunks than are read ahead, exactly as many, and two rounds with a rest."""
    rng = np.random.default_rng(chunks)
    whole, own = rng.uniform(size=(3, chunks, 2)), rng.normal(size=(3, chunks, 2, 16))
    state, expected = np.zeros((3, 2, 16)), np.empty_like(own)
    for n in range(chunks)[:: -1 if reverse else 1]:
        expected[:, n] = 0.5 * state
        state = whole[:, n, :, None] * state + own[:, n]
    inputs = jnp.asarray(whole, jnp.float32), jnp.asarray(own, jnp.float32)
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)):
        found = pallas_gpu.scan(*inputs, dtype, scale=0.5, reverse=reverse, interpret=True)
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=tolerance, atol=tolerance)


def test_choice():
    assert choose_gla("auto", "gpu") == choose_gla("auto", "cuda") == choose_gla("pallas_gpu", "gpu") == "pallas_gpu"
    with pytest.raises(UserError, match=r"model\.gla=pallas_gpu needs a gpu, not cpu"):
        choose_gla("pallas_gpu", "cpu")


def test_float64_is_refused():
    with jax.enable_x64(True), pytest.raises(TypeError, match="not float64"):
        gla(*[jnp.zeros((1, 4, 1, 4))] * 4, implementation="pallas_gpu")
