"""The static model's counts, of programs whose bytes and operations are known by hand."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from benchmarks import gpu_kernels
from benchmarks.gpu import kernels, step_model
from benchmarks.gpu.hlo import parse

STACKED = """
%update (stack: f32[4,8], x: f32[8], i: s32[]) -> f32[4,8] {
  %stack = f32[4,8]{1,0} parameter(0)
  %x = f32[8]{0} parameter(1)
  %i = s32[] parameter(2)
  %y = f32[8]{0} exponential(%x), metadata={op_name="jit(f)/exp"}
  %row = f32[1,8]{1,0} bitcast(%y)
  %zero = s32[] constant(0)
  ROOT %out = f32[4,8]{1,0} dynamic-update-slice(%stack, %row, %i, %zero)
}
%read (stack: f32[4,8], i: s32[]) -> f32[8] {
  %stack = f32[4,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,8]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,8}
  ROOT %out = f32[8]{0} bitcast(%row)
}
%body (carry: (s32[], f32[4,8], f32[8])) -> (s32[], f32[4,8], f32[8]) {
  %carry = (s32[], f32[4,8]{1,0}, f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %stack = f32[4,8]{1,0} get-tuple-element(%carry), index=1
  %x = f32[8]{0} get-tuple-element(%carry), index=2
  %fused = f32[4,8]{1,0} fusion(%stack, %x, %i), kind=kLoop, calls=%update
  %row = f32[8]{0} fusion(%fused, %i), kind=kLoop, calls=%read
  ROOT %next = (s32[], f32[4,8]{1,0}, f32[8]{0}) tuple(%i, %fused, %row)
}
%condition (carry: (s32[], f32[4,8], f32[8])) -> pred[] {
  %carry = (s32[], f32[4,8]{1,0}, f32[8]{0}) parameter(0)
  ROOT %more = pred[] constant(true)
}
ENTRY %main (start: (s32[], f32[4,8], f32[8])) -> (s32[], f32[4,8], f32[8]) {
  %start = (s32[], f32[4,8]{1,0}, /*index=2*/f32[8]{0}) parameter(0)
  ROOT %loop = (s32[], f32[4,8]{1,0}, f32[8]{0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"4"}}
}
"""  # noqa: E501


def test_a_loop_over_a_stack():
    """Of the stack only a row is written and a row read, four times; the two scalars come on top."""
    update, read = kernels.Reader(*_module(STACKED)).kernels("main")
    assert (update.calls, update.reads, update.writes, update.stacked) == (4, 32 + 4, 32, 32)
    assert update.work == kernels.Work(transcendental=8)
    assert (read.calls, read.reads, read.writes, read.stacked) == (4, 32 + 4, 32, 32)
    assert step_model.part(read) == "copies to and from stacks"


def _module(text):
    module, entry = parse(text)
    assert entry == "main"
    return module, {}


def test_products_of_a_compiled_scan():
    """XLA's own text: matrix products forward and backward of five layers, by the closed form."""
    layers, batch, width = 5, 6, 16

    def loss(weights, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
        return (x**2).sum()

    weights, x = jnp.ones((layers, width, width)), jnp.ones((batch, width))
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(weights, x).compile().as_text()
    module, entry = parse(text)
    found = list(kernels.Reader(module, {}).kernels(entry))
    # Forward one product a layer, backward two.
    assert sum(k.calls * k.work.products for k in found) == 3 * layers * 2 * batch * width**2
    assert sum(k.calls * k.stacked for k in found) >= 2 * 4 * layers * batch * width


def test_work_of_a_pallas_kernel():
    """Over its grid, with the turns of its loops and the cheaper one of two branches."""

    def kernel(x_ref, out_ref):
        def turn(i, total):
            return total + jnp.exp(jnp.dot(x_ref[...], x_ref[...]))

        total = jax.lax.fori_loop(0, 3, turn, jnp.zeros((8, 8)))
        # Of a choice the cheaper branch counts.
        more = jax.lax.cond(x_ref[0, 0] > 0, lambda x: jnp.dot(x, x), lambda x: jnp.dot(x, jnp.dot(x, x)), total)
        out_ref[...] = total + more

    spec = pl.BlockSpec((None, 8, 8), lambda i: (i, 0, 0))
    shape = jax.ShapeDtypeStruct((5, 8, 8), jnp.float32)

    @jax.jit
    def call(x):
        return pl.pallas_call(kernel, grid=5, in_specs=[spec], out_specs=spec, out_shape=shape, name="mine")(x)

    work = kernels.handwritten(call.trace(shape).jaxpr.jaxpr)["mine"]
    assert work.products == 5 * (3 + 1) * 2 * 8**3
    assert work.transcendental == 5 * 3 * 8**2


PTX = """
.visible .entry kernel(.param .u64 x)
.reqntid 128
{
	.reg .pred 	%p<3>;
	mov.u32 	%r1, %tid.x;
	@%p1 bra 	$L__short;
$L__loop:
	add.s32 	%r1, %r1, 1;
	mul.lo.s32 	%r2, %r1, 3;
	@%p2 bra 	$L__loop;
	bra.uni 	$L__end;
$L__short:
	add.s32 	%r1, %r1, 2;
$L__end:
	ret;
}
"""


def test_instructions_of_ptx():
    """The short way: mov, bra, add, ret; the long one: the three of the loop six times, and mov, bra, bra, ret."""
    assert gpu_kernels.instructions(PTX, 6) == (4, 3 * 6 + 4)


def test_the_time_of_a_kernel_is_its_slowest_part():
    card = step_model.Card(bandwidth=100.0, products=10.0, vector=1e9, transcendental=1e9, launch=0.5)
    work = kernels.Work(products=20)
    kernel = kernels.Kernel("k", 3, 60, 40, 0, work, {}, frozenset(), None, ("f32",))
    assert step_model.seconds(kernel, card) == 3 * (2.0 + 0.5)
