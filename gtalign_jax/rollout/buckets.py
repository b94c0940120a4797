"""The few shapes that programs are compiled for."""

import bisect
import dataclasses
from collections.abc import Sequence

from gtalign_jax.errors import UserError, increasing


@dataclasses.dataclass(frozen=True)
class BucketConfig:
    """Sizes to pad to, each increasing.

    prompt: prompt slots S. completion: completion slots N. batch: numbers of prompts P in a batch; a
    batch between two of them is padded with empty prompts, and () takes every batch as it comes.
    """

    prompt: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    completion: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    batch: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        increasing(self, "prompt", "completion", "batch")
        for name in ("prompt", "completion"):
            if not getattr(self, name):
                raise ValueError(f"{name}=(): give at least one size")


def bucket(size: int, sizes: Sequence[int], field: str, what: str) -> int:
    """The smallest bucket that holds `size`; UserError names the field when there is none."""
    if size <= sizes[-1]:
        return sizes[bisect.bisect_left(sizes, size)]
    raise UserError(f"{what} needs {size} slots, over the largest of buckets.{field}={sizes}; add a size")
