"""What plans read from compiled programs: products, traffic, collectives and groups of devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mora_jax.planning import compiled, topologies
from mora_jax.planning.groups import first_group, spread
from mora_jax.planning.hlo import Reader, Tally, Transfer


def tally(function: Callable, *shapes: tuple[int, ...], open_trips: int = 1, per_host: int = 8) -> Any:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Reader(jax.jit(function).lower(*arguments).compile().as_text(), open_trips, per_host).tally()


def test_products_in_loops_count_as_often_as_they_run():
    def layers(x, weights):
        def layer(x, w):
            return jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y @ w), x), None

        return jax.lax.scan(layer, x, weights)[0]

    assert tally(layers, (4, 64), (5, 64, 64)).flops == 5 * 3 * 2 * 4 * 64 * 64


def test_a_loop_of_unknown_length_runs_as_often_as_is_said():
    def until(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 10.0, lambda x: x @ w, x)

    found = [tally(until, (4, 64), (64, 64), open_trips=trips).flops for trips in (1, 7)]
    assert found == [2 * 4 * 64 * 64, 7 * 2 * 4 * 64 * 64]


def test_traffic_of_scanned_weights_is_their_slices():
    """Ten layers read each weight once, not ten times the stack."""

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    weights = 10 * 256 * 256 * 4
    assert weights < tally(layers, (2, 256), (10, 256, 256)).bytes < 3.5 * weights


CODED = """\
HloModule m

%t8 (t: s8[10,64,64]) -> s8[10,64,64] {
  %t = s8[10,64,64]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %again = s8[10,64,64]{2,1,0:T(8,128)(4,1)} copy(%t)
}

%fused (w: s8[10,64,64], i: s32[]) -> s8[1,64,64] {
  %w = s8[10,64,64]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %same = s8[10,64,64]{2,1,0} fusion(%w), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%t8
  ROOT %one = s8[1,64,64]{2,1,0:S(1)} dynamic-slice(%same, %i, %zero, %zero), dynamic_slice_sizes={1,64,64}
}

ENTRY %main (w: s8[10,64,64], i: s32[]) -> s8[1,64,64] {
  %w = s8[10,64,64]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[]{:S(2)} parameter(1)
  ROOT %one = s8[1,64,64]{2,1,0:S(1)} fusion(%w, %i), kind=kLoop, calls=%fused
}
"""


def test_of_int8_weights_that_are_renamed_before_they_are_sliced_the_slice_is_read():
    assert Reader(CODED, open_trips=1, per_host=1).tally().bytes == 64 * 64


TPU_LOOP = """\
HloModule m

%async_collective_fusion.1 (a: bf16[64,256], b: bf16[256,256], x: bf16[8,256]) -> (bf16[8,256], bf16[256,256]) {
  %a = bf16[64,256]{1,0} parameter(0)
  %b = bf16[256,256]{1,0} parameter(1)
  %x = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %g = bf16[256,256] all-gather(%a), channel_id=7, replica_groups=mesh['a'=4,'b'=1] {'a'}, dimensions={0}
  %y = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} negate(%x)
  ROOT %piece = (bf16[8,256]{1,0:T(8,128)(2,1)S(1)}, bf16[256,256]{1,0}) tuple(%y, %g)
}

