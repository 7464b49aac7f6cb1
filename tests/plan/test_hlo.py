"""What is read from compiled programs: against closed forms, on programs that the installed compiler made."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from csp_jax.models.attention import tree_layout
from csp_jax.models.interval_attention import Plan, find_blocks, interval_attention
from csp_jax.plan.hlo import (
    BLOCK,
    KERNEL_PRODUCTS,
    Instruction,
    Program,
    kernel_name,
    parse,
    product_flops,
    replica_groups,
)
from csp_jax.plan.roofline import Schedule, traffic_bytes, wire_cost
from csp_jax.plan.targets import parse_target

TARGET = parse_target("a100-80g:2x4")
WIDTH, LAYERS, ROWS = 64, 5, 16


@pytest.fixture(scope="module")
def text() -> str:
    """A scan over five layers whose weights are split over eight devices, and a sum over them."""
    mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P(None, "all"))

    def run(weights: jax.Array, x: jax.Array) -> jax.Array:
        def body(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            whole = jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, P()))
            return jnp.tanh(x @ whole), None

        return jnp.sum(jax.lax.scan(body, x, weights)[0])

    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
    x = jax.ShapeDtypeStruct((ROWS * 8, WIDTH), jnp.float32)
    compiled = jax.jit(run, in_shardings=(split, NamedSharding(mesh, P("all")))).lower(weights, x).compile()
    return compiled.as_text()


@pytest.fixture(scope="module")
def program(text) -> Program:
    return parse(text)


def test_work_and_wires_of_a_real_program(program):
    cost = Schedule(program, TARGET).step()
    assert cost.flops == 2 * ROWS * WIDTH * WIDTH * LAYERS
    assert cost.collectives["all-gather"] == 4 * WIDTH * WIDTH * LAYERS
    assert cost.collectives["all-reduce"] == 4  # the sum
    assert cost.seconds >= max(cost.products, cost.traffic, cost.wires)


def test_a_loop_counts_as_often_as_it_runs(program, text):
    """As the compiler says, and by the loop's condition where it says nothing."""
    silent = re.sub(r'"known_trip_count":\{"n":"\d+"\}', "", text)
    assert silent != text
    for read in (program, parse(silent)):
        loops = [i for c in read.computations.values() for i in c.instructions if i.opcode == "while"]
        assert [read.trip_count(loop) for loop in loops] == [LAYERS]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_groups_in_every_way_of_writing(text, groups):
    assert replica_groups(text, 8).tolist() == groups


def gather(members: str) -> Instruction:
    return Instruction("g", "bf16[8,1000000]{1,0}", "all-gather", ("x",), f", replica_groups={members}")


def test_wires_within_and_between_hosts():
    """8 MB x 2 bytes; within a host by its links, between two by the adapters that the members share."""
    size, near = wire_cost(gather("[2,4]<=[8]"), TARGET)
    assert size == 16_000_000
    assert near == pytest.approx(16e6 * 3 / 4 / (300e9 * 0.8) + 10e-6)
    _, far = wire_cost(gather("[4,2]<=[2,4]T(1,0)"), TARGET)
    assert far == pytest.approx(16e6 / 2 / (25e9 * 0.8) + 30e-6)
    _, all_eight = wire_cost(gather("[1,8]<=[8]"), TARGET)
    assert all_eight == pytest.approx(16e6 / 2 / (4 * 25e9 * 0.8) + 30e-6)
    assert wire_cost(gather("[8,1]<=[8]"), TARGET) == (0, 0.0)


HAND_MADE = """HloModule hand

%slice (p0: f32[10,100], p1: s32[]) -> f32[1,100] {
  %p0 = f32[10,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %d = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,100}
}

%write (q0: f32[10,100], q1: f32[1,100], q2: s32[]) -> f32[10,100] {
  %q0 = f32[10,100]{1,0} parameter(0)
  %q1 = f32[1,100]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %u = f32[10,100]{1,0} dynamic-update-slice(%q0, %q1, %q2, %none)
}

ENTRY %main (a: f32[10,100], i: s32[], b: bf16[4,6,8], c: bf16[4,8,5]) -> f32[10,100] {
  %a = f32[10,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = bf16[4,6,8]{2,1,0} parameter(2)
  %c = bf16[4,8,5]{2,1,0} parameter(3)
  %s = f32[1,100]{1,0} fusion(%a, %i), kind=kLoop, calls=%slice
  %m = (bf16[4,6,5]{2,1,0}, s8[64]{0}) custom-call(%b, %c), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %w = f32[10,100]{1,0} fusion(%a, %s, %i), kind=kLoop, calls=%write
}
"""  # noqa: E501


