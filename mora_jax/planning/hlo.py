"""Reads the text of a compiled program: products, traffic and collectives of one device, loop bodies times their trips.

XLA's own `cost_analysis` counts a loop body once, and a model whose layers are scanned is a loop. Syntax:
https://openxla.org/xla/operation_semantics; the TPU compiler writes products as convolutions, batch axes as windows.
A Pallas kernel is one call: its products are those that it states, its traffic what it reads and writes once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mora_jax.planning.groups import spread

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# Those in which devices of one host can fetch different parts from other hosts and hand them on among themselves.
SHARED = ("all-gather", "all-reduce", "reduce-scatter")
# What moves no bytes of its own.
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "after-all", "partition-id",
    "replica-id", "optimization-barrier", "while", "conditional", "call", "add-dependency",
}  # fmt: skip
# How Pallas kernels say their products: Mosaic in the call's own config, ours for Triton in its name.
KERNEL_FLOPS = r'(?:"cost_estimate":{"flops":"|op_name="[^"]*\bflops=)(\d+)'
CALLS = r"calls=%?([\w.\-]+)"
STARTS = "AsyncCollectiveStart"
SLICES = ("dynamic-slice", "slice", "gather")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Shape:
    """One array: `dims`, its size in bytes without padding, and whether it lies in main memory (HBM)."""

    dims: tuple[int, ...]
    bytes: float
    main: bool


@dataclass(frozen=True)
class Instruction:
    """One line of a computation; a tuple has several shapes."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str  # between the parentheses, for constants and parameters
    attributes: str
    root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regex on the attributes."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    @property
    def collective(self) -> str | None:
        """Its kind, where it is a collective; the second half of an asynchronous one is none."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    def bytes(self, main: bool = True) -> float:
        """Of the result; with `main` only what lies in main memory."""
        return sum(shape.bytes for shape in self.shapes if shape.main or not main)


class Computation(dict[str, Instruction]):
    """Instructions by name, in their order."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    @property
    def root(self) -> Instruction:
        return next(i for i in self.values() if i.root)

    @property
    def continues(self) -> bool:
        """Whether it holds a later piece of a collective: the TPU compiler lets one go on inside several fusions.

        Their text repeats the collective; it counts where it starts, be that outside of the loop that it goes on in.
        """
        targets = [i.attributes for i in self.values() if i.opcode == "custom-call"]
        if any("AsyncCollectiveDone" in target for target in targets):
            return True
        return self.name.startswith("async_collective_fusion") and not any(STARTS in target for target in targets)

    @property
    def parameters(self) -> list[Instruction]:
        found = (i for i in self.values() if i.opcode == "parameter")
        return sorted(found, key=lambda i: int(i.text))


@dataclass
class Transfer:
    """One kind of collective: how often per step, and bytes that a device receives in it.

    `far`: those of them that come through its own adapter to other hosts, if all devices of a host share the work.
    """

    count: float = 0
    bytes: float = 0
    far: float = 0


@dataclass
class Tally:
    """What one device does: FLOPs of products, bytes to and from main memory, transfers by kind."""

    flops: float = 0
    bytes: float = 0
    collectives: dict[str, Transfer] = field(default_factory=dict)

    def add(self, other: Tally, times: float = 1) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for kind, there in other.collectives.items():
            here = self.collectives.setdefault(kind, Transfer())
            here.count += times * there.count
            here.bytes += times * there.bytes
            here.far += times * there.far


# ---------------------------------------------------------------- syntax


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for kind, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(d) for d in dims.split(",") if d)
        width = BYTES[kind] if kind in BYTES else int(re.sub(r"^[a-z]+(\d+).*", r"\1", kind)) / 8
        found.append(Shape(sizes, width * float(np.prod(sizes)), not re.search(r"S\([1-9]", layout)))
    return tuple(found)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced: {text[:80]}")


def _instruction(line: str) -> Instruction:
    left, _, rest = line.strip().partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    inside = rest[start + 1 : stop]
    operands = tuple(_NAME.findall(inside))
    name, root = left.removeprefix("ROOT "), left.startswith("ROOT ")
    return Instruction(name.lstrip("%"), rest[:start], _shapes(kind), operands, inside, rest[stop + 1 :], root)


