"""Collectives of hand-written programs, with hand-counted bytes."""

from __future__ import annotations

import pytest

from gpt2_jax.plan.communication.collectives import Collective, find_collectives
from gpt2_jax.plan.communication.hlo import array_bytes
from gpt2_jax.plan.errors import PlanError

ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def entry(*lines: str, before: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule step, is_scheduled=true\n{ADD}{before}\nENTRY %main (x: f32[8,6]) -> f32[8,6] {{\n{body}\n}}\n"


def found(*lines: str, before: str = "", slices: tuple[int, ...] = (0,) * 8) -> tuple[Collective, ...]:
    result = find_collectives(entry("%x = f32[8,6]{1,0} parameter(0)", *lines, before=before), slices)
    assert result.uncounted_loops == ()
    return result.instructions


def only(*lines: str, before: str = "", slices: tuple[int, ...] = (0,) * 8) -> Collective:
    [one] = found(*lines, before=before, slices=slices)
    return one


def test_array_bytes_depend_on_the_dtype() -> None:
    assert array_bytes("f32[8,6]{1,0:T(8,128)}") == 192
    assert array_bytes("(bf16[3]{0}, pred[5], s4[3], f8e4m3fn[2], u32[])") == 6 + 5 + 2 + 2 + 4
    assert array_bytes("token[]") == 0


# The operand is 8 x 6 floats, 192 bytes, and groups have four devices.
IN_GROUPS_OF_FOUR = "replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true"
SENT = {
    "all-reduce": (f"f32[8,6]{{1,0}} all-reduce(%x), {IN_GROUPS_OF_FOUR}, to_apply=%add", 2 * 192 * 3 / 4),
    "all-gather": (f"f32[32,6]{{1,0}} all-gather(%x), {IN_GROUPS_OF_FOUR}, dimensions={{0}}", 192 * 3),
    "reduce-scatter": (f"f32[2,6]{{1,0}} reduce-scatter(%x), {IN_GROUPS_OF_FOUR}, to_apply=%add", 192 * 3 / 4),
    "all-to-all": (f"f32[8,6]{{1,0}} all-to-all(%x), {IN_GROUPS_OF_FOUR}, dimensions={{0}}", 192 * 3 / 4),
    "collective-permute": ("f32[8,6]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,0}}", 192),
}


@pytest.mark.parametrize("kind", SENT)
def test_sent_bytes_are_those_of_a_ring_algorithm(kind: str) -> None:
    text, sent = SENT[kind]
    one = only(f"ROOT %y = {text}")
    assert (one.kind, one.operands, one.count, one.sent_bytes) == (kind, ("f32[8,6]",), 1, sent)


def test_asynchronous_collectives_count_once() -> None:
    gather = only(
        f"%s = (f32[8,6]{{1,0}}, f32[32,6]{{1,0}}) all-gather-start(%x), {IN_GROUPS_OF_FOUR}, dimensions={{0}}",
        "ROOT %y = f32[32,6]{1,0} all-gather-done(%s)",
    )
    assert (gather.kind, gather.sent_bytes) == ("all-gather", 576)
    permute = only(
        "%s = (f32[8,6], f32[8,6], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=2, "
        "source_target_pairs={{0,1},{1,0}}",
        "ROOT %y = f32[8,6] collective-permute-done(%s)",
    )
    assert (permute.kind, permute.sent_bytes) == ("collective-permute", 192)
    inside = "\n%inner (p: f32[8,6]) -> f32[32,6] {\n  %p = f32[8,6] parameter(0)\n  ROOT %g = f32[32,6] "
    inside += f"all-gather(%p), {IN_GROUPS_OF_FOUR}, dimensions={{0}}\n}}\n"
    wrapped = only(
        "%s = ((f32[8,6]), f32[32,6], u32[]) async-start(%x), calls=%inner",
        "ROOT %y = f32[32,6] async-done(%s)",
        before=inside,
    )
    assert (wrapped.kind, wrapped.sent_bytes) == ("all-gather", 576)


def test_a_collective_may_have_several_operands() -> None:
    one = only(
        "%b = bf16[5]{0:T(128)} convert(%x)",
        f"%y = (f32[8,6]{{1,0}}, /*index=1*/bf16[5]{{0}}) all-reduce(%x, /*index=1*/%b), {IN_GROUPS_OF_FOUR}, "
        'to_apply=%add, metadata={op_name="jit(step)/h/mlp"}',
    )
    assert (one.operands, one.op_name) == (("f32[8,6]", "bf16[5]"), "jit(step)/h/mlp")
    assert one.sent_bytes == 2 * (192 + 10) * 3 / 4


GROUPS = {
    "replica_groups={{0,2},{4,6},{1,3},{5,7}}": {(0, 2), (4, 6), (1, 3), (5, 7)},
    "replica_groups=[4,2]<=[8]": {(0, 1), (2, 3), (4, 5), (6, 7)},
    "replica_groups=[2,4]<=[2,2,2]T(1,0,2)": {(0, 1, 4, 5), (2, 3, 6, 7)},
    "replica_groups=[4,2]<=[4,2]T(1,0)": {(0, 2), (4, 6), (1, 3), (5, 7)},
    "replica_groups=mesh['a'=2,'b'=4] {'a'}": {(0, 4), (1, 5), (2, 6), (3, 7)},
    "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}": {(0, 1, 4, 5), (2, 3, 6, 7)},
    "replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}": {(0, 2), (1, 3), (4, 6), (5, 7)},
    "replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}": {(0, 1), (2, 3), (4, 5), (6, 7)},
    "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}": {(0, 1), (2, 3), (4, 5), (6, 7)},
    "replica_groups={}": {(0, 1, 2, 3, 4, 5, 6, 7)},
}


@pytest.mark.parametrize("text", GROUPS)
def test_all_forms_of_replica_groups_are_parsed(text: str) -> None:
    one = only(f"ROOT %y = f32[8,6] all-reduce(%x), channel_id=1, {text}, to_apply=%add")
    assert set(one.groups) == GROUPS[text]
    assert one.group_size == len(next(iter(GROUPS[text])))


def test_groups_of_one_send_nothing() -> None:
    assert only("ROOT %y = f32[8,6] all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add").sent_bytes == 0
    assert only("ROOT %y = f32[8,6] collective-permute(%x), source_target_pairs={{0,0}}").sent_bytes == 0


LOOP = """
%cond{n} (c: (s32[], f32[8,6])) -> pred[] {{
  %c = (s32[], f32[8,6]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %end = s32[]{{:T(128)}} constant({end})
  ROOT %less = pred[] compare(%i, %end), direction=LT
}}

%body{n} (p: (s32[], f32[8,6])) -> (s32[], f32[8,6]) {{
  %p = (s32[], f32[8,6]) parameter(0)
  %j = s32[] get-tuple-element(%p), index=0
  %v = f32[8,6] get-tuple-element(%p), index=1
  %by = s32[] constant({step})
  %zero = s32[] constant(0)
  %next = s32[] add(%j, %by)
  {inside}
  ROOT %made = (s32[], f32[8,6]) tuple(%next, %r)
}}
"""
REDUCE = "%r = f32[8,6] all-reduce(%v), replica_groups={{0,1}}, to_apply=%add"


def test_nested_loops_multiply_their_trip_counts() -> None:
    """7 x 5: the inner loop counts from 0 to 9 in steps of 2. The known trip count of the outer loop has precedence."""
    outside = "%t = (s32[], f32[8,6]) tuple(%zero, %v)\n  %w = (s32[], f32[8,6]) while(%t), condition=%cond1, "
    outside += "body=%body1\n  %r = f32[8,6] get-tuple-element(%w), index=1"
    before = LOOP.format(n=1, end=9, step=2, inside=REDUCE) + LOOP.format(n=2, end=99, step=1, inside=outside)
    one = only(
        "%zero = s32[] constant(0)",
        "%start = s32[] copy(%zero)",
        "%t = (s32[], f32[8,6]) tuple(%start, %x)",
        "ROOT %w = (s32[], f32[8,6]) while(%t), condition=%cond2, body=%body2, "
        'backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0","step":"1"}}',
        before=before,
    )
    assert one.count == 7 * 5
    assert one.sent_bytes == 7 * 5 * 192


def test_the_start_of_the_counter_reduces_the_trip_count() -> None:
    lines = (
        "%t = (s32[], f32[8,6]) tuple(%one, %x)",
        "ROOT %w = (s32[], f32[8,6]) while(%t), condition=%cond1, body=%body1",
    )
    one = only("%one = s32[] constant(1)", *lines, before=LOOP.format(n=1, end=12, step=1, inside=REDUCE))
    assert one.count == 11


def test_a_loop_with_an_unknown_trip_count_counts_once_and_is_reported() -> None:
    lines = (
        "%x = f32[8,6] parameter(0)",
        "%data = s32[] convert(%x)",
        "%t = (s32[], f32[8,6]) tuple(%data, %x)",
        "ROOT %w = (s32[], f32[8,6]) while(%t), condition=%cond1, body=%body1",
    )
    result = find_collectives(entry(*lines, before=LOOP.format(n=1, end=12, step=1, inside=REDUCE)), (0,) * 8)
    assert [one.count for one in result.instructions] == [1]
    assert result.uncounted_loops == ("w",)


def test_the_branch_of_a_conditional_that_sends_the_most_counts() -> None:
    before = ""
    for name, size in (("small", 2), ("large", 50)):
        before += f"\n%{name} (q: f32[{size}]) -> f32[{size}] {{\n  %q = f32[{size}] parameter(0)\n"
        before += f"  ROOT %r = f32[{size}] all-reduce(%q), replica_groups=[4,2]<=[8], to_apply=%add\n}}\n"
    one = only("ROOT %y = f32[] conditional(%x, %x, %x), branch_computations={%large, %small}", before=before)
    assert one.sent_bytes == 200


def test_a_collective_shared_by_several_fusions_counts_once() -> None:
    before = ""
    for name in ("start", "beside", "done"):
        before += f"\n%{name} (q: f32[8,6]) -> f32[32,6] {{\n  %q = f32[8,6] parameter(0)\n"
        before += f"  ROOT %g = f32[32,6] all-gather(%q), channel_id=5, {IN_GROUPS_OF_FOUR}, dimensions={{0}}, "
        before += 'frontend_attributes={chain_id="0"}\n}\n'
    fusions = [
        f"%f{i} = f32[32,6] fusion(%x), kind=kCustom, calls=%{n}" for i, n in enumerate(("start", "beside", "done"))
    ]
    assert only(*fusions, before=before).sent_bytes == 576


def test_an_all_reduce_followed_by_a_slice_is_a_reduce_scatter() -> None:
    before = "\n%all-reduce-scatter.1.clone (q: f32[8,6]) -> f32[2,6] {\n  %q = f32[8,6] parameter(0)\n  %i = s32[] "
    before += f"constant(0)\n  %r = f32[8,6] all-reduce(%q), {IN_GROUPS_OF_FOUR}, to_apply=%add\n"
    before += "  ROOT %s = f32[2,6] dynamic-slice(%r, %i, %i), dynamic_slice_sizes={2,6}\n}\n"
    one = only("%f = f32[2,6] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1.clone", before=before)
    assert (one.kind, one.sent_bytes) == ("reduce-scatter", 192 * 3 / 4)


def test_collectives_between_slices_are_found() -> None:
    """libtpu writes them as a send. Each device communicates with the device of the same index in the other slices."""
    slices = (0, 0, 0, 0, 1, 1, 1, 1)
    across = only(
        "%token = token[] after-all()",
        "%s = (f32[8,6], u32[], token[]) send(%x, %token), channel_id=3, is_host_transfer=true, frontend_attributes="
        '{_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}',
        "ROOT %d = token[] send-done(%s)",
        slices=slices,
    )
    assert (across.kind, across.operands) == ("all-reduce", ("f32[8,6]",))
    assert across.groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert across.sent_bytes == 192
    assert across.crosses(slices)
    inside = only("ROOT %y = f32[8,6] all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add", slices=slices)
    assert not inside.crosses(slices)


def test_a_multi_line_kernel_description_does_not_end_the_computation() -> None:
    one = only(
        '%k = f32[8,6] custom-call(%x), frontend_attributes={kernel={\n"block": "512"\n}}, metadata={op_name="a"}',
        "ROOT %y = f32[8,6] all-reduce(%k), replica_groups={{0,1}}, to_apply=%add",
    )
    assert one.sent_bytes == 192


def test_a_text_that_is_not_a_program_is_refused() -> None:
    with pytest.raises(PlanError, match="no entry"):
        find_collectives("module @step {}", (0,))
