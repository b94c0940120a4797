"""Safetensors files by parts: read the slice of a tensor that is needed, write one tensor at a time.

Knows no model. Reading goes through the safetensors library; writing streams, because the library's
writer wants every tensor of a file in memory twice. The bytes are those the library would write.
"""

import dataclasses
import json
import logging
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.files import clients, paths

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Names of the format, ours (and those of an HF config.json).
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAMES = {ours: theirs for theirs, ours in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A stored tensor: its file, its shape, and its type as the format names it (`BF16`, ...).

    begin: where its bytes begin, in a file on a store.
    """

    name: str
    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str
    begin: int = 0


def read_headers(folder: pathlib.Path) -> dict[str, Tensor]:
    """Every tensor of an HF folder by name, from the single file or else from the index; no data is read.

    Raises UserError naming a file that is missing or damaged, or a tensor the index promises in vain.
    """
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():
        if index.exists():
            log.warning("%s: %s is read and not the shards of %s, as in transformers", folder, SINGLE, INDEX)
        return {t.name: t for t in _header(single)}
    if index.exists():
        weight_map = _weight_map(index)
        found = [t for file in sorted(set(weight_map.values())) for t in _header(folder / file)]
        tensors = {t.name: t for t in found if weight_map.get(t.name) == t.file.name}
        lost = sorted(set(weight_map) - set(tensors))
        if lost:
            raise UserError(f"{folder / weight_map[lost[0]]}: {lost[0]} is not in it, but {INDEX} says so")
        return tensors
    raise UserError(f"{folder}: neither {SINGLE} nor {INDEX}; other formats are not read")


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    names = jsonl.read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{index}: weight_map must name the file of each tensor; fetch the file again")
    outside = [file for file in names.values() if pathlib.PurePath(file).name != file]
    if outside:
        raise UserError(f"{index}: {outside[0]!r} is not the name of a file beside it")
    return names


def _header(file: pathlib.Path) -> list[Tensor]:
    if paths.on_store(file):
        return _header_on_store(file)
    with _opened(file) as opened:
        parts = [(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118
        return [Tensor(name, file, tuple(part.get_shape()), part.get_dtype()) for name, part in parts]


def _header_on_store(file: pathlib.Path) -> list[Tensor]:
    """What `safe_open` would find, from the first bytes of the object."""
    try:
        with file.open("rb") as source:
            size = source.seek(0, os.SEEK_END)
            source.seek(0)
            length = int.from_bytes(source.read(8), "little")
            data = 8 + length
            fields = json.loads(source.read(min(length, size)))
        fields.pop("__metadata__", None)
        tensors = [
            Tensor(name, file, tuple(of["shape"]), of["dtype"], data + of["data_offsets"][0])
            for name, of in fields.items()
        ]
        end = max((data + of["data_offsets"][1] for of in fields.values()), default=data)
    except FileNotFoundError as error:
        raise UserError(f"{file}: not found, but {INDEX} names it; fetch the file again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error}); fetch the file again") from error
    if end != size:
        raise UserError(f"{file}: damaged ({size} bytes, its header says {end}); fetch the file again")
    return tensors


def _opened(file: pathlib.Path) -> safe_open:
    try:
        return safe_open(file, framework="numpy")
    except FileNotFoundError as error:
        raise UserError(f"{file}: not found, but {INDEX} names it; fetch the file again") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged ({error}); fetch the file again") from error


def check(tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise UserError unless the tensor is of floating type and of this shape."""
    if tensor.dtype not in _DTYPES:
        raise UserError(
            f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}; "
            f"convert the model to one of {', '.join(_NAMES)}"
        )
    if tensor.shape != shape:
        raise UserError(f"{tensor.file}: {tensor.name} has shape {tensor.shape}, config.json says {shape}")


def read_slice(tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor in its stored type; only this part leaves the disk, from a store its rows.

    index: a slice an axis. Raises UserError for a number in it that is not finite.
    """
    if paths.on_store(tensor.file):
        part = _read_rows(tensor, index[0])[(slice(None), *index[1:])]
    else:
        # Opened anew each time: an open file would keep all pages ever read in this process's memory.
        with _opened(tensor.file) as file:
            part = file.get_slice(tensor.name)[index]
    if not _all_finite(part):
        raise UserError(f"{tensor.file}: {tensor.name} holds NaN or infinity; fetch or train the model again")
    return part


def _all_finite(part: np.ndarray) -> bool:
    """Whether no number is NaN or infinite, by the bits, which are ordered as sizes are: no copy is made."""
    width = 8 * part.itemsize
    infinite = int(np.array(np.inf, part.dtype).view(f"u{part.itemsize}"))
    bits = (part.view(f"i{part.itemsize}"), part.view(f"u{part.itemsize}"))  # positive and negative ones last
    limits = (infinite, infinite | 1 << (width - 1))
    return not part.size or all(int(x.max()) < limit for x, limit in zip(bits, limits, strict=True))


def _read_rows(tensor: Tensor, rows: slice) -> np.ndarray:
    """The rows [start, stop) of a tensor on a store, in one request."""
    first, last, _ = rows.indices(tensor.shape[0])
    dtype = jnp.dtype(_DTYPES[tensor.dtype])
    row = math.prod(tensor.shape[1:]) * dtype.itemsize
    found = clients.read(tensor.file, tensor.begin + first * row, tensor.begin + last * row)
    if len(found) != (last - first) * row:
        raise UserError(f"{tensor.file}: damaged ({tensor.name} is cut short); fetch the file again")
    return np.frombuffer(found, dtype).reshape(last - first, *tensor.shape[1:])


def dtype_name(dtype: str) -> str:
    """The format's name of a type; UserError for types that models are not stored in."""
    if dtype not in _NAMES:
        raise UserError(f"dtype={dtype!r}: a model is stored as one of {', '.join(_NAMES)}")
    return _NAMES[dtype]


def write_file(
    path: pathlib.Path, shapes: Mapping[str, Sequence[int]], dtype: str, arrays: Iterable[np.ndarray]
) -> int:
    """A new file of tensors, as of `write_tensors`; nothing that is there already is written to."""
    with path.open("xb") as file:
        return write_tensors(file, shapes, dtype, arrays)


def write_tensors(
    file: IO[bytes], shapes: Mapping[str, Sequence[int]], dtype: str, arrays: Iterable[np.ndarray]
) -> int:
    """Write tensors of one type, sorted by name, as `arrays` yields them; returns the bytes of data."""
    itemsize = jnp.dtype(dtype).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        begin, end = end, end + int(np.prod(shapes[name])) * itemsize
        shape = [int(n) for n in shapes[name]]
        header[name] = {"dtype": dtype_name(dtype), "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, array in zip(sorted(shapes), arrays, strict=True):
        if array.shape != tuple(shapes[name]) or str(array.dtype) != dtype:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, not {dtype} {shapes[name]}")
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return end
