"""How long a compiled step takes at best: its kernels one after another, its collectives beside them, as scheduled.

A kernel takes as long as its matrix products or its memory traffic, whichever is longer. A collective runs from where
the schedule starts it; what waits for it waits. Nothing is measured: see `ASSUMPTIONS`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from csp_jax.plan.hlo import Computation, Instruction, Program, array_bytes, kernel_name, replica_groups
from csp_jax.plan.targets import Target

PRODUCTS, TRAFFIC, WIRES = 0.80, 0.85, 0.80  # of the published peaks
ATTENTION = 0.30  # of the peak: products within the attention kernel, between which it computes exponentials
KERNEL, NEAR, FAR = 3e-6, 10e-6, 30e-6  # seconds that a kernel, a collective in a host and one between hosts take
ASSUMPTIONS = (
    f"matrix products reach {PRODUCTS:.0%} of the card's bfloat16 peak, whatever their shape",
    f"within the attention kernel they reach {ATTENTION:.0%}, and its prompts have no padding",
    f"every kernel reads its operands and writes its results once, at {TRAFFIC:.0%} of the memory bandwidth",
    f"a collective moves its bytes at {WIRES:.0%} of the links' bandwidth in one direction, beside the kernels that the"
    " compiler's schedule puts between its start and its end",
    f"a kernel takes at least {KERNEL * 1e6:.0f} us, a collective {NEAR * 1e6:.0f} us in a host and {FAR * 1e6:.0f} us"
    " between hosts",
    "the host keeps up; no straggler, no checkpoint",
)
FREE = frozenset(
    {
        "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
        "copy-start", "copy-done", "async-done", "async-update", "iota", "opt-barrier", "add-dependency", "domain",
    }
)  # fmt: skip
_IN_PLACE = ("dynamic-update-slice", "scatter")
_SLICES = ("dynamic-slice", "slice", "gather")
_ALIASES = ("bitcast", "reshape", "copy", "convert", "transpose")


@dataclasses.dataclass
class Cost:
    """Of one execution on one device: seconds by the schedule, and its parts as if each were alone."""

    seconds: float = 0.0
    products: float = 0.0
    traffic: float = 0.0
    wires: float = 0.0
    flops: float = 0.0
    collectives: Counter[str] = dataclasses.field(default_factory=Counter)  # bytes by kind

    def add(self, other: Cost, times: int = 1) -> None:
        self.seconds += other.seconds * times
        self.products += other.products * times
        self.traffic += other.traffic * times
        self.wires += other.wires * times
        self.flops += other.flops * times
        for kind, size in other.collectives.items():
            self.collectives[kind] += size * times


def traffic_bytes(program: Program, instruction: Instruction, where: Computation) -> int:
    """Bytes that a kernel reads and writes; of an operand that is only sliced, its slices; in place, what changes."""
    inside = program.inner(instruction) if instruction.opcode == "fusion" else None
    if inside is not None:
        return sum(_read_inside(program, inside)) + max(instruction.bytes - _kept_inside(program, inside), 0)
    if instruction.opcode in _IN_PLACE and len(instruction.operands) > 1:
        return 2 * _changed(instruction, where)
    if instruction.opcode in _SLICES:
        return 2 * instruction.bytes
    operands = [where.by_name[name].bytes for name in instruction.operands if name in where.by_name]
    return instruction.bytes + sum(operands)


def _changed(instruction: Instruction, where: Computation) -> int:
    """Bytes that an instruction in place writes."""
    return where.by_name[instruction.operands[-1 if instruction.opcode == "scatter" else 1]].bytes


def _kept_inside(program: Program, inside: Computation) -> int:
    """Bytes of a fusion's results that stay as they are, in fusions within it too."""
    kept = 0
    for part in inside.instructions:
        if part.opcode in _IN_PLACE and len(part.operands) > 1:
            kept += max(part.bytes - _changed(part, inside), 0)
        nested = program.inner(part) if part.opcode == "fusion" else None
        kept += _kept_inside(program, nested) if nested else 0
    return kept