%body (p: (u32[], bf16[8,256], bf16[64,256], bf16[256,256])) -> (u32[], bf16[8,256], bf16[64,256], bf16[256,256]) {
  %p = (u32[]{:T(128)}, bf16[8,256]{1,0}, bf16[64,256]{1,0}, bf16[256,256]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %w = bf16[64,256]{1,0} get-tuple-element(%p), index=2
  %all = bf16[256,256]{1,0} get-tuple-element(%p), index=3
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  %there = (bf16[8,256], bf16[8,256]) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %done = bf16[8,256]{1,0} collective-permute-done(%there)
  %on = (bf16[8,256]{1,0:S(1)}, bf16[256,256]) fusion(%w, %all, %x), kind=kOutput, calls=%async_collective_fusion.1
  ROOT %t = (u32[], bf16[8,256], bf16[64,256], bf16[256,256]) tuple(%next, %done, %w, %all)
}

%condition (q: (u32[], bf16[8,256], bf16[64,256], bf16[256,256])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %q = (u32[]{:T(128)}, bf16[8,256]{1,0}, bf16[64,256]{1,0}, bf16[256,256]{1,0}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

%begin (c: bf16[64,256]) -> (bf16[64,256], bf16[256,256]) {
  %c = bf16[64,256]{1,0} parameter(0)
  %h = bf16[256,256] all-gather(%c), channel_id=7, replica_groups=mesh['a'=4,'b'=1] {'a'}, dimensions={0}
  ROOT %s = (bf16[64,256], bf16[256,256]) custom-call(%h), custom_call_target="AsyncCollectiveStart"
}

%end (d: bf16[64,256], e: bf16[256,256]) -> bf16[256,256] {
  %d = bf16[64,256]{1,0} parameter(0)
  %e = bf16[256,256]{1,0} parameter(1)
  %k = bf16[256,256] all-gather(%d), channel_id=7, replica_groups=mesh['a'=4,'b'=1] {'a'}, dimensions={0}
  ROOT %f = bf16[256,256]{1,0} custom-call(%d, %e, %k), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (w0: bf16[64,256], state: (u32[], bf16[8,256], bf16[64,256], bf16[256,256])) -> bf16[256,256] {
  %w0 = bf16[64,256]{1,0} parameter(0)
  %state = (u32[], bf16[8,256], bf16[64,256], bf16[256,256]) parameter(1)
  %left = f32[2,3,4]{2,1,0:S(1)} parameter(2)
  %right = f32[2,5,4]{2,1,0:S(1)} parameter(3)
  %start = (bf16[64,256], bf16[256,256]) fusion(%w0), kind=kCustom, calls=%begin
  %c0 = f32[2,3,5]{2,1,0:S(1)} convolution(%left, %right), window={size=2 lhs_dilate=2}, dim_labels=0bf_0oi->0bf
  %loop = (u32[], bf16[8,256], bf16[64,256], bf16[256,256]) while(%state), condition=%condition, body=%body
  %rest = bf16[256,256]{1,0} get-tuple-element(%loop), index=3
  ROOT %r = bf16[256,256]{1,0} fusion(%w0, %rest), kind=kCustom, calls=%end
}
"""


def test_the_manner_of_the_tpu_compiler_is_understood():
    """A loop in steps of two without a noted length, one gather that goes on in it, a batch axis as a window."""
    found = Reader(TPU_LOOP, open_trips=99, per_host=4).tally()
    permutes, gathers = found.collectives["collective-permute"], found.collectives["all-gather"]
    assert (permutes.count, permutes.bytes, permutes.far) == (4, 4 * 8 * 256 * 2, 0)
    assert (gathers.count, gathers.bytes) == (1, 3 * 64 * 256 * 2)
    # Once the gathered array, four times 4 KiB of a permute and a counter; what lies in fast memory is free.
    assert found.bytes == 2 * 256 * 256 + 4 * (2 * 8 * 256 + 3 * 4)
    assert found.flops == 2 * 2 * 3 * 5 * 4  # both rows of the window axis meet one row of the kernel
    # Of two hosts with two of the four devices each: a device fetches one of the two pieces that its host has not got.
    assert Reader(TPU_LOOP, open_trips=99, per_host=2).tally().collectives["all-gather"].far == 64 * 256 * 2


KERNELS = """\
HloModule m

ENTRY %main (x: bf16[128,32], k: f32[64,32]) -> bf16[128,32] {
  %x = bf16[128,32]{1,0} parameter(0)
  %k = f32[64,32]{1,0} parameter(1)
  %a = bf16[128,32]{1,0} custom-call(%x, %k), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/pallas_call"}, backend_config={"flag_configs":[],"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"100","transcendentals":"7","bytes_accessed":"9"}}}
  %b = bf16[128,32]{1,0} custom-call(%a), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/while/body/flops=20/forward_kernel/pallas_call"}, backend_config={ir = "ML"}
  ROOT %c = bf16[128,32]{1,0} custom-call(%b), custom_call_target="Sharding", metadata={op_name="jit(step)/flops_of"}
}
"""  # noqa: E501


def test_products_of_kernels_are_those_that_they_say():
    found = Reader(KERNELS, open_trips=1, per_host=1).tally()
    assert found.flops == 100 + 20
    assert found.bytes == 6 * 128 * 32 * 2 + 64 * 32 * 4  # read and written once


CHAIN = """\
HloModule m

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%sum
  ROOT %z = f32[8]{0} all-reduce(%y), replica_groups={{0,1}}, to_apply=%sum
}
"""


@pytest.mark.parametrize(("channels", "count"), [("", 2), ("channel_id=5, ", 1)])
def test_only_collectives_of_one_channel_are_the_same(channels, count):
    text = CHAIN.replace("replica_groups", f"{channels}replica_groups")
    found = Reader(text, open_trips=1, per_host=2).tally().collectives["all-reduce"]
    assert (found.count, found.bytes) == (count, count * 8 * 4)


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [0, 1]),
        ("replica_groups=[2,4]<=[8], x", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [0, 4]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, x", [0, 1, 2, 3]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x", [0, 4]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [0, 2]),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}, x", [0, 4]),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}, x", [0, 1, 2, 3]),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, x", [3, 0]),
    ],
)
def test_groups_of_devices(written, group):
    assert first_group(f"channel_id=3, {written}") == group
    hosts = [device // 2 for device in group]
    assert spread(written, per_host=2) == (len(group), min(map(hosts.count, hosts)))


HOSTS = """\
HloModule m