def parse(text: str) -> tuple[dict[str, Computation], Computation]:
    """All computations of a module by name, and its entry."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header.group(2)] = Computation(header.group(2))
            entry = current if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            made = _instruction(line)
            current[made.name] = made
    return computations, entry


# ---------------------------------------------------------------- products


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"-?\d+", text or "")]


def _dot(made: Instruction, inside: Computation) -> float:
    contracted = _numbers(made.attribute(r'lhs_contracting_dim(?:s|ensions)"?[=:][{\[]([^}\]]*)'))
    left = inside[made.operands[0]].shapes[0].dims
    return 2.0 * float(np.prod(made.shapes[0].dims)) * float(np.prod([left[d] for d in contracted]))


def _window(made: Instruction, key: str, default: int, axes: int) -> list[list[int]]:
    found = made.attribute(rf"window={{[^}}]*\b{key}=([^ }}]+)")
    return [_numbers(part) for part in found.split("x")] if found else [[default]] * axes


def _convolution(made: Instruction, inside: Computation) -> float:
    """2 x the pairs of input and kernel that meet: of a padded or dilated window many do not."""
    left, kernel, out = (made.attribute(rf"dim_labels={part}") for part in (r"(\w+)_", r"\w+_(\w+)->", r"\w+->(\w+)"))
    lhs, rhs = (inside[name].shapes[0].dims for name in made.operands[:2])
    result = made.shapes[0].dims
    axes = len(out) - 2
    keys = ("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1)
    strides, pads, left_dilate, right_dilate = (_window(made, key, default, axes) for key, default in keys)
    flops = 2.0 * result[out.index("b")] * result[out.index("f")] * rhs[kernel.index("i")]
    for d in range(axes):
        label, dilate = str(d), left_dilate[d][0]
        at = np.arange(result[out.index(label)])[:, None] * strides[d][0] - pads[d][0]
        at = at + np.arange(rhs[kernel.index(label)])[None] * right_dilate[d][0]
        flops *= np.sum((at >= 0) & (at <= (lhs[left.index(label)] - 1) * dilate) & (at % dilate == 0))
    return float(flops)


def _flops(made: Instruction, inside: Computation) -> float:
    if made.opcode == "dot" or (made.opcode == "custom-call" and "__cublas" in made.attributes):
        return _dot(made, inside)
    if made.opcode == "custom-call":
        return float(made.attribute(KERNEL_FLOPS) or 0)
    return _convolution(made, inside) if made.opcode == "convolution" else 0.0


# ---------------------------------------------------------------- bytes


def _through(name: str, inside: Computation) -> Instruction:
    """What a chain of bitcasts and copies begins with."""
    made = inside[name]
    while made.opcode in ("bitcast", "copy", "convert", "reshape") and made.operands:
        made = inside[made.operands[0]]
    return made


def _written(made: Instruction, computations: dict[str, Computation]) -> float:
    """Bytes of a fusion's result; of an update in place only the update."""
    fused = computations[made.attribute(CALLS)]
    root = fused.root
    names = root.operands if root.opcode == "tuple" else (root.name,)
    total = 0.0
    for shape, name in zip(made.shapes, names, strict=False):
        source = _through(name, fused)
        if shape.main and fused[name].opcode != "parameter" and not source.collective:
            total += _updated(source, fused, computations) or shape.bytes
    return total


def _updated(source: Instruction, fused: Computation, computations: dict[str, Computation]) -> float:
    """Bytes of the update where `source` updates in place, itself or at the end of a fusion within; else 0."""
    if source.opcode == "fusion":
        inner = computations[source.attribute(CALLS)]
        return _updated(_through(inner.root.name, inner), inner, computations)
    return fused[source.operands[1]].bytes(main=False) if source.opcode == "dynamic-update-slice" else 0.0


def _used(name: str, fused: Computation, computations: dict[str, Computation]) -> float:
    """Bytes that a fusion reads of one array: of one that is only sliced the slices, of one updated in place none."""
    total = 0.0
    for user in fused.values():
        for position in (i for i, operand in enumerate(user.operands) if operand == name):
            if user.collective or user.opcode == "tuple":  # counted as a collective, or handed on
                continue
            if user.opcode == "bitcast" or "output_to_operand_aliasing" in user.attributes:  # int8 in another tiling
                total += _used(user.name, fused, computations)
            elif user.opcode == "fusion":
                inner = computations[user.attribute(CALLS)]
                total += _used(inner.parameters[position].name, inner, computations)
            elif user.opcode in SLICES and position == 0:
                total += user.bytes(main=False)
            elif user.opcode != "dynamic-update-slice" or position:
                return fused[name].bytes(main=False)
    return min(total, fused[name].bytes(main=False))


def _read(made: Instruction, inside: Computation, computations: dict[str, Computation]) -> float:
    """Bytes of a fusion's operands that lie in main memory."""
    fused = computations[made.attribute(CALLS)]
    pairs = zip(fused.parameters, made.operands, strict=False)
    return sum(_used(parameter.name, fused, computations) for parameter, name in pairs if inside[name].bytes())


