"""The shell that every backbone shares: embed patches, time and label; N blocks in a scan; project back to pixels.

Some tokens may skip the middle blocks, and the tokens between two blocks may be looked at. The parameters are the same then:
they are stacked over the depth, and each part of the depth scans its own slice.
"""

import itertools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from speedit_jax.models import layers
from speedit_jax.models.condition import Condition, mean_token
from speedit_jax.models.layers import dense
from speedit_jax.models.routing import Among, Cell, Route, taken, taken_back
from speedit_jax.models.sprint import Fusion

ACTIVATIONS = ("batch", None, None)  # [B, T, D]

# The name that blocks give what attention or GLA returns: dear to compute, small to keep.
MIXED = "mixed"
_SAVE_MIXED = jax.checkpoint_policies.save_only_these_names(MIXED)

# What the backward pass finds saved of each layer; the rest is computed again.
REMAT_POLICIES = {
    "none": None,  # everything saved: fastest, most memory
    "lean": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the linear layers' outputs
        _SAVE_MIXED,
    ),  # what matrix products made; norms, modulation, activation functions and softmax are computed again
    "full": jax.checkpoint_policies.nothing_saveable,  # only the layer's input: least memory, a third more FLOPs (DiG: 44 %)
}

# (position in the period, grid (rows, columns), cell of which it sees one token each or None) -> the constructor of a block's
# module: name -> module
MakeBlock = Callable[[int, tuple[int, int], Cell | None], Callable[..., nn.Module]]


class Period(nn.Module):
    """Different blocks in a row, repeated down the depth: x [B, T, D] and their conditioning -> (x [B, T, D], None)."""

    make_blocks: tuple[Callable[..., nn.Module], ...]

    @nn.compact
    def __call__(self, x, *conditioning):
        for i, make_block in enumerate(self.make_blocks):
            x, _ = make_block(name=f"block_{i}")(x, *conditioning)
        return x, None


