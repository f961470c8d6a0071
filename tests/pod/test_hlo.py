"""Counting in the text of compiled programs, on pieces of HLO with results known by hand."""

import pytest

from sfd_jax.pod import hlo

LOOP = """HloModule jit_step, is_scheduled=true

%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%cond (c: (s32[], f32[3,5])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %c = (s32[]{:T(128)}, f32[3,5]{1,0}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%at, %limit), direction=LT
}

%body (b: (s32[], f32[3,5])) -> (s32[], f32[3,5]) {
  %b = (s32[], f32[3,5]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[3,5]{1,0:T(8,128)S(1)} get-tuple-element(%b), index=1
  %whole = f32[12,5]{1,0} all-gather(%y), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %rows = f32[3,5]{1,0} fusion(%whole), kind=kLoop, calls=%inner
  ROOT %out = (s32[], f32[3,5]{1,0}) tuple(%next, %rows)
}

%inner (p: f32[12,5]) -> f32[3,5] {
  %p = f32[12,5]{1,0} parameter(0)
  %w = f32[3,12]{1,0} constant({...})
  ROOT %product = f32[3,5]{1,0} dot(%w, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[3,5]) -> f32[3,5] {
  %a = f32[3,5]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[3,5]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[3,5]{1,0}) while(%start), condition=%cond, body=%body
  %end = f32[3,5]{1,0} get-tuple-element(%loop), index=1
  ROOT %total = f32[3,5]{1,0} all-reduce(%end), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add.1
}
"""


def test_the_body_of_a_loop_counts_once_per_iteration():
    traffic = hlo.read_traffic(LOOP)
    assert traffic.sent == {"all-gather": 7 * 12 * 5 * 4, "all-reduce": 3 * 5 * 4}
    assert traffic.operations == {"all-gather": 7, "all-reduce": 1}
    assert traffic.unknown_loops == ()


@pytest.mark.parametrize(
    "old, new, trips",
    [
        ("constant(0)", "constant(2)", 5),
        ("direction=LT", "direction=LE", 8),
        ("%one = s32[] constant(1)", "%one = s32[] constant(3)", 3),
        ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"11"}}', 11),
    ],
)
def test_trip_counts(old, new, trips):
    assert hlo.read_traffic(LOOP.replace(old, new)).operations["all-gather"] == trips


def test_a_loop_of_unknown_length_is_named_and_counted_once():
    # The bound is a sum of two values, as where a solver tests whether any sample is unfinished.
    text = LOOP.replace("%limit = s32[]{:T(128)} constant(7)", "%limit = s32[]{:T(128)} add(%at, %at)")
    traffic = hlo.read_traffic(text)
    assert traffic.unknown_loops == ("loop",) and traffic.operations["all-gather"] == 1


def test_a_bound_that_is_a_loop_variable_is_found():
    text = LOOP.replace("(s32[], f32[3,5]{1,0})", "(s32[], f32[3,5]{1,0}, s32[])")
    text = text.replace("%limit = s32[]{:T(128)} constant(7)", "%n = s32[] constant(1)").replace(
        "%at = s32[]{:T(128)} get-tuple-element(%c), index=0",
        "%at = s32[] get-tuple-element(%c), index=0\n  %limit = s32[] get-tuple-element(%c), index=2",
    )
    text = text.replace("tuple(%next, %rows)", "tuple(%next, %rows, %kept)").replace(
        "%one = s32[] constant(1)", "%one = s32[] constant(1)\n  %kept = s32[] get-tuple-element(%b), index=2"
    )
    text = text.replace("tuple(%zero, %a)", "tuple(%zero, %a, %nine)").replace(
        "%zero = s32[] constant(0)", "%zero = s32[] constant(0)\n  %nine = s32[] constant(9)"
    )
    assert hlo.read_traffic(text).operations["all-gather"] == 9


def test_a_collective_spread_over_fusions_is_one():
    part = """
%{name} (p.{name}: bf16[2,3]) -> bf16[8,3] {{
  %p.{name} = bf16[2,3]{{1,0}} parameter(0)
  %gather.{name} = bf16[8,3]{{1,0}} all-gather(%p.{name}), channel_id=5, dimensions={{0}}
  ROOT %call.{name} = bf16[8,3]{{1,0}} custom-call(%gather.{name}), custom_call_target="{target}"
}}
"""
    parts = [("begin", "AsyncCollectiveStart"), ("overlap", "Sum"), ("wait", "AsyncCollectiveDone")]
    text = "HloModule m\n" + "".join(part.format(name=name, target=target) for name, target in parts)
    calls = "".join(f"  %f.{name} = bf16[8,3] fusion(%a), kind=kCustom, calls=%{name}\n" for name, _ in parts)
    text += "\nENTRY %main (a: bf16[2,3]) -> bf16[8,3] {\n  %a = bf16[2,3] parameter(0)\n" + calls + "}\n"
    traffic = hlo.read_traffic(text)
    assert traffic.sent == {"all-gather": 8 * 3 * 2} and traffic.operations == {"all-gather": 1}


