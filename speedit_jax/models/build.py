"""From config to network: the only door to this package."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from speedit_jax.errors import UserError
from speedit_jax.kernels.gla import choose_gla, gla
from speedit_jax.models import dig, layers
from speedit_jax.models.attention import IMPLEMENTATIONS, attention, choose_attention, chunked_attention, softmax_attention
from speedit_jax.models.backbone import REMAT_POLICIES, Backbone, MakeBlock, remat, remat_part
from speedit_jax.models.condition import TextShape, text_rows
from speedit_jax.models.dit import MLPS, DiTBlock
from speedit_jax.models.flops import cross_attention_flops, mixer_flops, skipped_flops, weights_flops
from speedit_jax.models.masking import Interpolater, make_interpolater
from speedit_jax.models.routing import CELLS, Cell

# backbone -> size -> (width, depth, heads); S to XL are the papers', tiny is for small images and tests.
SIZES = {
    "DiT": {"tiny": (128, 4, 4), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)},
    "DiG": {"tiny": (128, 4, 2), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 18)},
}
PATCHES = (1, 2, 4, 8, 16, 32)
TIME_FREQ_SHIFTS = (0, 1)
TEXT_WAYS = ("cross", "pooled")
TOKEN_METHODS = ("none", "route", "sprint", "mask")
ADALN = ("block", "single")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Model:
    """A network as pure functions.

    Attributes:
      init: key -> parameters, a nested dict of float32 arrays.
      apply: (params, x [B, H, W, C], t [B], y, route=None, taps=(), hint=None, dropped=None, fill=None) -> [B, H, W, C or 2C], as
        Backbone says; y is labels int [B], or text as models/condition.py says.
      axes: like the parameters, with a tuple of logical axis names for each.
      image_shape: (H, W, C).
      num_classes: 0 is unconditional, or conditioned on text.
      null_label: the label that stands for "no class", or None where the model was built without one.
      text: the form of its text; None of a model without text.
      guidable: the model was trained without its condition, too, so that guidance can lead away from that.
      mixer: the implementation of attention, or of DiG's GLA, that was chosen.
      heads, width: for checks against the mesh.
      grid: rows and columns of the tokens that an image is to the network.
      blocks: how many, of a model whose tokens can be looked at between them (`taps`); None of others.
      middle: the blocks (first, one after the last) that a route's tokens skip.
      kept: how many tokens they see in training; None where all blocks see all.
      path_drop: how often an image's middle blocks are dropped in training, of SPRINT (models/sprint.py); None of other networks.
      hinted: it takes what is known of an image, to fill the rest.
      cell: rows and columns of the cells of which they see one token each; None: any tokens.
      forward_flops: of one image, matrix products and filters only, with all tokens in all blocks.
      step_flops: the same of one image in a training step: forward, and twice that backward, in all of its passes.
      dtype: name of the activations' dtype.
      interpolater: of masked training, whose steps have a second pass in which the route's tokens are masked; None of others.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[..., jax.Array]
    axes: Any
    image_shape: tuple[int, int, int]
    num_classes: int
    null_label: int | None
    text: TextShape | None
    guidable: bool
    mixer: str
    heads: int
    width: int
    grid: tuple[int, int]
    blocks: int | None
    middle: tuple[int, int]
    kept: int | None
    path_drop: float | None
    hinted: bool
    cell: Cell | None
    forward_flops: int
    step_flops: int
    dtype: str
    interpolater: Interpolater | None = None

    def sees_all(self, depth: int) -> bool:
        """Whether the tokens after `depth` blocks are all of an image, in the pass of a training step that is tapped."""
        first, last = self.middle
        return self.kept is None or self.interpolater is not None or not first < depth <= last

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def conditions(self, count: int) -> Any:
        """The shapes of the conditions of `count` images."""
        return text_rows(self.text, count) if self.text else jax.ShapeDtypeStruct((count,), jnp.int32)

    def told(self, hint: jax.Array | None) -> "Model":
        """This network with its hint [B, H, W, C + 1] filled in, also for the batches of guidance, of 2B; itself without one."""
        if hint is None:
            return self

        def apply(params, x, t, y, **options):
            return self.apply(params, x, t, y, hint=jnp.tile(hint, (len(x) // len(hint), 1, 1, 1)), **options)

        return dataclasses.replace(self, apply=apply)


def parse_name(name: str) -> tuple[str, str, int]:
    """ "DiT-S/2" -> ("DiT", "S", 2).

    Raises:
      UserError: not a known backbone, size and patch.
    """
    backbone, _, rest = name.partition("-")
    size, _, patch = rest.partition("/")
    if size not in SIZES.get(backbone, ()) or patch not in map(str, PATCHES):
        raise UserError(
            f"unknown model.name {name!r}; it is BACKBONE-SIZE/PATCH with BACKBONE one of {', '.join(SIZES)}, SIZE one of"
            f" {', '.join(SIZES['DiT'])} and PATCH one of {', '.join(map(str, PATCHES))}"
        )
    return backbone, size, int(patch)


def activations_dtype(name: str) -> jnp.dtype | None:
    """Of a name in DTYPES. Under jax_enable_x64, where parameters may be float64, float32 is None: "the parameters' own"."""
    return None if name == "float32" and jax.config.jax_enable_x64 else DTYPES[name]


def _choose(key: str, value: Any, choices) -> Any:
    if value not in choices:
        raise UserError(f"unknown model.{key} {value!r}; choose one of {', '.join(map(str, choices))}")
    return value


def build(
    config: ml_collections.ConfigDict,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    learned_variance: bool,
    platform: str,
    text: TextShape | None = None,
    tokens: ml_collections.ConfigDict | None = None,
    hinted: bool = False,
    constrain: Callable = lambda x, names: x,
    batch_axes=None,
    head_axis=None,
) -> Model:
    """The network of `config`, the config's `model` section.

    Args:
      image_shape: (H, W, C) of images or latents.
      num_classes: 0 is unconditional.
      learned_variance: the network has C more output channels.
      text: the form of the text that conditions it, instead of classes; None is no text.
      platform: "cpu", "gpu" or "tpu": decides what "auto" means.
      tokens: the config's section of that name; None: all blocks see all tokens.
      hinted: it takes what is known of an image.
      constrain: shards activations, given their logical axes; the identity on one device.
      batch_axes, head_axis: the mesh axes of the batch and the heads, for kernels that XLA cannot partition.

    Raises:
      UserError: the parts do not fit each other.
    """
    backbone, size, patch = parse_name(config.name)
    width, depth, heads = SIZES[backbone][size]
    width, depth, heads = config.width or width, config.depth or depth, config.heads or heads
    h, w, c = image_shape
    _check_form(config, backbone, (width, depth, heads), patch, image_shape)
    _check_conditioning(config, text)
    dtype_name = config.dtype
    if dtype_name == "auto":
        dtype_name = "float32" if platform == "cpu" else "bfloat16"
    if dtype_name not in DTYPES:
        raise UserError(f"unknown model.dtype {config.dtype!r}; choose auto, {', '.join(DTYPES)}")
    dtype = activations_dtype(dtype_name)
    mixer = _choose_parts(config, backbone, width // heads, platform, DTYPES[dtype_name])
    num_classes = 0 if text else num_classes
    grid = (h // patch, w // patch)
    middle, kept, cell = _route(tokens, backbone, depth, grid)
    path_drop = tokens.path_drop if tokens is not None and tokens.method == "sprint" else None
    has_null = num_classes > 0 and config.label_dropout > 0

    def network(mixer, constrain, batch_axes, head_axis):
        return Backbone(
            width=width,
            depth=depth,
            patch=patch,
            label_rows=num_classes + has_null,
            text=config.text if text else "",
            adaln_single=config.adaln == "single",
            position_scale=config.position_scale,
            out_channels=c * (2 if learned_variance else 1),
            time_freq_shift=config.time_freq_shift,
            make_block=_blocks(backbone, config, heads, mixer, constrain, batch_axes, head_axis, dtype),
            period=len(dig.ORDERS[config.directions]) if backbone == "DiG" else 1,
            constrain=constrain,
            scan_unroll=config.scan_unroll,
            dtype=dtype,
            patch_bottleneck=config.patch_bottleneck,
            middle=middle,
            fused=path_drop is not None,
            final_norm=config.norm if backbone == "DiT" else "layer",  # DiG's is layer in the published code
        )

    # One image, which no mesh divides, and no kernel: the initial values do not depend on either.
    plain, sharded = network("xla", lambda x, names: x, None, None), network(mixer, constrain, batch_axes, head_axis)

    def boxed_init(key):
        x = jnp.zeros((1, *image_shape))
        y = text_rows(text, 1) if text else jax.ShapeDtypeStruct((1,), jnp.int32)
        y = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), y)
        hint = jnp.zeros((1, h, w, c + 1)) if hinted else None
        return plain.init(key, x, jnp.zeros((1,), jnp.int32), y, hint=hint)["params"]

    boxes = jax.eval_shape(boxed_init, jax.random.key(0))
    shapes, count = nn.meta.unbox(boxes), grid[0] * grid[1]
    text_tokens = text.length if text and config.text == "cross" else 1
    forward = weights_flops(shapes, count, text_tokens) + mixer_flops(backbone, count, width, depth, heads)
    skipped = 0 if kept is None else skipped_flops(backbone, shapes, count, kept, middle[1] - middle[0], (width, depth, heads))
    if text and config.text == "cross":
        forward += cross_attention_flops(count, text_tokens, width, depth)
        if kept is not None:
            skipped += cross_attention_flops(count - kept, text_tokens, width, middle[1] - middle[0])
    step, interpolater = forward - skipped, None
    if tokens is not None and tokens.method == "mask":
        interpolater = make_interpolater(plain, sharded, grid, text)
        side = jax.eval_shape(interpolater.init, jax.random.key(0))
        step += forward + weights_flops(side, count, text_tokens) + mixer_flops(backbone, count, width, 1, heads)
        if text and config.text == "cross":
            step += cross_attention_flops(count, text_tokens, width, 1)
    return Model(
        init=lambda key: nn.meta.unbox(boxed_init(key)),
        apply=lambda params, x, t, y, **options: sharded.apply({"params": params}, x, t, y, **options),
        axes=jax.tree.map(lambda box: tuple(box.names), boxes, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)),
        image_shape=image_shape,
        num_classes=num_classes,
        null_label=num_classes if has_null else None,
        text=text,
        guidable=has_null or (text is not None and config.label_dropout > 0),
        mixer=mixer,
        heads=heads,
        width=width,
        grid=grid,
        blocks=depth if backbone == "DiT" else None,
        middle=middle,
        kept=kept,
        path_drop=path_drop,
        hinted=hinted,
        cell=cell,
        forward_flops=forward,
        step_flops=3 * step,
        dtype=dtype_name,
        interpolater=interpolater,
    )


def _check_form(config, backbone: str, form: tuple[int, int, int], patch: int, image_shape: tuple[int, int, int]) -> None:
    """Raises a UserError for a network of `form`, width, depth and heads, that cannot be."""
    width, depth, heads = form
    for key, value in (("width", width), ("depth", depth), ("heads", heads), ("mlp_ratio", config.mlp_ratio)):
        if value <= 0:
            raise UserError(f"model.{key}={value}: must be positive")
    if int(width * config.mlp_ratio) < 2:  # of which SwiGLU takes two thirds
        raise UserError(f"model.mlp_ratio={config.mlp_ratio}: leaves nothing of the MLP's hidden width at a width of {width}")
    h, w, _ = image_shape
    if h % patch or w % patch:
        raise UserError(f"model.name={config.name!r} needs images whose sides are multiples of {patch}, not {h}x{w}")
    multiple = 2 * heads if backbone == "DiG" else heads
    if width % multiple or width % 4:
        raise UserError(f"model width {width} with {heads} heads: {backbone} wants a multiple of 4 and of {multiple}")
    _choose("remat", config.remat, REMAT_POLICIES)
    _choose("time_freq_shift", config.time_freq_shift, TIME_FREQ_SHIFTS)
    if not 0 <= config.label_dropout < 1:
        raise UserError(f"model.label_dropout={config.label_dropout}: must lie in [0, 1)")
    if config.patch_bottleneck < 0:
        raise UserError(f"model.patch_bottleneck={config.patch_bottleneck}: must be 0, for none, or a width")
    if not 1 <= config.scan_unroll <= depth:
        raise UserError(f"model.scan_unroll={config.scan_unroll}: must lie in 1..{depth}, the model's depth")


def _choose_parts(config, backbone: str, head_width: int, platform: str, dtype) -> str:
    """The mixer, when the other parts of a block are what the backbone has."""
    _choose("norm", config.norm, layers.NORMS)
    _choose("mlp", config.mlp, MLPS)
    if backbone == "DiG":
        if config.rope or config.mlp != "gelu":
            raise UserError("model.rope and model.mlp are for DiT: DiG has no attention, and its MLP is a SwiGLU")
        _choose("attention", config.attention, IMPLEMENTATIONS)  # of its cross-attention to text, which chunked changes
        _choose("convolution", config.convolution, dig.CONVOLUTIONS)
        _choose("directions", config.directions, dig.ORDERS)
        return choose_gla(config.gla, platform)
    if config.rope and head_width % 4:
        raise UserError(f"model.rope wants heads whose width is a multiple of 4, not {head_width}")
    return choose_attention(config.attention, platform, dtype, head_width)


def _check_conditioning(config: ml_collections.ConfigDict, text: TextShape | None) -> None:
    _choose("text", config.text, TEXT_WAYS)
    _choose("adaln", config.adaln, ADALN)
    if not config.position_scale > 0:
        raise UserError(f"model.position_scale={config.position_scale}: must be positive")
    if text and text.pooled and config.text == "cross":
        raise UserError("model.text=cross needs the tokens of each caption, and data.text has one vector for each: use pooled")


def _route(
    tokens: ml_collections.ConfigDict | None, backbone: str, depth: int, grid: tuple[int, int]
) -> tuple[tuple[int, int], int | None, Cell | None]:
    """The middle blocks, how many tokens of `grid` they see, and their cell; None for both of these where that is all tokens.

    Without a route the middle is (0, 0).

    Raises:
      UserError: there is no such route.
    """
    if tokens is None or tokens.method == "none":
        return (0, 0), None, None
    if tokens.method not in TOKEN_METHODS:
        raise UserError(f"unknown tokens.method {tokens.method!r}; choose one of {', '.join(TOKEN_METHODS)}")
    if tokens.method == "mask" and backbone == "DiG":
        raise UserError("tokens.method=mask is for DiT: DiG's convolution would have to fill the masked tokens in each block")
    start, tail, rate = tokens.start, tokens.tail, tokens.rate
    if tokens.method == "mask":
        start = 0
        if not 1 <= tail < depth:
            raise UserError(f"tokens.tail={tail}: must be at least 1 and leave blocks before it, of {depth}")
    elif start < 1 or tail < 1 or start + tail >= depth:
        raise UserError(
            f"tokens.start={start}, tokens.tail={tail}: both must be at least 1 and leave blocks between them, of {depth}"
        )
    middle = start, depth - tail
    if tokens.method == "sprint":
        if not 0 <= tokens.path_drop < 1:
            raise UserError(f"tokens.path_drop={tokens.path_drop}: must lie in [0, 1)")
        if rate == 0:
            return middle, None, None
    if tokens.pattern not in ("random", "cells"):
        raise UserError(f"unknown tokens.pattern {tokens.pattern!r}; choose random or cells")
    if tokens.pattern == "random" and backbone == "DiG":
        raise UserError("tokens.pattern=random is for DiT: DiG's scans need a grid of tokens; choose tokens.pattern=cells")
    count = grid[0] * grid[1]
    kept = count - int(rate * count)
    if not 0 < rate < 1 or kept == count:
        raise UserError(f"tokens.rate={rate}: must be between 0 and 1, and at least one of the {count} tokens must skip")
    return middle, kept, _cell(rate, grid) if tokens.pattern == "cells" else None


def _cell(rate: float, grid: tuple[int, int]) -> Cell:
    if rate not in CELLS:
        raise UserError(f"tokens.rate={rate}: tokens.pattern=cells is for {' and '.join(map(str, CELLS))}")
    cell = CELLS[rate]
    if grid[0] % cell[0] or grid[1] % cell[1]:
        raise UserError(f"tokens.rate={rate}: the grid of {grid[0]} x {grid[1]} tokens has no cells of {cell[0]} x {cell[1]}")
    return cell


def _blocks(backbone, config, heads, mixer, constrain, batch_axes, head_axis, dtype) -> MakeBlock:
    """What layer i of a period is."""
    cross = chunked_attention if config.attention == "chunked" else softmax_attention

    def dit_block(i, grid, cell):
        del i, cell

        def attend(q, k, v):
            return attention(q, k, v, mixer, batch_axes, head_axis)

        block, rope = remat(DiTBlock, config.remat, 1), grid if config.rope else None
        arguments = (heads, config.mlp_ratio, config.qk_norm, attend, cross, constrain, dtype, config.mlp, config.norm, rope)
        return functools.partial(block, *arguments)

    def dig_block(i, grid, cell):
        op = functools.partial(gla, implementation=mixer, batch_axes=batch_axes, head_axis=head_axis)
        order, period = dig.ORDERS[config.directions][i], len(dig.ORDERS[config.directions])
        block = remat(dig.DiGBlock, config.remat, period)
        part = functools.partial(remat_part, policy=config.remat, period=period)
        arguments = (heads, grid, order, config.norm, config.convolution, op, cross, part, constrain, dtype)
        return functools.partial(block, *arguments, cell or (1, 1))

    return {"DiT": dit_block, "DiG": dig_block}[backbone]