class Backbone(nn.Module):
    """The network.

    Attributes:
      width, depth, patch: D, N and P.
      label_rows: rows of the label table, the null label's included; 0 is without labels.
      text: how text enters: "cross", "pooled" or "" for no text.
      adaln_single: all blocks share one linear layer of the timestep, and each adds a table of its own (PixArt-alpha).
      position_scale: divides positions.
      out_channels: C, or 2C with a learned variance.
      time_freq_shift: of the timestep's frequencies.
      make_block: what the blocks are; wrapped here for remat and scan.
      period: after how many layers the blocks repeat.
      constrain: the activations' sharding.
      scan_unroll: periods per iteration of the scan over depth.
      dtype: of activations and matmul inputs; parameters are float32.
      patch_bottleneck: width of a linear layer without bias between a patch's numbers and the tokens; 0: there is none.
      final_norm: one of layers.NORMS.
      middle: the blocks (first, one after the last) that a route's tokens skip.
      fused: what these return is fused with what they got (sprint.py).
    """

    width: int
    depth: int
    patch: int
    label_rows: int
    text: str
    adaln_single: bool
    position_scale: float
    out_channels: int
    time_freq_shift: int
    make_block: MakeBlock
    period: int
    constrain: layers.Constrain
    scan_unroll: int
    dtype: jnp.dtype
    patch_bottleneck: int = 0
    final_norm: str = "layer"
    middle: tuple[int, int] = (0, 0)
    fused: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        y: Condition,
        route: Route | None = None,
        taps: Sequence[int] = (),
        hint: jax.Array | None = None,
        dropped: jax.Array | bool | None = None,
        fill: Callable[..., jax.Array] | None = None,
    ) -> jax.Array | tuple[jax.Array, list[jax.Array]]:
        """The network's output.

        Args:
          x: [B, H, W, C].
          t: [B].
          y: ignored when unconditional.
          route: the tokens that the middle blocks see; None: all.
          taps: numbers of blocks, rising, after which the tokens are returned, too.
          hint: what is known of x0, [B, H, W, C + 1] as diffusion/masks.py says, of a network that is initialised with it; None:
            nothing, as a hint of zeros.
          dropped: bool [B], the images to which the middle blocks of a fused network add nothing; None: none. True: all, and the
            middle blocks are not computed.
          fill: (the tokens that a route keeps, the route, a block's conditioning) -> all tokens, in place of those that come
            from before the middle blocks.

        Returns:
          [B, H, W, out_channels] float32; with taps a pair, the second the list of the tokens [B, T or fewer, D] at each.
        """
        grid = (x.shape[1] // self.patch, x.shape[2] // self.patch)
        c = layers.TimestepEmbedder(self.width, self.time_freq_shift, self.dtype, name="timestep")(t)
        if self.label_rows:
            c = c + layers.LabelEmbedder(self.label_rows, self.width, self.dtype, name="label")(y)
        conditioning = ()
        if self.text:
            embedder = layers.TextEmbedder(self.width, self.dtype, name="text")
            if self.text == "pooled":
                c = c + embedder(mean_token(y))
            else:
                conditioning = (self.constrain(embedder(y["tokens"]), ACTIVATIONS), y["length"])
        modulation = c
        if self.adaln_single:
            shared = dense((6, self.width), layers.normal_002, ("embed", None, None), (None, None), self.dtype, "adaLN_single")
            modulation = shared(nn.silu(c))

        # [B, T, D]
        tokens = layers.patchify(x, self.patch).astype(self.dtype)
        if self.patch_bottleneck:
            tokens = dense(self.patch_bottleneck, layers.xavier, (None, None), None, self.dtype, "patch_bottleneck")(tokens)
        tokens = dense(self.width, layers.xavier, (None, "embed"), (None,), self.dtype, "patch")(tokens)
        if hint is not None:
            told = layers.patchify(hint, self.patch).astype(self.dtype)
            tokens = tokens + dense(self.width, layers.zeros, (None, "embed"), None, self.dtype, "hint")(told)
        positions = layers.sincos_position_table(*grid, self.width, self.position_scale)
        tokens = self.constrain(tokens + jnp.asarray(positions, self.dtype), ACTIVATIONS)

        make_blocks = tuple(self.make_block(i, grid, None) for i in range(self.period))
        repeats, rest = divmod(self.depth, self.period)
        fuse = Fusion(self.dtype, name="sprint") if self.fused else None
        tapped = []
        if route is not None or taps or (fuse and not self.is_initializing()):
            tokens, tapped = self._in_parts(grid, tokens, (modulation, *conditioning), route, taps, fuse, dropped, fill)
        else:
            if repeats:
                tokens, _ = self._scan(make_blocks, repeats)(tokens, modulation, *conditioning)
            for i in range(rest):
                tokens, _ = make_blocks[i](name=f"rest_{i}")(tokens, modulation, *conditioning)
            if fuse:
                tokens = fuse(tokens, tokens, None, None)

        if self.adaln_single:
            shift, scale = layers.table_adaln(self, c[:, None], 2, "final_table")
        else:
            shift, scale = layers.adaln(c, 2, self.dtype, "final_adaLN")
        tokens = layers.modulated_norm(self.final_norm, "final_norm", tokens, shift, scale)
        features = self.patch**2 * self.out_channels
        tokens = dense(features, layers.zeros, ("embed", None), (None,), self.dtype, "final")(tokens)
        out = layers.unpatchify(tokens, grid, self.patch)
        out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
        return (out, tapped) if taps else out

    def _in_parts(self, grid, tokens, conditioning, route, taps, fuse, dropped, fill) -> tuple[jax.Array, list[jax.Array]]:
        """The blocks, cut where the middle begins and ends and at the taps: (tokens, those at each tap)."""
        first, last = self.middle if route is not None or fuse else (0, 0)
        cuts = sorted({0, first, last, *taps, self.depth})
        tapped, among, before = [], None, None
        for start, end in itertools.pairwise(cuts):
            if start == first < last:
                before = tokens
                if route is not None:
                    tokens, skipping = taken(tokens, route)
                    among = Among(route.order, route.inverse, skipping)
            cell = route.cell if among is not None else None
            blocks = [self.make_block(i, grid, cell)(parent=None) for i in range(self.period)]
            if dropped is not True or not first <= start < last:
                tokens = self._part(blocks, start, end, tokens, conditioning, among)
            tapped += [tokens] * (end in taps)
            if end == last > first:
                if fuse:
                    tokens = fuse(before, tokens, route, dropped)
                elif fill:
                    tokens = fill(tokens, route, *conditioning)
                else:
                    tokens = taken_back(tokens, among.skipping, route)
                among = None
        return self.constrain(tokens, ACTIVATIONS), tapped

    def _part(self, blocks, start, end, tokens, conditioning, among):
        """Blocks `start` to `end` - 1: whole periods in a scan, and single blocks where the part cuts one."""
        params, scanned = self.variables["params"], self.depth // self.period * self.period

        def apply(i, tokens, params):
            return blocks[i % self.period].apply({"params": params}, tokens, *conditioning, among=among)[0]

        def of_period(params, i):
            return params if self.period == 1 else params[f"block_{i}"]

        def one(tokens, params):
            for i in range(self.period):
                tokens = apply(i, tokens, of_period(params, i))
            return tokens, None

        i = start
        while i < end:
            repeats = (min(end, scanned) - i) // self.period if i % self.period == 0 else 0
            if repeats > 0:
                at = i // self.period
                part = jax.tree.map(lambda leaf, at=at, repeats=repeats: leaf[at : at + repeats], params["blocks"])
                tokens, _ = jax.lax.scan(one, tokens, part, unroll=min(self.scan_unroll, repeats))
                i += repeats * self.period
                continue
            if i < scanned:
                of_block = jax.tree.map(lambda leaf, i=i: leaf[i // self.period], of_period(params["blocks"], i % self.period))
            else:
                of_block = params[f"rest_{i - scanned}"]
            tokens = apply(i, tokens, of_block)
            i += 1
        return tokens

    def _scan(self, make_blocks, repeats: int) -> nn.Module:
        """`repeats` periods with their parameters stacked on a leading axis: compile time does not grow with depth."""
        module, arguments = Period, (make_blocks,)
        if self.period == 1:
            module, arguments = make_blocks[0].func, make_blocks[0].args
        scanned = nn.scan(
            module,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=repeats,
            unroll=min(self.scan_unroll, repeats),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(*arguments, name="blocks")


def remat(block: type[nn.Module], policy: str, period: int) -> type[nn.Module]:
    """`block`, of whose activations only what REMAT_POLICIES[policy] says is saved for the backward pass.

    Args:
      period: how many blocks an iteration of the scan over depth holds. Of several that save nothing else, only a barrier keeps
        XLA from computing all again at once and holding them together; elsewhere it would but block fusion.
    """
    if policy == "none":
        return block
    return nn.remat(block, policy=REMAT_POLICIES[policy], prevent_cse=policy == "full" and period > 1)


def remat_part(part: Callable, policy: str, period: int, save_products: bool) -> Callable:
    """A part of a block under `remat`, a function of the block and arrays, which has the same trouble within a block.

    Between its barriers of its own little waits for the backward pass to come to the part: what matrix products made, or, with
    `save_products` false, only what is MIXED, and those products are computed a third time.
    """
    if policy != "full" or period == 1:
        return part
    return nn.remat(part, policy=REMAT_POLICIES["lean"] if save_products else _SAVE_MIXED)
