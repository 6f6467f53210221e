"""What a compiled program exchanges, read off its text."""

import jax
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from speedit_jax.training import traffic


def test_collectives_are_read_off_the_program():
    text = """
      %a = bf16[8,128]{1,0} all-gather(%p), dimensions={0}
      %b = (f32[4]{0}, f32[2,2]{1,0}) all-reduce-start(%x, %y), to_apply=%add
      %c = f32[4]{0} all-reduce-done(%b)
      %d = f32[] all-reduce(%z), to_apply=%add
      %e = f32[16]{0} add(%all-reduce.1, %q)
      %f = (f32[2]{0}, f32[8]{0}) all-gather-start(%r), dimensions={0}
      %g = ((bf16[1,3]{1,0}, f32[2]{0}), (bf16[4,3]{1,0}, f32[8]{0})) all-gather-start(%r, %s), dimensions={0}
      %h = (pred[5]{0}, pred[5]{0}, u32[], u32[]) collective-permute-start(%t)
    """
    assert list(traffic.collectives(text)) == [
        ("all-gather", [("bf16", (8, 128))]),
        ("all-reduce", [("f32", (4,)), ("f32", (2, 2))]),
        ("all-reduce", [("f32", ())]),
        ("all-gather", [("f32", (8,))]),
        ("all-gather", [("bf16", (4, 3)), ("f32", (8,))]),
        ("collective-permute", [("pred", (5,))]),
    ]


def compiled(unroll: int) -> str:
    """A scan over 6 layers of which each gathers its weights, 64 x 64 of float32 in eighths."""
    mesh = tiny.make_mesh((1, 8, 1))

    def network(weights, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights, unroll=unroll)[0]

    shardings = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P("fsdp"))
    shapes = (
        jax.ShapeDtypeStruct(shape, "float32", sharding=s) for shape, s in zip(((6, 64, 64), (8, 64)), shardings, strict=True)
    )
    return jax.jit(network, out_shardings=shardings[1]).lower(*shapes).compile().as_text()


@pytest.mark.parametrize("unroll", [1, 2, 6])
def test_a_loop_counts_as_often_as_it_runs(unroll):
    found = traffic.traffic(compiled(unroll))
    assert set(found) == {"all-gather"} and found["all-gather"] == {"count": 6, "bytes": 6 * 64 * 64 * 4}, found


TPU = """
%loop_cond (p: (s32[], bf16[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %p = (s32[]{:T(128)}, bf16[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%piece.1 (a: bf16[4]) -> bf16[8] {
  %all-gather.1 = bf16[8]{0} all-gather(%a), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}

%piece.2 (a: bf16[4]) -> bf16[8] {
  %all-gather.2 = bf16[8]{0} all-gather(%a), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}

%all-reduce-scatter.3 (a: bf16[16]) -> bf16[8] {
  %all-reduce.4 = bf16[16]{0} all-reduce(%a), channel_id=9, replica_groups={{0,1}}, to_apply=%add
}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  ROOT %sum = bf16[] add(%a, %b)
}

%loop_body (p: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %start = (bf16[4], bf16[8]) fusion(%x), kind=kCustom, calls=%piece.1
  %done = bf16[8] fusion(%start), kind=kCustom, calls=%piece.2
  %send.1 = (bf16[3,8]{1,0}, u32[], token[]) send(%y, %t), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}

ENTRY %main (a: bf16[16]) -> bf16[8] {
  %first = s32[]{:T(128)} constant(1)
  %copy.1 = s32[]{:T(128)} copy(%first)
  %tuple.1 = (s32[]{:T(128)}, bf16[8]{0}) tuple(%copy.1, %a)
  %while.1 = (s32[]{:T(128)}, bf16[8]{0}) while(%tuple.1), condition=%loop_cond, body=%loop_body
  %scatter = bf16[8]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3
  %native = bf16[8]{0} reduce-scatter(%a), channel_id=10, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}
"""


def test_text_of_a_tpu():
    """The loop's counter runs from 1 to 4; the pieces of one asynchronous collective are one."""
    assert traffic.traffic(TPU) == {
        "all-gather": {"count": 4, "bytes": 4 * 16},
        traffic.BETWEEN_SLICES: {"count": 4, "bytes": 4 * 48},
        "reduce-scatter": {"count": 2, "bytes": 32 + 4 * 16},
    }
