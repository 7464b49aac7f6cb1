"""Reading a compiled program's text: its computations in their schedule, sizes, matrix products, collectives."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from csp_jax.models.attention import BOTH_WAYS

_SIZES = {
    4: "s4 u4",
    8: "pred s8 u8 f8e4m3fn f8e5m2",
    16: "s16 u16 bf16 f16",
    32: "s32 u32 f32",
    64: "s64 u64 f64 c64",
    128: "c128",
}
BITS = {name: bits for bits, names in _SIZES.items() for name in names.split()}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAME = re.compile(r"%([\w.\-]+)")
_PROGRAM = re.compile(r' ir = "[^"]*"')  # of a Triton kernel, with line breaks in it
_KERNEL = re.compile(r'op_name="[^"]*\b(interval_attention\w*)\)*/pallas_call')
# Of the attention kernels: products of a query with a key or a value that each computes for a pair; their blocks' size.
KERNEL_PRODUCTS = {"interval_attention": 2, "interval_attention_dq": 3, "interval_attention_dkv": 4}
BLOCK = 64
NUMBERED = ("parameter", "constant")  # instructions with a number in the place of operands


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    parameter: int = -1
    constant: int = -1  # the value, of a single whole number that is not negative

    @functools.cached_property
    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """Element type and shape of every array of the result."""
        found = _ARRAY.findall(self.type)
        return [(kind, tuple(int(size) for size in shape.split(",") if size)) for kind, shape in found if kind in BITS]

    @functools.cached_property
    def bytes(self) -> int:
        """Of the result."""
        return sum(array_bytes(kind, shape) for kind, shape in self.arrays)

    def attribute(self, name: str) -> str | None:
        """The name, number or braces behind `name=`."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found.group(1) if found else None

    def called(self, name: str) -> str | None:
        """The computation behind `name=`."""
        value = self.attribute(name)
        return value.lstrip("%") if value else None

    @property
    def collective(self) -> str | None:
        """The kind, if the instruction starts a collective operation (or is a whole one)."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None


def array_bytes(kind: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * BITS[kind] // 8


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations of a compiled module."""

    computations: Mapping[str, Computation]
    entry: Computation
    unknown_trips: int = 1  # of a loop that ends when something is found, which nobody knows before

    def inner(self, instruction: Instruction) -> Computation | None:
        """What a fusion or a call runs."""
        name = instruction.called("calls") or instruction.called("to_apply")
        return self.computations.get(name) if name else None

    def trip_count(self, instruction: Instruction) -> int:
        """How often a loop's body runs; `unknown_trips` where nobody knows.

        GPU compilers write it down; of TPUs' it is what the condition compares the loop's counter with, from 0 on.
        """
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes)
        if found:
            return int(found.group(1))
        condition = self.computations.get(instruction.called("condition") or "")
        last = condition.instructions[-1] if condition else None
        if condition is None or last is None or last.attribute("direction") != "LT":
            return self.unknown_trips
        limit = condition.by_name.get(last.operands[-1])
        return limit.constant if limit and limit.constant >= 0 else self.unknown_trips

    def flops(self, instruction: Instruction, where: Computation) -> float:
        """Multiplications and additions of matrix products, one execution, inside fusions too."""
        own = product_flops(instruction, where)
        if own or instruction.opcode not in ("fusion", "call", "async-start"):
            return own
        inside = self.inner(instruction)
        return sum(self.flops(part, inside) for part in inside.instructions) if inside else 0.0

    def collectives(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instruction itself or those inside a fusion that are collective operations."""
        if instruction.collective:
            yield instruction
        elif instruction.opcode in ("fusion", "call", "async-start"):
            inside = self.inner(instruction)
            for part in inside.instructions if inside else ():
                yield from self.collectives(part)


def parse(text: str, unknown_trips: int = 1) -> Program:
    """The text of a compiled module (`Compiled.as_text()`)."""
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", list[Instruction]()
    for line in _PROGRAM.sub("", text).splitlines():
        head = _HEAD.match(line)
        if head and " = " not in line.split("->")[0]:
            name, lines = head.group(2), []
            entry = name if head.group(1) else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(name, tuple(lines))
            name = ""
        elif name and " = " in line:
            lines.append(_instruction(line))
    return Program(computations, computations[entry], unknown_trips)


def _instruction(line: str) -> Instruction:
    left, _, rest = line.strip().partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].strip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    operands, opcode = rest[opening + 1 : closing], rest[:opening]
    name = left.removeprefix("ROOT ").lstrip("%")
    number, constant = (int(operands) if opcode == of and operands.isdecimal() else -1 for of in NUMBERED)
    return Instruction(name, kind, opcode, tuple(_NAME.findall(operands)), rest[closing + 1 :], number, constant)


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens there is closed."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"not closed: {text[opening : opening + 80]}")


def product_flops(instruction: Instruction, where: Computation) -> float:
    """Multiplications and additions of a matrix product, convolution or attention kernel; 0 for everything else."""
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, where)
    if kernel_name(instruction):
        return kernel_flops(instruction, where)
    product = instruction.opcode == "dot" or "matmul" in (instruction.attribute("custom_call_target") or "")
    if not product or instruction.operands[0] not in where.by_name:
        return 0.0
    left = where.by_name[instruction.operands[0]].arrays[0][1]
    found = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^}\]]*)', instruction.attributes)
    summed = [left[int(number)] for number in re.findall(r"\d+", found.group(1))] if found else []
    return 2.0 * math.prod(instruction.arrays[0][1]) * math.prod(summed)


def kernel_name(instruction: Instruction) -> str | None:
    """Which of our attention kernels an instruction calls."""
    found = _KERNEL.search(instruction.attributes) if instruction.opcode == "custom-call" else None
    return found.group(1) if found else None


def kernel_flops(instruction: Instruction, where: Computation) -> float:
    """Products inside an attention kernel, for prompts without padding and a picture that fills its row.

    Which pairs are computed is known when it runs only; the shapes say the most that it can be. Patches of a picture
    see all of it. Elsewhere as many queries as
    there are keys are the prompt's own and see what is before them: half of the pairs, and whole blocks on the
    diagonal. Those behind them (or all, where they are fewer) belong to branches and see the whole prompt.
    """
    (_, (batch, queries, *heads, width)), (_, (_, keys, *_)) = (
        where.by_name[name].arrays[0] for name in instruction.operands[:2]
    )
    causal = queries >= keys and BOTH_WAYS not in instruction.attributes
    own = keys if causal else 0
    pairs = own * (own + BLOCK) / 2 + (queries - own) * keys
    return KERNEL_PRODUCTS[kernel_name(instruction) or ""] * 2.0 * batch * math.prod(heads) * pairs * width


def _convolution_flops(instruction: Instruction, where: Computation) -> float:
    """TPUs write matrix products as convolutions, whose windows mostly lie on padding and holes: only what falls on a
    value counts."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None or any(name not in where.by_name for name in instruction.operands[:2]):
        return 0.0
    shapes = [where.by_name[name].arrays[0][1] for name in instruction.operands[:2]] + [instruction.arrays[0][1]]
    left, right, out = (dict(zip(names, shape)) for names, shape in zip(labels.groups(), shapes))
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(part.split("=") for part in found.group(1).split()) if found else {}
    axes = sorted(label for label in out if label.isdigit())

    def values(name: str, default: str) -> list[str]:
        return window.get(name, "x".join([default] * len(axes))).split("x")

    hits = 1
    for axis, size, stride, pad, holes, reach in zip(
        axes,
        values("size", "1"),
        values("stride", "1"),
        values("pad", "0_0"),
        values("lhs_dilate", "1"),
        values("rhs_dilate", "1"),
    ):
        first = np.arange(out[axis])[:, None] * int(stride) - int(pad.split("_")[0])
        at = first + np.arange(int(size)) * int(reach)
        hits *= int(np.sum((at >= 0) & (at <= (left[axis] - 1) * int(holes)) & (at % int(holes) == 0)))
    return 2.0 * out["b"] * out["f"] * right["i"] * hits


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """Which devices take part together, [groups, members], from any of the three ways of writing it."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{]*device_ids=\(\[([\d,]*)\]\))?\s*\{([^}]*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        shape = [int(size) for size in sizes.values()]
        ids = np.array([int(i) for i in mesh.group(2).split(",")]) if mesh.group(2) else np.arange(math.prod(shape))
        together = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", mesh.group(3))]
        apart = [axis for axis in range(len(shape)) if axis not in together]
        members = math.prod(shape[axis] for axis in together)
        return ids.reshape(shape).transpose(*apart, *together).reshape(-1, members)
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    if listed and listed.group(1):
        return np.array([[int(i) for i in part.split(",")] for part in re.findall(r"\{([\d,]+)\}", listed.group(1))])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, reshaped = ([int(i) for i in part.split(",")] for part in iota.group(1, 2))
        order = [int(i) for i in iota.group(3).split(",")] if iota.group(3) else range(len(reshaped))
        return np.arange(math.prod(shape)).reshape(reshaped).transpose(*order).reshape(shape)
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", attributes)
    if pairs:
        return np.array([[int(i) for i in part.split(",")] for part in re.findall(r"\{([\d,]+)\}", pairs.group(1))])
    return np.arange(devices).reshape(1, devices)
