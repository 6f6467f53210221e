"""Attention: the choice of kernel, and the TPU kernel compiled for TPU and interpreted on CPU."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from speedit_jax.errors import UserError
from speedit_jax.models.attention import attention, choose_attention, chunked_attention


def qkv(batch=1, tokens=64, heads=2, head_dim=16):
    return jax.random.normal(jax.random.key(0), (3, batch, tokens, heads, head_dim))


def xla(q, k, v):
    return attention(q, k, v, "xla", None, None)


def pallas(q, k, v):
    return attention(q, k, v, "pallas", None, None)


def softmax_attention(q, k, v):
    """The definition, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.exp(np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1]))
    return np.einsum("bhts,bshk->bthk", scores / scores.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(
    "requested, platform, dtype, chosen",
    [
        ("auto", "cpu", "float32", "xla"),
        ("auto", "cpu", "bfloat16", "xla"),
        ("auto", "gpu", "float32", "xla"),
        ("auto", "gpu", "bfloat16", "cudnn"),
        ("auto", "cuda", "float16", "cudnn"),
        ("auto", "tpu", "float32", "pallas"),
        ("auto", "tpu", "bfloat16", "pallas"),
        ("xla", "cpu", "float32", "xla"),
        ("xla", "gpu", "bfloat16", "xla"),
        ("xla", "tpu", "bfloat16", "xla"),
        ("chunked", "gpu", "float32", "chunked"),
        ("cudnn", "gpu", "bfloat16", "cudnn"),
        ("pallas", "tpu", "float32", "pallas"),
    ],
)
def test_choice(requested, platform, dtype, chosen):
    assert choose_attention(requested, platform, dtype, 64) == chosen


@pytest.mark.parametrize(
    "platform, head_width, chosen",
    [
        ("gpu", 8, "cudnn"),
        ("gpu", 12, "xla"),
        ("gpu", 128, "cudnn"),
        ("gpu", 192, "xla"),
        ("tpu", 12, "pallas"),
        ("tpu", 128, "pallas"),
        ("tpu", 192, "xla"),
        ("tpu", 384, "pallas"),
    ],
)
def test_auto_avoids_kernels_that_lack_the_width_of_a_head(platform, head_width, chosen):
    """As a DiT-S of 2 heads, or one of width 36 and 3 heads, has them."""
    assert choose_attention("auto", platform, "bfloat16", head_width) == chosen


@pytest.mark.parametrize(
    "requested, platform, head_width, message",
    [
        ("cudnn", "gpu", 12, r"model\.attention=cudnn.*multiple of 8 up to 256, not 12"),
        ("cudnn", "gpu", 384, r"model\.attention=cudnn.*multiple of 8 up to 256, not 384"),
        ("pallas", "tpu", 192, r"model\.attention=pallas.*up to 128, or a multiple of it, not 192"),
    ],
)
def test_heads_that_a_kernel_does_not_have(requested, platform, head_width, message):
    with pytest.raises(UserError, match=message):
        choose_attention(requested, platform, "bfloat16", head_width)


@pytest.mark.parametrize("tokens", [64, 1024])
@pytest.mark.parametrize("head_width", [12, 128, 192, 384])
def test_what_auto_takes_lowers_for_tpu(tokens, head_width):
    chosen = choose_attention("auto", "tpu", "bfloat16", head_width)
    x = jax.ShapeDtypeStruct((1, tokens, 1, head_width), jnp.bfloat16)
    jax.jit(lambda x: attention(x, x, x, chosen, None, None)).trace(x).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize(
    "requested, platform, dtype, message",
    [
        ("flash", "gpu", "bfloat16", r"unknown model\.attention 'flash'.*auto, xla, chunked, cudnn, pallas"),
        ("cudnn", "cpu", "bfloat16", r"model\.attention=cudnn.*not cpu in bfloat16"),
        ("cudnn", "tpu", "bfloat16", r"model\.attention=cudnn.*not tpu"),
        ("cudnn", "gpu", "float32", r"model\.attention=cudnn.*not gpu in float32"),
        ("pallas", "cpu", "float32", r"model\.attention=pallas.*not cpu"),
        ("pallas", "gpu", "bfloat16", r"model\.attention=pallas.*not gpu"),
    ],
)
def test_impossible_choices(requested, platform, dtype, message):
    with pytest.raises(UserError, match=message):
        choose_attention(requested, platform, dtype, 64)


def test_xla_attention_is_its_definition():
    inputs = qkv(batch=2, tokens=12, heads=3, head_dim=8)
    np.testing.assert_allclose(xla(*inputs), softmax_attention(*inputs), atol=2e-6)


def test_xla_attention_keeps_its_weights_once():
    """For the backward pass of a scan over layers, and its gradients are those of jax.nn.softmax."""
    inputs, cotangent = qkv(batch=2, tokens=12, heads=3, head_dim=8), jnp.arange(8) - 3.5

    def plain(q, k, v):
        return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) * 8**-0.5), v)

    def layers(*stacked):
        return jax.lax.scan(lambda _, layer: (None, xla(*layer)), None, stacked)[1]

    pullback = jax.eval_shape(lambda *x: jax.vjp(layers, *x)[1], *[jnp.stack([x] * 5) for x in inputs])
    assert [leaf.shape for leaf in jax.tree.leaves(pullback)].count((5, 2, 3, 12, 12)) == 1
    gradients = [jax.grad(lambda args, f=f: (f(*args) * cotangent).sum())(inputs) for f in (xla, plain)]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-5)


