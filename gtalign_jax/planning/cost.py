"""What a parsed program costs on one device: collectives, matrix work and memory traffic."""

import collections
import dataclasses
import functools
import math
import re

from gtalign_jax.planning.hlo import BYTES, CALLED, Instruction, Module, nbytes, shapes

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Instructions that move nothing: names for parts of other values, and the ends of asynchronous pairs.
_FREE = set(
    """parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id
    replica-id copy-done slice-done async-done async-update all-gather-done all-reduce-done
    collective-permute-done opt-barrier custom-call iota""".split()
)
_READS_PART = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Collective:
    """kind, bytes of the larger side of one execution on one device, devices in a group, executions.

    where: the source operation's path, for messages.
    """

    kind: str
    bytes: float
    group: int
    times: float
    where: str
    shape: tuple[int, ...]


def collectives(module: Module) -> list[Collective]:
    """Every collective of the program once, however many pieces the compiler cut it into.

    The pieces of one collective share a channel. TPU's fused all-reduce + slice is a reduce-scatter.
    """
    found: dict[tuple, Collective] = {}
    for name, lines in module.computations.items():
        times = module.runs.get(name, 0.0)
        if not times:
            continue
        for line in lines.values():
            kind = line.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                item = _collective(module, name, line, kind, times)
                channel = re.search(r"channel_id=(\d+)", line.attributes)
                key = (channel[1],) if channel else (name, line.name)
                # Pieces that wait for it may stand inside a loop; its start, which counts, does not.
                if key not in found or found[key].times > times:
                    found[key] = item
    return [item for item in found.values() if item.group > 1]


def _collective(module: Module, name: str, line: Instruction, kind: str, times: float) -> Collective:
    lines = module.computations[name]
    inputs = sum(nbytes(lines[o].type) for o in line.operands if o in lines)
    output = nbytes(line.type)
    if line.opcode.endswith("-start"):
        output = max(output - inputs, inputs) if kind != "all-reduce" else output
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    where = re.search(r'op_name="([^"]*)"', line.attributes)
    return Collective(
        kind=kind,
        bytes=max(inputs, output) if kind != "all-reduce" else output,
        group=_group_size(line),
        times=times,
        where=where[1] if where else line.name,
        shape=max((s for _, s, _ in shapes(line.type)), key=math.prod, default=()),
    )


def _group_size(line: Instruction) -> int:
    text = line.attributes
    if line.opcode.startswith("collective-permute"):
        return 2
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]) if axis in sizes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(listed[1].split(","))
    return 1


def flops(module: Module) -> float:
    """Floating-point operations of the matrix products on one device (2 per multiply-add)."""
    total = 0.0
    for name, lines in module.computations.items():
        times = module.runs.get(name, 0.0)
        for line in lines.values():
            if times and line.opcode in ("dot", "convolution"):
                count = _dot_flops if line.opcode == "dot" else _convolution_flops
                total += times * count(line, lines)
    return total


def _dims(line: Instruction) -> tuple[int, ...]:
    return shapes(line.type)[0][1]


def _dot_flops(line: Instruction, lines: dict[str, Instruction]) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes)
    assert contracted is not None  # every product says so
    left = _dims(lines[line.operands[0]])
    return 2.0 * math.prod(_dims(line)) * math.prod(left[int(d)] for d in contracted[1].split(",") if d)


def _convolution_flops(line: Instruction, lines: dict[str, Instruction]) -> float:
    """TPU programs write matrix products as convolutions; taps that fall on padding do no work."""
    spec = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
    assert spec is not None  # every convolution says so
    left, right, out = (
        dict(zip(labels, dims, strict=True))
        for labels, dims in zip(
            spec.groups(), (_dims(lines[o]) for o in (*line.operands, line.name)), strict=True
        )
    )
    work = 2.0 * out["b"] * out["f"] * right["i"]
    window = _window(line.attributes)
    for axis in (label for label in right if label.isdigit()):
        options = {key: values[int(axis)] for key, values in window.items()}
        work *= _valid_taps(left[axis], right[axis], out[axis], options)
    return work


def _window(attributes: str) -> dict[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    pairs = [pair.split("=") for pair in found[1].split()] if found else []
    return {key: value.split("x") for key, value in pairs}


@functools.lru_cache(maxsize=4096)
def _taps(size: int, kernel: int, out: int, stride: int, low: int, base: int, dilation: int) -> int:
    width = (size - 1) * base + 1
    count = 0
    for tap in range(kernel):
        # Positions o with 0 <= o * stride - low + tap * dilation < width that hit an element.
        offset = tap * dilation - low
        first, last = max(0, -(offset // stride)), min(out - 1, (width - 1 - offset) // stride)
        if base == 1:
            count += max(0, last - first + 1)
        else:
            count += sum((o * stride + offset) % base == 0 for o in range(first, last + 1))
    return count


def _valid_taps(size: int, kernel: int, out: int, options: dict[str, str]) -> int:
    low = int(options.get("pad", "0_0").split("_")[0])
    stride, base, dilation = (int(options.get(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    return _taps(size, kernel, out, stride, low, base, dilation)


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


def _in_main(name: str, lines: dict[str, Instruction]) -> float:
    """Bytes of an operand in main memory."""
    return nbytes(lines[name].type, True) if name in lines else 0.0


def _moved(module: Module, line: Instruction, lines: dict[str, Instruction]) -> float:
    if line.opcode == "fusion":
        body = module.computations.get(dict(CALLED.findall(line.attributes)).get("calls", ""), {})
        return _moved_by_fusion(line, lines, body)
    if line.opcode in _READS_PART:
        return 2 * nbytes(line.type, True)
    if line.opcode == "dynamic-update-slice":
        return 2 * _in_main(line.operands[1], lines)
    if line.opcode in ("copy-start", "slice-start"):
        # Between main and on-chip memory: what arrives. The source is named in the result, too.
        return min(BYTES[d] * math.prod(size) for d, size, _ in shapes(line.type) if size)
    return nbytes(line.type, True) + sum(_in_main(name, lines) for name in line.operands)


def _moved_by_fusion(line: Instruction, lines: dict[str, Instruction], body: dict[str, Instruction]) -> float:
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for inner in body.values():
        for name in inner.operands:
            users[name].append(inner)
    updates = [inner for inner in body.values() if inner.opcode == "dynamic-update-slice"]
    in_place = {inner.operands[0] for inner in updates}
    parameters = {int(inner.attributes): inner for inner in body.values() if inner.opcode == "parameter"}
    passed = _passed_through(line)
    total = 0.0
    for number, name in enumerate(line.operands):
        if number in passed.values() or name not in lines or not nbytes(lines[name].type, True):
            continue
        inside = parameters.get(number)
        readers = users[inside.name] if inside is not None else []
        if inside is not None and inside.name in in_place:
            continue
        if readers and all(reader.opcode in _READS_PART for reader in readers):
            total += sum(nbytes(reader.type) for reader in readers)
        else:
            total += nbytes(lines[name].type, True)
    if updates:
        return total + sum(
            nbytes(body[inner.operands[1]].type) for inner in updates if inner.operands[1] in body
        )
    results = enumerate(shapes(line.type))
    return total + sum(
        BYTES[d] * math.prod(size) for i, (d, size, main) in results if main and i not in passed
    )


def _passed_through(line: Instruction) -> dict[int, int]:
    """Result → operand that it takes the place of: buffers of a collective that goes on meanwhile."""
    found = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", line.attributes)
    pairs = re.findall(r"\{(\d+)\}: \((\d+), \{\}\)", found[1]) if found else []
    return {int(result): int(operand) for result, operand in pairs}
