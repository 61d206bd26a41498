"""Reads the text of a compiled program: products, traffic and collectives of one device, loop bodies times their trips.

XLA's own `cost_analysis` counts a loop body once, and a model whose layers are scanned is a loop. Syntax:
https://openxla.org/xla/operation_semantics; the TPU compiler writes products as convolutions, batch axes as windows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mora_jax.planning.groups import largest_hop

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# What moves no bytes of its own.
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "after-all", "partition-id",
    "replica-id", "optimization-barrier", "while", "conditional", "call", "add-dependency",
}  # fmt: skip
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

    @property
    def root(self) -> Instruction:
        return next(i for i in self.values() if i.root)

    @property
    def parameters(self) -> list[Instruction]:
        found = (i for i in self.values() if i.opcode == "parameter")
        return sorted(found, key=lambda i: int(i.text))


@dataclass
class Transfer:
    """One kind of collective: how often per step, and bytes that a device receives in it, `far` of them by network."""

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
            current = computations[header.group(2)] = Computation()
            entry = current if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            made = _instruction(line)
            current[made.name] = made
    return computations, entry


# ---------------------------------------------------------------- products


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]


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
    return _convolution(made, inside) if made.opcode == "convolution" else 0.0


# ---------------------------------------------------------------- bytes


def _through(name: str, inside: Computation) -> Instruction:
    """What a chain of bitcasts and copies begins with."""
    made = inside[name]
    while made.opcode in ("bitcast", "copy", "convert", "reshape") and made.operands:
        made = inside[made.operands[0]]
    return made


def _written(made: Instruction, fused: Computation) -> float:
    """Bytes of a fusion's result; of an update in place only the update."""
    root = fused.root
    names = root.operands if root.opcode == "tuple" else (root.name,)
    total = 0.0
    for shape, name in zip(made.shapes, names, strict=False):
        if shape.main:
            source = _through(name, fused)
            updated = source.opcode == "dynamic-update-slice"
            total += fused[source.operands[1]].bytes(main=False) if updated else shape.bytes
    return total


def _read(made: Instruction, fused: Computation, inside: Computation) -> float:
    """Bytes of a fusion's operands; of one that is only sliced the slices, of one that is updated in place nothing."""
    total = 0.0
    for parameter, name in zip(fused.parameters, made.operands, strict=False):
        whole = inside[name].bytes()
        if not whole:
            continue
        users = [i for i in fused.values() if parameter.name in i.operands]
        aliases = {parameter.name} | {i.name for i in users if i.opcode == "bitcast"}
        users = [i for i in fused.values() if aliases & set(i.operands) and i.opcode != "bitcast"]
        if users and all(i.opcode in SLICES and i.operands[0] in aliases for i in users):
            whole = min(whole, sum(i.bytes(main=False) for i in users))
        elif users and all(i.opcode == "dynamic-update-slice" and i.operands[0] in aliases for i in users):
            whole = 0.0
        total += whole
    return total


def _moved(made: Instruction, inside: Computation, computations: dict[str, Computation]) -> float:
    if made.opcode in FREE or made.opcode.endswith("-done"):
        return 0.0
    if made.opcode == "fusion":
        fused = computations[made.attribute(r"calls=%?([\w.\-]+)")]
        return _written(made, fused) + _read(made, fused, inside)
    if made.opcode.endswith("-start"):  # to or from fast memory: once through main memory
        return made.shapes[0].bytes
    if made.opcode in SLICES:
        return 2 * made.bytes()
    if made.opcode == "dynamic-update-slice":
        return 2 * inside[made.operands[1]].bytes()
    return made.bytes() + sum(inside[name].bytes() for name in made.operands if name in inside)


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
        """`seen`: channels of collectives counted already, for the TPU compiler cuts one into many pieces."""
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
            elif made.collective:
                self._collect(made, inside, total, seen)
        return total

    def _collect(self, made: Instruction, inside: Computation, total: Tally, seen: set[str]) -> None:
        channel = made.attribute(r"channel_id=(\d+)")
        if channel in seen:
            return
        seen.add(channel)
        size, far = largest_hop(made.attributes, self.per_host)
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
        there.far += received if far else 0.0