# Less than a chunk of queries; whole chunks; a last chunk that is filled up.
@pytest.mark.parametrize("tokens", [64, 512, 600])
def test_chunked_attention_is_attention(tokens):
    inputs, cotangent = qkv(batch=2, tokens=tokens), jnp.arange(16) - 7.5
    for f in (lambda f: f(*inputs), lambda f: jax.grad(lambda args: (f(*args) * cotangent).sum())(inputs)):
        np.testing.assert_allclose(f(chunked_attention), f(xla), rtol=1e-4, atol=1e-5)


def test_chunked_attention_never_holds_all_logits():
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.float32)
    temporaries = []
    for f in (chunked_attention, xla):
        gradient = jax.jit(jax.grad(lambda *args, f=f: f(*args).sum(), argnums=(0, 1, 2)))
        temporaries.append(gradient.lower(*[shape] * 3).compile().memory_analysis().temp_size_in_bytes)
    assert temporaries[1] > 4096**2 * 4 > 2 * temporaries[0]


@pytest.mark.parametrize("tokens", [64, 256, 1000])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_the_kernel_and_its_gradient_lower_for_tpu(tokens, head_dim):
    inputs = [jax.ShapeDtypeStruct((2, tokens, 4, head_dim), jnp.bfloat16)] * 3
    gradient = jax.grad(lambda q, k, v: pallas(q, k, v).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    for f, kernels in ((pallas, 1), (gradient, 3)):
        text = jax.jit(f).trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("@tpu_custom_call") == kernels


def interpreted():
    """Where no TPU is there."""
    return contextlib.nullcontext() if jax.default_backend() == "tpu" else pltpu.force_tpu_interpret_mode()


# Without padding; with it; with a head that does not fill the lanes; in several blocks.
@pytest.mark.tpu
@pytest.mark.parametrize("tokens, head_dim", [(128, 64), (64, 72), (300, 64)])
def test_the_kernel_computes_attention(tokens, head_dim):
    inputs = qkv(tokens=tokens, head_dim=head_dim)
    with interpreted(), jax.default_matmul_precision("highest"):
        got = pallas(*inputs)
    np.testing.assert_allclose(got, softmax_attention(*inputs), atol=1e-5)


# bfloat16 keeps 8 bits of probabilities and of the output, and the gradients of a few hundred of them.
@pytest.mark.gpu
@pytest.mark.parametrize("tokens, head_dim", [(128, 64), (64, 72), (300, 64)])
def test_cudnn_computes_attention(tokens, head_dim):
    if jax.default_backend() != "gpu":
        pytest.skip("cuDNN runs on NVIDIA GPUs only; pytest -m gpu")
    inputs = qkv(tokens=tokens, head_dim=head_dim).astype(jnp.bfloat16)
    cotangent = jnp.arange(head_dim) - head_dim / 2

    def all_of(implementation, inputs):
        f = functools.partial(attention, implementation=implementation, batch_axes=None, head_axis=None)
        gradient = jax.grad(lambda args: (f(*args).astype(jnp.float32) * cotangent).sum())
        return f(*inputs), *gradient(inputs)

    with jax.default_matmul_precision("highest"):
        expected = all_of("xla", inputs.astype(jnp.float32))
    for x, y in zip(all_of("cudnn", inputs), expected, strict=True):
        assert np.linalg.norm(np.float32(x) - y) < 2e-2 * np.linalg.norm(y)


def test_the_gradient_of_the_kernel():
    inputs, cotangent = qkv(tokens=100, heads=1), jnp.arange(16) - 7.5
    gradients = [jax.grad(lambda args, f=f: (f(*args) * cotangent).sum()) for f in (pallas, xla)]
    with pltpu.force_tpu_interpret_mode():
        got = gradients[0](inputs)
    np.testing.assert_allclose(got, gradients[1](inputs), atol=1e-5)


def test_the_kernel_under_a_mesh():
    """Each device computes its images and heads alone."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    sharded = jax.jit(lambda q, k, v: attention(q, k, v, "pallas", ("data", "fsdp"), "tensor"))
    inputs = qkv(batch=4)
    with jax.set_mesh(mesh):
        text = sharded.trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()
        assert "tensor<1x1x128x16xf32>" in text
        with pltpu.force_tpu_interpret_mode():
            got = sharded(*inputs)
    np.testing.assert_allclose(got, xla(*inputs), atol=1e-5)