def test_an_all_reduce_with_a_slice_is_a_reduce_scatter():
    text = """HloModule m

%scatter (p: f32[8,3]) -> f32[2,3] {
  %p = f32[8,3] parameter(0)
  %all = f32[8,3] all-reduce(%p), channel_id=1, to_apply=%add
  %i = s32[] constant(0)
  ROOT %mine = f32[2,3] dynamic-slice(%all, %i, %i), dynamic_slice_sizes={2,3}
}

ENTRY %main (a: f32[8,3]) -> f32[2,3] {
  %a = f32[8,3] parameter(0)
  ROOT %f = f32[2,3] fusion(%a), kind=kCustom, calls=%scatter
}
"""
    assert hlo.read_traffic(text).sent == {"reduce-scatter": 2 * 3 * 4}
    two = text.replace(
        "ROOT %mine = f32[2,3] dynamic-slice(%all, %i, %i), dynamic_slice_sizes={2,3}",
        "%mine = f32[2,3] dynamic-slice(%all, %i, %i), dynamic_slice_sizes={2,3}\n"
        "  %cut = f32[1,3] dynamic-slice(%all, %i, %i), dynamic_slice_sizes={1,3}\n"
        "  %also = f32[3]{0} bitcast(%cut)\n"
        "  ROOT %both = (f32[2,3], f32[3]) tuple(%mine, %also)",
    )
    assert hlo.read_traffic(two).sent == {"reduce-scatter": (2 + 1) * 3 * 4}
    assert hlo.read_traffic(two.replace("tuple(%mine, %also)", "tuple(%mine, %all)")).operations == {"all-reduce": 1}


def test_started_collectives_count_their_result():
    text = """HloModule m

ENTRY %main (a: f32[2,3]) -> f32[2,3] {
  %a = f32[2,3] parameter(0)
  %s = (f32[2,3]{1,0:S(1)}, f32[2,3]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), channel_id=1
  %d = f32[2,3] collective-permute-done(%s)
  %g = (f32[2,3]{1,0}, f32[8,3]{1,0}) all-gather-start(%d), channel_id=2, dimensions={0}
  %h = f32[8,3] all-gather-done(%g)
  %r = f32[8,3] all-reduce-start(%h), channel_id=3, to_apply=%add
  ROOT %e = f32[8,3] all-reduce-done(%r)
}
"""
    assert hlo.read_traffic(text).sent == {"collective-permute": 24, "all-gather": 96, "all-reduce": 96}


def test_bytes_of_shapes():
    assert hlo.array_bytes("bf16[16,3]{1,0:T(8,128)(2,1)S(1)}") == 96
    assert hlo.array_bytes("(f32[2,3]{1,0}, pred[5], s32[], u4[3])") == 24 + 5 + 4 + 2
    assert hlo.array_bytes("f8e4m3fn[7]") == 7


def test_a_schedule_counts_what_no_operation_covers():
    """Times by hand: 1000 cycles a second, 16 bytes a second."""
    cost = lambda cycles: f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    text = f"""HloModule m, is_scheduled=true

%begin (p: f32[4]) -> f32[8] {{
  %p = f32[4] parameter(0)
  %g = f32[8] all-gather(%p), channel_id=5, dimensions={{0}}
  ROOT %c = f32[8] custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%wait (p: f32[8]) -> f32[8] {{
  %p = f32[8] parameter(0)
  %g = f32[8] all-gather(%p), channel_id=5, dimensions={{0}}
  ROOT %c = f32[8] custom-call(%g), custom_call_target="AsyncCollectiveDone"
}}

%dot (p: f32[4]) -> f32[4] {{
  %p = f32[4] parameter(0)
  ROOT %d = f32[4] multiply(%p, %p), {cost(9999)}
}}

ENTRY %main (a: f32[4]) -> f32[4] {{
  %a = f32[4] parameter(0)
  %all = f32[4] all-reduce(%a), channel_id=1, to_apply=%add
  %s = (f32[4], f32[4], u32[]) collective-permute-start(%all), channel_id=2
  %one = f32[4] fusion(%all), kind=kLoop, calls=%dot, {cost(600)}
  %e = f32[4] collective-permute-done(%s)
  %f = f32[8] fusion(%one), kind=kCustom, calls=%begin
  %two = f32[4] fusion(%one), kind=kLoop, calls=%dot, {cost(2500)}
  %h = f32[8] fusion(%f), kind=kCustom, calls=%wait
  %t = (f32[4], f32[4], u32[]) collective-permute-start(%two), channel_id=3
  %u = f32[4] collective-permute-done(%t)
  ROOT %last = f32[4] fusion(%u), kind=kLoop, calls=%dot, {cost(400)}
}}
"""
    schedule = hlo.read_schedule(text, clock=1000.0, bandwidth=16.0)
    assert schedule.cycles == 3500 and schedule.overlapped == 16 + 32 and schedule.waited == 16 + 16
    # All of the all-reduce, 0.4 of the permutation's second, nothing of the gathering's two, all of the last.
    assert schedule.seconds == pytest.approx(3.5 + 1 + 0.4 + 0 + 1)
    assert hlo.read_schedule(LOOP, clock=1.0, bandwidth=1.0).waited == 7 * 12 * 5 * 4 + 3 * 5 * 4
