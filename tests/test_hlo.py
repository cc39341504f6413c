"""Collectives read from compiled text: counted as often as they run, bytes as a ring moves them."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from cabochon.hlo import Collective, collectives


def compiled(fn, *shapes, groups=8):
    mesh = jax.make_mesh((8 // groups, groups), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    inner = jax.shard_map(fn, mesh=mesh, in_specs=Spec("b"), out_specs=Spec(None), check_vma=False)
    args = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, Spec("b"))) for s in shapes]
    return jax.jit(inner).lower(*args).compile().as_text()


def found(fn, shape=(64, 16), groups=8):
    return collectives(compiled(fn, shape, groups=groups))


SIZE = 64 * 16 * 4
"""bytes of the whole array"""


def test_a_gather_moves_what_the_others_hold():
    gather = lambda x: lax.all_gather(x, "b", tiled=True)  # noqa: E731
    assert found(gather) == [Collective("all-gather", 1, SIZE * 7 // 8)]
    assert found(gather, groups=4) == [Collective("all-gather", 1, SIZE * 3 // 4)]


def test_a_reduction_moves_twice_and_a_scattered_one_once():
    part = SIZE // 8
    assert found(lambda x: lax.psum(x, "b")) == [Collective("all-reduce", 1, 2 * part * 7 // 8)]
    scattered = found(lambda x: lax.psum_scatter(x, "b", tiled=True))
    assert scattered == [Collective("reduce-scatter", 1, part * 7 // 8)]


def test_a_loop_of_known_length_counts_every_turn():
    def body(x):
        return lax.scan(lambda c, _: (c + lax.psum(c * c, "b"), None), x, length=5)[0]

    assert found(body) == [Collective("all-reduce", 5, 5 * 2 * (SIZE // 8) * 7 // 8)]


def test_loops_in_loops_multiply():
    def outer(x):
        def turn(c, _):
            return lax.scan(lambda c, _: (c + lax.psum(c * c, "b"), None), c, length=3)[0], None

        return lax.scan(turn, x, length=5)[0]

    assert found(outer)[0].runs == 15


def test_a_loop_that_the_run_ends_counts_once():
    def until(x):
        return lax.while_loop(lambda c: c.sum() < 1e6, lambda c: c + lax.psum(c * c, "b"), x)

    assert found(until)[0].runs == 1


def test_a_program_without_collectives():
    assert found(lambda x: (x * 2).sum(keepdims=True)) == []


TPU = """
%cond (p: (s32[], bf16[16])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(48)
  %p = (s32[]{:T(128)}, bf16[16]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit.1), direction=LT, metadata={op_name="while/cond/lt"}
}
%all-reduce-scatter.2.clone (input: bf16[16,768,2048]) -> bf16[16,768,256] {
  %input = bf16[16,768,2048]{2,1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.7 = bf16[16,768,2048]{2,1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups=[8,8]<=[8,8]T(1,0)
  ROOT %slice = bf16[16,768,256]{2,1,0} dynamic-slice(%all-reduce.7), dynamic_slice_sizes={16,768,256}
}
%body (p: (s32[], bf16[16])) -> (s32[], bf16[16]) {
  %p = (s32[]{:T(128)}, bf16[16]{0:T(128)}) parameter(0)
  %fusion.1 = bf16[16,768,256]{2,1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2.clone
  %ag = bf16[8,4]{1,0} all-gather(%y), replica_groups=mesh['axis_0'=8,'axis_1'=8], device_ids=([8,8]T(1,0)) {'axis_1'}
  %start = (bf16[1,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%y), replica_groups={{0,1,2,3,4,5,6,7}}
  %done = bf16[8,4]{1,0} all-gather-done(%start)
}
ENTRY %main (a: bf16[16]) -> bf16[16] {
  %w = (s32[]{:T(128)}, bf16[16]{0:T(128)}) while(%t), condition=%cond, body=%body, metadata={op_name="jit(step)"}
}
"""
"""As libtpu 0.0.42 writes it, shortened."""


def test_the_compiler_for_tpu_writes_loops_and_fused_reductions_its_own_way():
    whole = 16 * 768 * 2048 * 2
    assert collectives(TPU) == [
        Collective("all-gather", 96, 96 * 64 * 7 // 8),
        Collective("reduce-scatter", 48, 48 * whole * 7 // 8),
    ]


def test_groups_that_cannot_be_read_are_not_guessed():
    broken = TPU.replace("replica_groups=[8,8]<=[8,8]T(1,0)", "replica_groups=new_form")
    with pytest.raises(ValueError, match="replica groups cannot be read"):
        collectives(broken)
