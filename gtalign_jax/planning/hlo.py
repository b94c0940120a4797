"""A compiled program's HLO text as data, with the number of times each of its computations runs.

XLA's own cost analysis counts the body of a loop once. Here loops are multiplied by their trip count,
read from the loop's counter (where it starts, what a turn adds, what ends it); one whose count is only known
at run time (decoding) takes the number the caller gives.
"""

import collections
import dataclasses
import functools
import math
import re

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2,
    "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program. attributes: what follows, or a constant's value or a parameter's number."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


Lines = dict[str, Instruction]  # a computation


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A parsed program: computations by name, and how often each runs."""

    computations: dict[str, Lines]
    entry: str
    unknown_trips: int = 1

    @functools.cached_property
    def runs(self) -> dict[str, float]:
        """Executions of every computation that is reached from the entry."""
        order, seen = [], set()

        def visit(name: str) -> None:
            if name in seen or name not in self.computations:
                return
            seen.add(name)
            lines = self.computations[name]
            for line in lines.values():
                for called, _ in self._calls(line, lines):
                    visit(called)
            order.append(name)

        visit(self.entry)
        counts: dict[str, float] = collections.defaultdict(float)
        counts[self.entry] = 1.0
        for name in reversed(order):
            lines = self.computations[name]
            for line in lines.values():
                for called, times in self._calls(line, lines):
                    counts[called] += counts[name] * times
        return dict(counts)

    def _calls(self, line: Instruction, lines: Lines) -> list[tuple[str, float]]:
        called = dict(CALLED.findall(line.attributes))
        if line.opcode == "while":
            trips = self.trips(line, lines)
            return [(called["body"], trips), (called["condition"], trips)]
        branches = _BRANCHES.search(line.attributes)
        names = _OPERAND.findall(branches[1]) if branches else []
        return [(name, 1.0) for name in (*called.values(), *names)]

    def trips(self, loop: Instruction, lines: Lines) -> float:
        """Turns of a loop among `lines`: its annotation, or what its counter says."""
        known = re.search(r'known_trip_count":?\{"?n"?:"?(\d+)', loop.attributes)
        if known:
            return float(known[1])
        called = dict(CALLED.findall(loop.attributes))
        condition, body = self.computations[called["condition"]], self.computations[called["body"]]
        test = _root(condition)
        if test.opcode == "compare" and "direction=LT" in test.attributes:
            counter, bound = (_behind(condition, name) for name in test.operands)
            start = _behind(lines, _part(lines[loop.operands[0]], counter))
            added = _behind(body, _part(_root(body), counter))
            first, end, step = _constant(start), _constant(bound), _step(added, body, counter)
            if first is not None and end is not None and step:
                return float(len(range(first, end, step)))
        return float(self.unknown_trips)


def _root(lines: Lines) -> Instruction:
    return next(line for line in lines.values() if line.root)


def _behind(lines: Lines, name: str | None) -> Instruction | None:
    """The instruction that made a value, seen through copies of it."""
    line = lines.get(name or "")
    while line is not None and line.opcode in ("copy", "bitcast", "convert"):
        line = lines.get(line.operands[0])
    return line


def _index(line: Instruction | None) -> int | None:
    """Which part of a tuple an instruction takes."""
    taken = (
        line is not None and line.opcode == "get-tuple-element" and re.search(r"index=(\d+)", line.attributes)
    )
    return int(taken[1]) if taken else None


def _part(made: Instruction, counter: Instruction | None) -> str | None:
    """Where a tuple takes the part that `counter` reads from it."""
    index = _index(counter)
    return None if index is None or made.opcode != "tuple" else made.operands[index]


def _constant(line: Instruction | None) -> int | None:
    if line is None or line.opcode != "constant" or not re.fullmatch(r"-?\d+", line.attributes):
        return None
    return int(line.attributes)


def _step(line: Instruction | None, body: Lines, counter: Instruction | None) -> int | None:
    """What a turn adds to the counter; None where it does anything else."""
    if line is None or line.opcode != "add":
        return None
    behind = [_behind(body, name) for name in line.operands]
    steps = [_constant(x) for x in behind if _index(x) != _index(counter)]
    return steps[0] if len(steps) == 1 else None


def parse(text: str, unknown_trips: int = 1) -> Module:
    """The module of `compiled.as_text()`."""
    computations: dict[str, Lines] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and " = " not in line.split("(")[0]:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (named := _NAME.match(line)):
            instruction = _instruction(named[2], named[3], bool(named[1]))
            current[instruction.name] = instruction
    return Module(computations, entry, unknown_trips)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    operands = tuple(_OPERAND.findall(text[opening:closing]))
    opcode = text[end:opening].strip()
    inside = text[opening + 1 : closing]
    attributes = inside if opcode in ("constant", "parameter") else text[closing + 1 :]
    return Instruction(name, text[:end], opcode, operands, attributes, root)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text) - 1


def shapes(kind: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """(dtype, dimensions, lies in main memory) of the arrays of a type."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(kind):
        if dtype in BYTES:
            size = tuple(int(d) for d in dims.split(",") if d)
            found.append((dtype, size, "S(" not in layout))
    return found


def nbytes(kind: str, main_memory_only: bool = False) -> float:
    """Bytes of a type, or of its part that is not in on-chip memory."""
    arrays = shapes(kind)
    return sum(BYTES[d] * math.prod(size) for d, size, main in arrays if main or not main_memory_only)
