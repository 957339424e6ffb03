"""Sums over the call graph of an optimized module, on text such as the TPU compiler writes."""

import math

import jax
import jax.numpy as jnp
import pytest

from stf_jax.plan.cost_analysis import analyze, largest_gather
from stf_jax.plan.hlo import UnreadableProgram

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'

MODULE = f"""HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  ROOT %s = f32[] add(%a, %b)
}}

%starts (p: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {{
  %p = bf16[2,8]{{1,0:T(8,128)(2,1)S(1)}} parameter(0)
  %all-gather.1 = bf16[8,8]{{1,0:T(8,128)}} all-gather(%p), channel_id=1, replica_groups=mesh['axis_0'=4] {{'axis_0'}}, dimensions={{0}}, metadata={{op_name="jit(step)/all_gather_fsdp"}}
  ROOT %start = (bf16[2,8], bf16[8,8]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.1 (p: bf16[2,8]) -> bf16[8,8] {{
  %p = bf16[2,8] parameter(0)
  ROOT %all-gather.2 = bf16[8,8] all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4]
}}

%matmul (p: f32[16,4], q: f32[4,32]) -> f32[16,32] {{
  %p = f32[16,4] parameter(0)
  %q = f32[4,32] parameter(1)
  ROOT %dot = f32[16,32] convolution(%p, %q), dim_labels=bf_io->bf
}}

%cond (c: (s32[], f32[16,32])) -> pred[] {{
  %c = (s32[], f32[16,32]) parameter(0)
  %n = s32[]{{:T(128)}} constant(5)
  ROOT %less = pred[] compare(%n, %n), direction=LT
}}

%body (c: (s32[], f32[16,32])) -> (s32[], f32[16,32]) {{
  %c = (s32[], f32[16,32]) parameter(0)
  %x = f32[16,4] get-tuple-element(%c), index=0
  %y = f32[4,32] get-tuple-element(%c), index=1
  %w = bf16[2,8] get-tuple-element(%c), index=1
  %f = f32[16,32]{{1,0:T(8,128)}} fusion(%x, %y), kind=kOutput, calls=%matmul, metadata={{op_name="jit(step)/while/body/closed_call/decoder/dot_general"}}, {CYCLES % 100}
  %g = (bf16[2,8], bf16[8,8]) fusion(%w), kind=kCustom, calls=%starts
  %h = bf16[8,8] fusion(%w), kind=kCustom, calls=%async_collective_fusion.1
  %r = f32[16,32] all-reduce(%f), channel_id=7, replica_groups={{{{0,1}},{{2,3}}}}, to_apply=%sum, metadata={{op_name="jit(step)/summed"}}
  ROOT %t = (s32[], f32[16,32]) tuple(%c, %r)
}}

ENTRY %main (p: f32[16,32]) -> f32[16,32] {{
  %p = f32[16,32] parameter(0)
  %k = f32[16,32] fusion(%p), kind=kLoop, calls=%sum, metadata={{op_name="jit(step)/p[\\'w\\']/mul"}}, {CYCLES % 7}
  ROOT %while.1 = (s32[], f32[16,32]) while(%p), condition=%cond, body=%body
}}
"""  # noqa: E501


def test_a_loop_counts_as_often_as_it_turns() -> None:
    work = analyze(MODULE, devices=4)
    assert work.cycles == {
        ("decoder/dot_general", "f32[16,32]"): 500,
        ("p['w']/mul", "f32[16,32]"): 7,
    }
    assert work.flops == 5 * 2 * 16 * 4 * 32


PARTS = """HloModule jit_step

ENTRY %main (p: (s8[3], (bf16[1], s32[]), f32[16,4], f32[4,32])) -> f32[16,32] {
  %p = (s8[3]{0}, (bf16[1], s32[]), f32[16,4]{1,0:T(8,128)S(1)}, /*index=3*/f32[4,32]) parameter(0)
  ROOT %dot = f32[16,32] dot(%p#2, %p#3), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_an_operand_that_is_a_part_of_a_tuple() -> None:
    """As libtpu 0.0.52 writes it; before, the part had a line of its own."""
    assert analyze(PARTS, devices=1).flops == 2 * 16 * 4 * 32


def test_collectives_once_an_iteration_and_by_their_group() -> None:
    work = analyze(MODULE, devices=4)
    actual = {
        collective.kind: (collective, times) for collective, times in work.collectives.items()
    }
    assert actual.keys() == {"all-gather", "all-reduce"}
    gather, times = actual["all-gather"]
    assert (times, gather.bytes, gather.group, gather.beside) == (5, 8 * 8 * 2, 4, math.inf)
    assert gather.traffic == 8 * 8 * 2 * 3 / 4
    total, times = actual["all-reduce"]
    assert (times, total.bytes, total.group, total.beside) == (5, 16 * 32 * 4, 2, 0)
    assert total.traffic == 16 * 32 * 4 * 2 / 2
    assert largest_gather(MODULE) == 64


OFFLOADED = f"""HloModule jit_step, is_scheduled=true

