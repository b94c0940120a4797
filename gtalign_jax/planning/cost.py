"""What a parsed program costs on one device: collectives and matrix work."""

import collections
import dataclasses
import functools
import math
import re

from gtalign_jax.planning.hlo import Instruction, Lines, Module, nbytes, shapes

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """kind, bytes of the larger side of one execution on one device, devices in a group, executions.

    where: the source operation's path, for messages. shift: from a device's number to that of the one it
    sends to, of a permute along an axis.
    """

    kind: str
    bytes: float
    group: int
    times: float
    where: str
    shape: tuple[int, ...]
    shift: int = 0


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
        shift=_shift(line.attributes),
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


def _shift(attributes: str) -> int:
    """The commonest difference between source and target: all but those that wrap around have it."""
    listed = re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)
    pairs = re.findall(r"\{(\d+),(\d+)\}", listed[1]) if listed else []
    shifts = collections.Counter(int(target) - int(source) for source, target in pairs)
    return shifts.most_common(1)[0][0] if shifts else 0


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


def _dot_flops(line: Instruction, lines: Lines) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes)
    assert contracted is not None  # every product says so
    left = _dims(lines[line.operands[0]])
    return 2.0 * math.prod(_dims(line)) * math.prod(left[int(d)] for d in contracted[1].split(",") if d)


def _convolution_flops(line: Instruction, lines: Lines) -> float:
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
