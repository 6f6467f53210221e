"""The VAE against diffusers' numbers, recorded by fixtures/make_vae.py from weights that vae_weights.py makes on both sides.

Two programs that do the same arithmetic in another order differ by a few roundings (6e-8 in float32, 4e-3 in bfloat16, 1e-16 in
float64) times how much some thirty layers amplify them. Measured: 2e-6, 2e-2 and 2e-15; the tolerances leave room for other
machines.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from speedit_jax.errors import UserError
from speedit_jax.interop.vae import arrange
from speedit_jax.models.vae import VaeConfig, build_vae, from_latents, load_vae, to_latents
from speedit_jax.testing import vae_weights

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "vae.npz"
ROUNDINGS = {"float32": 2e-5, "bfloat16": 4e-2}


@functools.cache
def recorded(kind):
    with np.load(FIXTURE) as arrays:
        return {name.removeprefix(f"{kind}/"): arrays[name] for name in arrays if name.startswith(kind)}


def make(kind, dtype="float32", **settings):
    return build_vae(VaeConfig.from_diffusers(vae_weights.CONFIGS[kind] | settings), dtype)


def tensors(kind):
    """Those of diffusers' state_dict."""
    shapes = [tuple(int(n) for n in shape if n) for shape in recorded(kind)["shapes"]]
    return {name: vae_weights.weight(name, shape) for name, shape in zip(recorded(kind)["names"], shapes, strict=True)}


@functools.cache
def weights(kind):
    """The same as our parameters."""
    return arrange(tensors(kind), jax.eval_shape(make(kind).init, jax.random.key(0)), kind)


def nhwc(x):
    return np.moveaxis(x, 1, -1)


def both(vae, params, kind, tile):
    """Our moments and image, beside diffusers': [(name, ours, theirs)]."""
    size = (vae_weights.TILED_SIZES if tile else vae_weights.SIZES)[kind]
    images, z = (jnp.asarray(nhwc(x), jnp.result_type(float)) for x in vae_weights.inputs(kind, *size))
    moments = jax.jit(functools.partial(vae.encode, tile=tile))(params, images)
    decoded = jax.jit(functools.partial(vae.decode, tile=tile))(params, to_latents(vae.config, z))
    theirs = {name: nhwc(recorded(kind)["tiled_" * tile + name]) for name in ("moments", "image")}
    return [("moments", jnp.concatenate(moments, -1), theirs["moments"]), ("image", decoded, theirs["image"])]