%inside (p: bf16[8,128]) -> bf16[64,128] {{
  %p = bf16[8,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %all-gather.1 = bf16[64,128]{{1,0:T(8,128)(2,1)}} all-gather(%p), channel_id=1, replica_groups=mesh['axis_0'=8] {{'axis_0'}}, dimensions={{0}}
}}, execution_thread="sparsecore"

%async_computation (p: bf16[8,128]) -> bf16[64,128] {{
  %p = bf16[8,128] parameter(0)
  ROOT %custom-call.1 = bf16[64,128] custom-call(%p), custom_call_target="TODO(b/1)", called_computations={{%inside}}
}}, execution_thread="sparsecore"

ENTRY %main (p: bf16[8,128]) -> bf16[64,128] {{
  %p = bf16[8,128] parameter(0)
  %call-start = ((), (), s32[8192]) async-start(), async_execution_thread="sparsecore", calls=%async_computation
  %a = bf16[8,128] fusion(%p), kind=kLoop, {CYCLES % 50}
  %call-update = ((bf16[8,128]), bf16[64,128], s32[8192]) async-update(%call-start, %a)
  %b = bf16[8,128] fusion(%p), kind=kLoop, {CYCLES % 300}
  ROOT %call-done = bf16[64,128] async-done(%call-update)
}}
"""  # noqa: E501


def test_a_collective_that_the_sparsecore_runs_beside_other_work() -> None:
    """It begins when it has its operand, and what runs until it ends hides that much of it."""
    work = analyze(OFFLOADED, devices=8)
    ((gather, times),) = work.collectives.items()
    assert (gather.kind, gather.bytes, gather.group, times) == ("all-gather", 64 * 128 * 2, 8, 1)
    assert gather.beside == 300
    assert gather.exposure(seconds=5.0, clock=100) == 2
    assert gather.exposure(seconds=2.0, clock=100) == 0


def test_a_loop_without_end_is_not_guessed() -> None:
    with pytest.raises(UnreadableProgram, match=r"while\.1"):
        analyze(MODULE.replace("constant(5)", "parameter(5)"), devices=4)


@pytest.mark.parametrize("layers", [1, 3])
def test_matmuls_of_a_compiled_program(layers: int) -> None:
    """On the CPU, whose text has the same form; batched, transposed and in a loop."""

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        def step(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(jnp.einsum("bij,bjk->bik", x, w)), None

        return jax.lax.scan(step, x, w)[0]

    x, w = jnp.zeros((3, 8, 16)), jnp.zeros((layers, 3, 16, 16))
    text = jax.jit(jax.grad(lambda x, w: function(x, w).sum())).lower(x, w).compile().as_text()
    matmul = 2 * 3 * 8 * 16 * 16
    # The gradient of the input alone: forward and one matmul back.
    assert analyze(text, devices=1).flops == pytest.approx(2 * layers * matmul)


BETWEEN_SLICES = """HloModule jit_step, is_scheduled=true

%cond (c: (s32[], f32[16,8])) -> pred[] {
  %c = (s32[], f32[16,8]) parameter(0)
  ROOT %less = pred[] compare(%c, %c), direction=LT
}

%body (c: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %c = (s32[], f32[16,8]) parameter(0)
  %after-all = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="all-reduce_0"}
  %send.1 = (f32[16,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%c, %after-all), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[16,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after-all), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.2 = (bf16[256]{0}, u32[], token[]) recv(%after-all), channel_id=5, frontend_attributes={_xla_megascale_transfer_type="ALL_GATHER"}
  %all-reduce.1 = f32[256,512]{1,0:T(8,128)} all-reduce(%c), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %t = (s32[], f32[16,8]) tuple(%c, %c)
}

ENTRY %main (p: f32[16,8]) -> f32[16,8] {
  %p = f32[16,8] parameter(0)
  ROOT %while.1 = (s32[], f32[16,8]) while(%p), condition=%cond, body=%body
}
"""  # noqa: E501


def test_collectives_between_slices_are_recognized() -> None:
    """As the compiler writes it for two slices of v5e:2x2."""
    work = analyze(BETWEEN_SLICES, devices=4, slices=2, one_iteration=True)
    actual = {(collective.dcn, collective.kind): collective for collective in work.collectives}
    assert actual.keys() == {(True, "all-reduce"), (True, "all-gather"), (False, "all-reduce")}
    total = actual[True, "all-reduce"]
    assert (total.bytes, total.group, total.traffic) == (2**16, 2, 2**16)
    # Of what is gathered a half comes from the other slice.
    assert actual[True, "all-gather"].traffic == 256 * 2 / 2
    with pytest.raises(UnreadableProgram, match=r"recv\.1 goes between slices"):
        analyze(
            BETWEEN_SLICES.replace("ALL_REDUCE", "PIGEON"), devices=4, slices=2, one_iteration=True
        )


def test_one_iteration_of_the_only_loop() -> None:
    work = analyze(MODULE, devices=4, one_iteration=True)
    assert work.cycles == {("decoder/dot_general", "f32[16,32]"): 100}
    with pytest.raises(UnreadableProgram, match="has 0"):
        analyze("ENTRY %main (p: f32[]) -> f32[] {\n}\n", devices=1, one_iteration=True)


def test_a_collective_whose_start_is_elsewhere_is_not_guessed() -> None:
    with pytest.raises(UnreadableProgram, match=r"where call-update was started"):
        analyze(OFFLOADED.replace("async-update(%call-start, ", "async-update(%p, "), devices=8)