def _moved(made: Instruction, inside: Computation, computations: dict[str, Computation]) -> float:
    if made.opcode in FREE or made.opcode.endswith("-done"):
        return 0.0
    if made.opcode == "fusion":
        root = computations[made.attribute(CALLS)].root
        if "AsyncCollective" in root.attributes:
            return made.shapes[1].bytes if STARTS in root.attributes else 0.0
        return _written(made, computations) + _read(made, inside, computations)
    if made.opcode.endswith("-start"):  # to or from fast memory: once through main memory
        return made.shapes[0].bytes
    if made.opcode in SLICES:
        return 2 * made.bytes()
    if made.opcode == "dynamic-update-slice":
        return 2 * inside[made.operands[1]].bytes()
    return made.bytes() + sum(inside[name].bytes() for name in made.operands if name in inside)


def _far(kind: str, size: int, least: int) -> float:
    """The share of what a device of a host with `least` of `size` devices receives that comes from other hosts.

    Where the host's devices can share, each fetches its part of what the host has not got, (size - least) / (size - 1)
    of everything, and the others have it from that device.
    """
    if least == size:
        return 0.0
    return (size - least) / (size - 1) / least if kind in SHARED else 1.0


# ---------------------------------------------------------------- the walk


class Reader:
    """Adds up one module. `open_trips`: of a loop whose trips no constant says; `per_host`: devices of a host."""

    def __init__(self, text: str, open_trips: int, per_host: int):
        self.computations, self.entry = parse(text)
        self.open_trips, self.per_host = open_trips, per_host

    def tally(self) -> Tally:
        return self._of(self.entry, moves=True, seen=set())

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs: what the compiler noted, else limit / step of `counter < limit` from 0."""
        if known := loop.attribute(r'known_trip_count"?:{"?n"?:"(\d+)'):
            return int(known)
        condition, body = (self.computations[loop.attribute(rf"{part}=%?([\w.\-]+)")] for part in ("condition", "body"))
        test = condition.root
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return self.open_trips
        counter, limit = (_through(name, condition) for name in test.operands)
        if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
            return self.open_trips
        step = 1
        update = _through(body.root.operands[int(counter.attribute(r"index=(\d+)"))], body)
        if update.opcode == "add":
            steps = [i for i in (_through(name, body) for name in update.operands) if i.opcode == "constant"]
            step = int(steps[0].text) if steps else 1
        return -(-int(limit.text) // step)

    def _called(self, made: Instruction) -> Iterator[Computation]:
        for names in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", made.attributes):
            yield self.computations[names]

    def _branches(self, made: Instruction) -> list[Computation]:
        listed = made.attribute(r"branch_computations={([^}]*)}")
        either = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", made.attributes)
        return [self.computations[name] for name in (_NAME.findall(listed) if listed else either)]

    def _of(self, inside: Computation, moves: bool, seen: set[str]) -> Tally:
        """`seen`: channels of collectives that were counted already in this run of the body."""
        total = Tally()
        for made in inside.values():
            total.flops += _flops(made, inside)
            total.bytes += _moved(made, inside, self.computations) if moves else 0.0
            if made.opcode == "while":
                body = self.computations[made.attribute(r"body=%?([\w.\-]+)")]
                total.add(self._of(body, moves, set()), self.trips(made))
            elif made.opcode == "conditional":  # the dear branch is for what hardly happens: two equal scores
                total.add(min((self._of(b, moves, set()) for b in self._branches(made)), key=lambda t: t.bytes))
            elif made.opcode in ("call", "async-start"):
                for called in self._called(made):
                    total.add(self._of(called, moves, seen))
            elif made.opcode == "fusion":
                for called in self._called(made):
                    total.add(self._of(called, False, seen))
            elif made.collective and not inside.continues:
                self._collect(made, inside, total, seen)
        return total

    def _collect(self, made: Instruction, inside: Computation, total: Tally, seen: set[str]) -> None:
        channel = made.attribute(r"channel_id=(\d+)")
        if channel is not None:  # without one, no other line speaks of the same collective
            if channel in seen:
                return
            seen.add(channel)
        size, least = spread(made.attributes, self.per_host)
        given = sum(inside[name].bytes(main=False) for name in made.operands if name in inside)
        share = (size - 1) / size
        received = {
            "all-gather": given * (size - 1),
            "all-reduce": 2 * given * share,  # a reduce-scatter and an all-gather
            "collective-permute": given,
        }.get(made.collective, given * share)
        there = total.collectives.setdefault(made.collective, Transfer())
        there.count += 1
        there.bytes += received
        there.far += received * _far(made.collective, size, least)
