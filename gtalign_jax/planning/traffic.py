"""Bytes that a parsed program moves between one device and its main memory."""

import math
import re

from gtalign_jax.planning.hlo import BYTES, CALLED, Instruction, Lines, Module, nbytes, shapes

# Instructions that move nothing: names for parts of other values, and the ends of asynchronous pairs.
_FREE = set(
    """parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id
    replica-id copy-done slice-done async-done async-update all-gather-done all-reduce-done
    collective-permute-done opt-barrier custom-call iota""".split()
)
_READS_PART = ("dynamic-slice", "slice", "gather")


def traffic(module: Module) -> float:
    """Bytes that instructions read from and write to main memory on one device, fusions as units.

    A fusion that only slices an operand reads the slice; one that updates a slice in place writes it.
    """
    fused = {
        called
        for lines in module.computations.values()
        for line in lines.values()
        if line.opcode not in ("while", "conditional", "call")
        for called in dict(CALLED.findall(line.attributes)).values()
    }
    total = 0.0
    for name, lines in module.computations.items():
        times = module.runs.get(name, 0.0)
        if times and name not in fused:
            total += times * sum(
                _moved(module, line, lines) for line in lines.values() if line.opcode not in _FREE
            )
    return total


def _in_main(name: str, lines: Lines) -> float:
    """Bytes of an operand in main memory."""
    return nbytes(lines[name].type, True) if name in lines else 0.0


def _moved(module: Module, line: Instruction, lines: Lines) -> float:
    if line.opcode == "fusion":
        return _moved_by_fusion(module, line, lines)
    if line.opcode in _READS_PART:
        return 2 * nbytes(line.type, True)
    if line.opcode == "dynamic-update-slice":
        return 2 * _in_main(line.operands[1], lines)
    if line.opcode in ("copy-start", "slice-start"):
        # Between main and on-chip memory: what arrives. The source is named in the result, too.
        return min(BYTES[d] * math.prod(size) for d, size, _ in shapes(line.type) if size)
    return nbytes(line.type, True) + sum(_in_main(name, lines) for name in line.operands)


def _moved_by_fusion(module: Module, line: Instruction, lines: Lines) -> float:
    body, passed = _body(module, line), _passed_through(line)
    read = sum(
        _read(module, body, number)
        for number, name in enumerate(line.operands)
        if number not in passed.values() and _in_main(name, lines)
    )
    results = shapes(line.type)
    sizes = [BYTES[dtype] * math.prod(size) for dtype, size, _ in results]
    root = next(inner for inner in body.values() if inner.root)
    made = root.operands if root.opcode == "tuple" else (root.name,)
    if len(made) == len(sizes):  # else one instruction makes them all
        sizes = [_written(module, body, name) for name in made]
    kept = (size for i, size in enumerate(sizes) if results[i][2] and i not in passed)
    return read + sum(kept)


def _body(module: Module, fusion: Instruction) -> Lines:
    return module.computations[dict(CALLED.findall(fusion.attributes))["calls"]]


def _read(module: Module, body: Lines, number: int) -> float:
    """Bytes that a fusion reads of its operand `number`."""
    value = _parameter(body, number)
    return 0.0 if value is None else _share(module, body, value) * nbytes(value.type)


def _parameter(body: Lines, number: int) -> Instruction | None:
    parameters = (line for line in body.values() if line.opcode == "parameter")
    return next((line for line in parameters if int(line.attributes) == number), None)


def _share(module: Module, body: Lines, value: Instruction, wanted: float = 1.0) -> float:
    """The share of a value that a fusion needs: the slices it takes, nothing where it updates it, else all.

    Also where a fusion inside the fusion takes the slice, or copies what is sliced after it. wanted: the
    share of the fusion's own result that is needed.
    """
    total = wanted if value.root else 0.0
    for reader in body.values():
        if value.name not in reader.operands:
            continue
        first = reader.operands[0] == value.name
        if reader.opcode in _READS_PART and first:
            total += _elements(reader) / _elements(value)
        elif reader.opcode in ("bitcast", "copy", "convert"):
            total += _share(module, body, reader, wanted)
        elif reader.opcode == "fusion":
            inside, asked = _body(module, reader), _share(module, body, reader, wanted)
            at = (number for number, name in enumerate(reader.operands) if name == value.name)
            inner = (_parameter(inside, number) for number in at)
            total += sum(_share(module, inside, line, asked) for line in inner if line is not None)
        elif reader.opcode != "dynamic-update-slice" or not first:
            return 1.0
    return min(total, 1.0)


def _elements(line: Instruction) -> int:
    return sum(math.prod(size) for _, size, _ in shapes(line.type))


def _written(module: Module, body: Lines, name: str) -> float:
    """Bytes that a fusion writes of its result: the slice where it updates one in place."""
    made = body[name]
    if made.opcode == "dynamic-update-slice":
        return nbytes(body[made.operands[1]].type)
    if made.opcode == "bitcast":
        return _written(module, body, made.operands[0])
    if made.opcode == "fusion":
        inside = _body(module, made)
        root = next(line for line in inside.values() if line.root)
        return nbytes(made.type) if root.opcode == "tuple" else _written(module, inside, root.name)
    return nbytes(made.type)


def _passed_through(line: Instruction) -> dict[int, int]:
    """Result → operand that it takes the place of: buffers of a collective that goes on meanwhile."""
    found = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", line.attributes)
    pairs = re.findall(r"\{(\d+)\}: \((\d+), \{\}\)", found[1]) if found else []
    return {int(result): int(operand) for result, operand in pairs}