def test_a_kernel_reads_slices_and_writes_in_place():
    program = parse(HAND_MADE)
    entry = program.entry.by_name
    assert traffic_bytes(program, entry["s"], program.entry) == 400 + 400 + 4  # a row in, a row out, the index
    assert traffic_bytes(program, entry["w"], program.entry) == 400 + 400 + 4
    assert product_flops(entry["m"], program.entry) == 2 * 4 * 6 * 5 * 8
    cost = Schedule(program, TARGET).step()
    assert cost.flops == 2 * 4 * 6 * 5 * 8
    assert cost.seconds == pytest.approx(3 * 3e-6)  # three kernels, each too small to count


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "einsum"),
    [
        ("8,1632,3584", "3584,18944,1", "8,1632,18944", "window={size=1}, dim_labels=0bf_io0->0bf", "xqd,df->xqf"),
        ("8,1632,64", "8,1632,96", "64,96,1", "window={size=8}, dim_labels=0fb_0io->bf0", "xqd,xqf->df"),
        (
            "1280,128,1",
            "8,512,128",
            "8,512,1280",
            "window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=bf0_0oi->0fb",
            "fd,xqd->xqf",
        ),
        (
            "8,512,16,80",
            "8,512,16,80",
            "8,16,512,512",
            "window={size=8x16 stride=7x15 lhs_dilate=8x16}, dim_labels=0b1f_0o1i->01bf",
            "bqgd,bkgd->bgqk",
        ),
        (
            "8,1312,4,128,1",
            "8,320,4,7,128",
            "8,4,1312,320,7",
            "window={size=8x4x7 stride=7x3x1 pad=0_0x0_0x6_6 lhs_dilate=8x4x1 rhs_reversal=0x0x1}, "
            "dim_labels=0b1f2_0o12i->01bf2",
            "bkgde,bqgrd->bgrqk",
        ),
    ],
)
def test_matrix_products_as_tpus_write_them(left, right, out, attributes, einsum):
    """Batch axes and outer products are windows over padding and holes; the work is that of the einsum."""
    text = f"""HloModule product

ENTRY %main (a: bf16[{left}], b: bf16[{right}]) -> f32[{out}] {{
  %a = bf16[{left}]{{0}} parameter(0)
  %b = bf16[{right}]{{0}} parameter(1)
  ROOT %c = f32[{out}]{{0}} convolution(%a, %b), {attributes}
}}
"""
    program = parse(text)
    sizes: dict[str, int] = {}
    names = einsum.split("->")[0].split(",")
    for letters, shape in zip(names, (left, right)):
        sizes |= dict(zip(letters, (int(size) for size in shape.split(","))))
    found = product_flops(program.entry.by_name["c"], program.entry)
    assert found == 2 * np.prod([float(size) for size in sizes.values()])


NESTED = """HloModule nested

%row (r1: s32[], r0: f32[10,100]) -> f32[1,100] {
  %r1 = s32[] parameter(1)
  %r0 = f32[10,100]{1,0} parameter(0)
  %zero = s32[] constant(0)
  ROOT %cut = f32[1,100]{1,0} dynamic-slice(%r0, %r1, %zero), dynamic_slice_sizes={1,100}
}

%put (t0: f32[10,100], t1: f32[1,100], t2: s32[]) -> f32[10,100] {
  %t0 = f32[10,100]{1,0} parameter(0)
  %t1 = f32[1,100]{1,0} parameter(1)
  %t2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = f32[10,100]{1,0} dynamic-update-slice(%t0, %t1, %t2, %zero)
}

%outer (p2: f32[10,100], p0: f32[1,100], p1: s32[]) -> f32[10,100] {
  %p2 = f32[10,100]{1,0} parameter(2)
  %p0 = f32[1,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %cut = f32[1,100]{1,0} fusion(%p2, %p1), kind=kLoop, calls=%row
  %sum = f32[1,100]{1,0} add(%cut, %p0)
  ROOT %out = f32[10,100]{1,0} fusion(%p2, %sum, %p1), kind=kLoop, calls=%put
}

ENTRY %main (a: f32[10,100], b: f32[1,100], i: s32[]) -> f32[10,100] {
  %a = f32[10,100]{1,0} parameter(0)
  %b = f32[1,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[10,100]{1,0} fusion(%b, %i, %a), kind=kLoop, calls=%outer
}
"""