def assert_close(ours, theirs, tolerance, name=""):
    """Both the L2 norm of the difference and its maximum, relative to the reference's own."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    difference = np.abs(ours - theirs)
    assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(theirs), name
    assert difference.max() <= tolerance * np.abs(theirs).max(), name


@pytest.mark.parametrize(
    "kind, dtype, tile",
    [
        ("full", "float32", False),
        ("full", "float32", True),
        ("small", "float32", False),
        ("small", "float32", True),
        ("small", "bfloat16", False),
    ],
)
def test_diffusers_numbers(kind, dtype, tile):
    for name, ours, theirs in both(make(kind, dtype), weights(kind), kind, tile):
        assert ours.dtype == np.float32
        assert_close(ours, theirs, ROUNDINGS[dtype], name)


def test_diffusers_numbers_in_float64():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), weights("small"))
        for name, ours, theirs in both(make("small"), params, "small", False):
            assert ours.dtype == np.float64
            assert_close(ours, theirs, 1e-12, name)


def test_parameters_of_stable_diffusions_vae():
    shapes = jax.eval_shape(make("full").init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_653_863
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_without_attention():
    vae = make("small", mid_block_add_attention=False)
    params = jax.eval_shape(vae.init, jax.random.key(0))
    assert set(params["encoder"]["mid_block"]) == set(params["decoder"]["mid_block"]) == {"resnets_0", "resnets_1"}
    out = jax.eval_shape(vae.decode, params, jax.ShapeDtypeStruct((2, 3, 5, 16), jnp.float32))
    assert out.shape == (2, 6, 10, 3)


def test_scaling():
    config = make("small").config
    z = np.random.default_rng(0).standard_normal((2, 3, 4, 16), np.float32)
    np.testing.assert_allclose(to_latents(config, z), (z - 0.1159) * 0.3611, rtol=0, atol=1e-6)
    np.testing.assert_allclose(from_latents(config, to_latents(config, z)), z, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias, clipped", [(1e3, 20.0), (-1e3, -30.0)])
def test_logvar_is_clipped(bias, clipped):
    vae = make("small")
    params = jax.tree.map(lambda a: a, weights("small"))
    params["encoder"]["conv_out"]["bias"] = params["encoder"]["conv_out"]["bias"] + np.float32(bias)
    mean, logvar = jax.jit(vae.encode)(params, np.zeros((1, 4, 4, 3), np.float32))
    np.testing.assert_array_equal(logvar, clipped)
    assert np.abs(mean).min() > 500


@pytest.mark.parametrize("name, tile", [("encode", False), ("decode", False), ("decode", True)])
def test_sharded_over_the_batch(name, tile):
    vae = make("small")
    shape = {"encode": (16, 20, 12, 3), "decode": (16, 10, 6, 16)}[name]
    x = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    function = functools.partial(getattr(vae, name), tile=tile)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    sharded = jax.jit(function, in_shardings=(everywhere, cut)).lower(weights("small"), x).compile()
    # No device sees another's images, nor holds the whole batch's output.
    assert not any(word in sharded.as_text() for word in ("all-gather", "all-reduce", "collective-permute", "all-to-all"))
    ours = jax.tree.leaves(sharded(weights("small"), jax.device_put(x, cut)))
    for part, whole in zip(ours, jax.tree.leaves(jax.jit(function)(weights("small"), x)), strict=True):
        assert part.sharding.is_equivalent_to(cut, part.ndim)
        # The compiler may sum in another order for another batch.
        assert_close(part, whole, 1e-5)


def test_tiles_need_less_memory():
    vae = make("small")
    params = jax.eval_shape(vae.init, jax.random.key(0))
    for function, shape in ((vae.encode, (1, 384, 12, 3)), (vae.decode, (1, 192, 6, 16))):
        memory = {}
        for tile in (False, True):
            compiled = jax.jit(functools.partial(function, tile=tile)).lower(params, jax.ShapeDtypeStruct(shape, jnp.float32))
            memory[tile] = compiled.compile().memory_analysis().temp_size_in_bytes
        assert memory[True] < 0.3 * memory[False]


def test_small_images_are_not_tiled():
    vae = make("small")
    x = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    params = jax.eval_shape(vae.init, jax.random.key(0))
    texts = {jax.jit(functools.partial(vae.encode, tile=tile)).lower(params, x).as_text() for tile in (False, True)}
    assert len(texts) == 1


def test_config_files():
    """As older diffusers wrote it for Stable Diffusion, lists for tuples and no scaling; and the keys of later ones."""
    config = VaeConfig.from_diffusers(
        {
            "_class_name": "AutoencoderKL",
            "_diffusers_version": "0.4.2",
            "act_fn": "silu",
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "in_channels": 3,
            "latent_channels": 4,
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "out_channels": 3,
            "sample_size": 256,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        }
    )
    assert (config.downsample, config.scaling_factor, config.shift_factor, config.sample_size) == (8, 0.18215, 0.0, 256)
    later = {"force_upcast": True, "latents_mean": None, "latents_std": None, "shift_factor": None, "_name_or_path": "x"}
    assert VaeConfig.from_diffusers(later) == VaeConfig()


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name='AutoencoderTiny'.*only 'AutoencoderKL'"),
        ({"act_fn": "gelu"}, "act_fn='gelu'.*only 'silu'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types=.*only .*'DownEncoderBlock2D'"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types="),
        ({"latents_mean": [0.0] * 16}, r"latents_mean=\[.*not supported"),
        ({"latents_std": [1.0] * 16}, "latents_std="),
        ({"patch_size": 2}, "patch_size=2 is not supported"),
        ({"block_out_channels": [8, 18]}, r"block_out_channels=\(8, 18\).*norm_num_groups=4"),
        ({"layers_per_block": 0}, "layers_per_block=0.*positive"),
        ({"latent_channels": "4"}, "latent_channels='4'.*whole"),
        ({"sample_size": [16, 16]}, r"sample_size=\(16, 16\)"),
        ({"scaling_factor": 0.0}, "scaling_factor=0"),
        ({"scaling_factor": None}, "scaling_factor=None.*number"),
    ],
)
def test_user_errors_name_the_setting(setting, message):
    with pytest.raises(UserError, match=message) as error:
        make("small", **setting)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [[], 64, [64.0]])
def test_user_error_of_widths(value):
    with pytest.raises(UserError, match=r"block_out_channels=.*positive"):
        VaeConfig.from_diffusers({"block_out_channels": value})


def test_user_errors_of_shapes_and_dtypes():
    vae = make("small")
    params = jax.eval_shape(vae.init, jax.random.key(0))
    for shape, message in (((1, 7, 8, 3), "multiples of 2, not 7x8"), ((1, 8, 8, 1), "3 channels.* with 1 channels")):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(vae.encode, params, jax.ShapeDtypeStruct(shape, jnp.float32))
    with pytest.raises(UserError, match="latents of 16 channels, not 4"):
        jax.eval_shape(vae.decode, params, jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.float32))
    with pytest.raises(UserError, match="sample_size=20: tiles must be multiples of 8"):
        tiles = functools.partial(make("small", sample_size=20).encode, tile=True)
        jax.eval_shape(tiles, params, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    with pytest.raises(UserError, match=r"VAE dtype 'float16'.*float32, bfloat16"):
        make("small", "float16")


def test_load_vae_reads_a_directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(vae_weights.CONFIGS["small"]))
    save_file(tensors("small"), tmp_path / "diffusion_pytorch_model.safetensors")
    vae, params = load_vae(str(tmp_path), "bfloat16")
    assert vae.config == make("small").config
    assert vae.dtype == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, params, weights("small"))