def _read_inside(program: Program, inside: Computation) -> list[int]:
    """Bytes that a fusion reads of each of its parameters, by number; TPUs' slice them in fusions within fusions."""
    alias = {part.name: part.operands[0] for part in inside.instructions if part.opcode in _ALIASES}

    def origin(name: str) -> str:
        while name in alias:
            name = alias[name]
        return name

    parameters = sorted((p for p in inside.instructions if p.opcode == "parameter"), key=lambda p: p.parameter)
    whole = {part.name: part.bytes for part in parameters}
    read = dict.fromkeys(whole, 0)
    used: set[str] = set()
    for part in inside.instructions:
        nested = program.inner(part) if part.opcode == "fusion" else None
        in_nested = _read_inside(program, nested) if nested else []
        for place, name in enumerate(() if part.opcode in _ALIASES else map(origin, part.operands)):
            if name not in whole:
                continue
            used.add(name)
            if in_nested:
                read[name] += in_nested[place]
            elif place == 0 and part.opcode in _SLICES:
                read[name] += part.bytes
            elif place > 0 or part.opcode not in _IN_PLACE:
                read[name] += whole[name]
    return [min(read[name], size) if name in used else size for name, size in whole.items()]


def wire_cost(instruction: Instruction, target: Target) -> tuple[int, float]:
    """Bytes of a collective's data on one device (the larger of what goes in and comes out), and its seconds."""
    kind = instruction.collective
    assert kind is not None
    arrays = [array_bytes(*array) for array in instruction.arrays]
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        whole = max(sum(arrays[: len(arrays) // 2]), sum(arrays[len(arrays) // 2 :]))  # (operands, results)
    else:
        whole = sum(arrays)
    groups = replica_groups(instruction.attributes, target.devices)
    members = groups.shape[1]
    if kind == "reduce-scatter" and not instruction.opcode.endswith("-start"):
        whole *= members
    if members < 2 or not whole:
        return 0, 0.0
    hosts = max(len(np.unique(group // target.per_host)) for group in groups[:1])
    together = max(np.bincount(groups[0] // target.per_host))  # of a group in one host: they share its adapters
    rounds = 2 if kind == "all-reduce" else 1
    near = rounds * whole * (members - 1) / members / (target.card.link * WIRES)
    far = rounds * whole * (hosts - 1) / hosts / (target.card.network * together * WIRES)
    return whole, max(near, far) + (FAR if hosts > 1 else NEAR)


class Schedule:
    """Plays a program's schedule on a target; computations that run often are played once."""

    def __init__(self, program: Program, target: Target):
        self.program, self.target = program, target
        self._played: dict[str, Cost] = {}

    def step(self) -> Cost:
        """Of the whole program."""
        return self.play(self.program.entry)

    def play(self, computation: Computation) -> Cost:
        """Kernels wait for each other, collectives for each other, and a `-done` for its collective."""
        if computation.name in self._played:
            return self._played[computation.name]
        total, now, wires_free = Cost(), 0.0, 0.0
        ends: dict[str, float] = {}
        for instruction in computation.instructions:
            if instruction.opcode.endswith("-done") and instruction.operands:
                now = max(now, ends.get(instruction.operands[0], 0.0))
                continue
            if instruction.collective:
                size, seconds = wire_cost(instruction, self.target)
                wires_free = max(now, wires_free) + seconds
                total.wires += seconds
                total.collectives[instruction.collective] += size
                if instruction.opcode.endswith("-start"):
                    ends[instruction.name] = wires_free
                else:
                    now = wires_free
                continue
            cost = self._cost(instruction, computation)
            total.add(cost)
            now += cost.seconds
        total.seconds = max(now, wires_free)
        self._played[computation.name] = total
        return total

    def _cost(self, instruction: Instruction, where: Computation) -> Cost:
        cost = Cost()
        if instruction.opcode == "while":
            body = self.program.computations[instruction.called("body") or ""]
            cost.add(self.play(body), self.program.trip_count(instruction))
        elif instruction.opcode in ("call", "async-start", "conditional"):
            inside = self.program.inner(instruction)
            if inside is not None:
                cost.add(self.play(inside))
        elif instruction.opcode not in FREE:
            card = self.target.card
            cost.flops = self.program.flops(instruction, where)
            reached = ATTENTION if kernel_name(instruction) else PRODUCTS
            cost.products = cost.flops / (card.flops * reached)
            cost.traffic = traffic_bytes(self.program, instruction, where) / (card.bandwidth * TRAFFIC)
            for part in self.program.collectives(instruction):  # TPUs fuse them with what runs meanwhile
                size, seconds = wire_cost(part, self.target)
                cost.wires += seconds
                cost.collectives[part.collective or ""] += size
            cost.seconds = max(cost.products, cost.traffic, cost.wires, KERNEL)
        return cost