def test_fusions_within_fusions_slice_and_write_in_place_too():
    """As TPUs' do: a row is read, another added to it, and the sum put in its place."""
    program = parse(NESTED)
    assert traffic_bytes(program, program.entry.by_name["f"], program.entry) == 400 + 400 + 4 + 400


# --- the attention kernel ---------------------------------------------------------------------------------------------

CALL = """HloModule kernel

ENTRY %main (q: bf16[2,704,5,32], k: bf16[2,320,5,32]) -> bf16[2,704,5,32] {
  %q = bf16[2,704,5,32]{3,2,1,0} parameter(0)
  %k = bf16[2,320,5,32]{3,2,1,0} parameter(1)
  ROOT %out = (bf16[2,704,5,32]{3,2,1,0}, f32[2,704,5]{2,1,0}) custom-call(%q, %k, %k), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/while/body/NAME/pallas_call"}, backend_config={grid_x = 11 : i32, ir = "ML\\EF
}
  %b = f32[9]{0} add(%q, %k)
\0B", num_warps = 4 : i32}
}
"""  # noqa: E501


@pytest.mark.parametrize("name", KERNEL_PRODUCTS)
def test_products_inside_the_kernel(name):
    """Of 320 keys; as many queries are the prompt's and see what is before them in blocks, 384 see all."""
    program = parse(CALL.replace("NAME", name))
    assert [instruction.name for instruction in program.entry.instructions] == ["q", "k", "out"]
    pairs = sum(64 * 64 * (block + 1) for block in range(5)) + 384 * 320
    wanted = KERNEL_PRODUCTS[name] * 2 * 32 * 2 * 5 * pairs
    cost = Schedule(program, TARGET).step()
    assert cost.flops == wanted
    assert cost.products == pytest.approx(wanted / (312e12 * 0.30))
    assert Schedule(parse(CALL.replace("NAME", "another")), TARGET).step().flops == 0


def test_those_are_the_pairs_that_the_kernel_goes_through():
    """A prompt of 320 tokens without padding, branches that hang from its end."""
    prompt, branch = 320, 384
    layout = tree_layout(jnp.ones((1, prompt), int), jnp.full((1, branch), prompt - 1), 1)
    blocks = find_blocks(layout.first, layout.last, prompt, Plan(1.0, BLOCK, BLOCK, False))
    pairs = int((blocks.key_stop - blocks.key_start).sum()) * BLOCK**2
    assert pairs == prompt * (prompt + BLOCK) / 2 + branch * prompt
    again = int((blocks.query_stop - blocks.query_start).sum()) * BLOCK**2
    assert again == pairs


def kernels(jaxpr: Any) -> list[Any]:
    """Every call of a kernel."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found.append(equation.params)
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            found += kernels(inner) if hasattr(inner, "eqns") else []
    return found


def test_the_kernels_are_called_so_and_compute_so_many_products():
    """What is looked for in compiled programs is what the attention's code says, forward and backward."""
    q = jnp.zeros((1, 64, 2, 16), jnp.bfloat16)
    zero = jnp.zeros((1, 64), jnp.int32)

    def loss(q: jax.Array) -> jax.Array:
        return interval_attention(q, q[:, :, :1], q[:, :, :1], zero, zero + 63)[0].astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss)).trace(q)
    said = re.findall(r'loc\("([^"]*)"', traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True))
    names = [kernel_name(Instruction("c", "f32[]", "custom-call", (), f'op_name="{name}"')) for name in said]
    assert {name for name in names if name} == set(KERNEL_PRODUCTS)
    counts = {}
    for call in kernels(traced.jaxpr.jaxpr):
        heads = 2 if call["name"].endswith("dkv") else 1  # of the queries, in one call for the head that they share
        counts[call["name"]] = str(call["jaxpr"]).count("dot_general") / heads
    assert counts == KERNEL_PRODUCTS
