"""A seeded family of questions: every combination of its slots is one, in the training or the test split."""

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

TEST_SHARE = 0.15


def _all(row: Mapping[str, Any]) -> bool:
    del row
    return True


@dataclasses.dataclass(frozen=True)
class Family:
    """slots: the choices of each slot. write: slots → (question, truth). sensible: combinations that count.

    labels: slots that say which variant of a question is asked; all variants fall into the same split.
    """

    slots: Mapping[str, tuple]
    write: Callable[..., tuple[str, str]]
    sensible: Callable[[Mapping[str, Any]], bool] = _all
    labels: tuple[str, ...] = ()

    def combinations(self, split: str, source: str) -> list[dict[str, Any]]:
        """Every combination of slots in this split that makes sense, in a fixed order.

        source: the data_source of its rows, which decides with the slots what is held out.
        """
        rows = (dict(zip(self.slots, c, strict=True)) for c in itertools.product(*self.slots.values()))
        return [row for row in rows if self.sensible(row) and self._split_of(source, row) == split]

    def _split_of(self, source: str, row: Mapping[str, Any]) -> str:
        key = repr((source, sorted((k, v) for k, v in row.items() if k not in self.labels)))
        return "test" if zlib.crc32(key.encode()) % 1000 < TEST_SHARE * 1000 else "train"