ENTRY %main (x: f32[96]) -> f32[1152] {
  %x = f32[96]{0} parameter(0)
  %permuted = f32[96]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,11},{11,0}}
  %exchanged = f32[96]{0} all-to-all(%permuted), channel_id=2, replica_groups=GROUPS, dimensions={0}
  %part = f32[8]{0} reduce-scatter(%exchanged), channel_id=3, replica_groups=GROUPS, dimensions={0}, to_apply=%sum
  %sum = f32[96]{0} all-reduce(%exchanged), channel_id=4, replica_groups=GROUPS, to_apply=%sum
  ROOT %all = f32[1152]{0} all-gather(%sum), channel_id=5, replica_groups=GROUPS, dimensions={0}
}
"""


# Three hosts of four devices. Over all twelve, a device's own adapter brings: of a gather one of the four pieces of
# each other host; of a scatter its sum's quarter, of which two hosts keep a third each; of a reduction both. With one
# member on each host nobody shares; with all members on one host nothing leaves it.
@pytest.mark.parametrize(
    ("groups", "received", "far"),
    [
        ("[1,12]<=[12]", (11 * 384, 384 * 11 / 12, 2 * 384 * 11 / 12), (2 * 384, 384 / 4 * 2 / 3, 2 * 384 / 4 * 2 / 3)),
        ("[4,3]<=[3,4]T(1,0)", (2 * 384, 256, 512), (2 * 384, 256, 512)),
        ("[3,4]<=[12]", (3 * 384, 288, 576), (0, 0, 0)),
    ],
)
def test_devices_of_a_host_share_what_comes_from_other_hosts(groups, received, far):
    found = Reader(HOSTS.replace("GROUPS", groups), open_trips=1, per_host=4).tally().collectives
    kinds = [found[kind] for kind in ("all-gather", "reduce-scatter", "all-reduce")]
    assert [kind.bytes for kind in kinds] == pytest.approx(received)
    assert [kind.far for kind in kinds] == pytest.approx(far)
    assert found["collective-permute"].far == found["collective-permute"].bytes == 384
    assert found["all-to-all"].far == (found["all-to-all"].bytes if any(far) else 0)


def test_the_slower_of_two_networks_bounds_a_step():
    aim = topologies.target("h100:4x8")
    for far, seconds in ((1e9, 1e9 / aim.chip.far), (1e6, (1e9 - 1e6) / aim.chip.network)):
        costs = compiled._costs(Tally(1.0, 1.0, {"all-gather": Transfer(1, 1e9, far)}), aim)
        assert costs["seconds"]["network"] == pytest.approx(seconds)
        assert costs["bound"] == "network"


def test_groups_that_are_written_in_no_known_form_are_not_passed_over():
    with pytest.raises(ValueError, match="no groups"):
        first_group("replica_groups=somehow")
