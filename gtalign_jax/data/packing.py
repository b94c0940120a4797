"""Chains laid end to end into rows of one length, by grain's first-fit packer.

Batch k is the k-th of one stream: all chains in the shuffled order of epoch after epoch, each in the first
row of a batch that has room, until there is none and the next batch begins. A stream is the same on every
host and whenever it starts again, so a run resumes at batch k by passing by the k before it.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from gtalign_jax.data.loader import Demonstration
from gtalign_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """tokens, segments (0: padding, then 1, 2, ... in each row), positions [B, T] int32; learn [B, T] bool:
    tokens of completions. chains: how many there are in the batch. weight [B, T] float32: of each token in
    the loss, where demonstrations have weights."""

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    learn: np.ndarray
    chains: int
    weight: np.ndarray | None = None


class PackedStream:
    """Batches of `rows` rows of `slots` tokens, by number; in order they are made as they are asked for."""

    def __init__(self, data: Sequence[Demonstration], rows: int, slots: int, seed: int) -> None:
        """UserError when a chain is longer than a row: nothing is cut."""
        self._chains = [(d.prompt, completion) for d in data for completion in d.completions]
        self._weights = [weight for d in data for weight in d.weights]
        longest = max(len(prompt) + len(completion) for prompt, completion in self._chains)
        if longest > slots:
            raise UserError(f"config.sft.pack={slots}: a chain has {longest} tokens; raise it to that")
        self._rows, self._slots, self._seed = rows, slots, seed
        self._newest: list[dict[str, np.ndarray]] = []
        self._restart()

    def batch(self, k: int) -> PackedRows:
        """Batch k, a function of the data, the sizes, the seed and k."""
        if k < self._made - 1:
            self._restart()
        while self._made <= k:
            self._newest = [next(self._stream) for _ in range(self._rows)]
            self._made += 1
        return _joined(self._newest)

    def _restart(self) -> None:
        self._made = 0
        self._newest = []
        self._stream = self._packed()

    def _packed(self) -> Iterator[dict[str, np.ndarray]]:
        order = grain.MapDataset.range(len(self._chains)).seed(self._seed).shuffle().repeat()
        slots = dict.fromkeys(("tokens", "learn", *(["weight"] if self._weights else [])), self._slots)
        packed = grain.experimental.FirstFitPackIterDataset(
            order.map(self._chain).to_iter_dataset(grain.ReadOptions(num_threads=0)),
            length_struct=slots,
            num_packing_bins=self._rows,
            shuffle_bins=False,
        )
        return iter(packed)

    def _chain(self, i: int) -> dict[str, np.ndarray]:
        prompt, completion = self._chains[i]
        learn = np.arange(len(prompt) + len(completion)) >= len(prompt)
        found = {"tokens": np.array([*prompt, *completion], np.int32), "learn": learn}
        if self._weights:
            found["weight"] = np.concatenate([np.zeros(len(prompt), np.float32), self._weights[i]])
        return found


def _joined(rows: Sequence[dict[str, np.ndarray]]) -> PackedRows:
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    segments = stacked["tokens_segment_ids"].astype(np.int32)
    return PackedRows(
        tokens=stacked["tokens"],
        segments=segments,
        positions=stacked["tokens_positions"].astype(np.int32),
        learn=stacked["learn"].astype(bool),
        chains=int(segments.max(-1).sum()),
        weight=stacked.get("weight"),
    )
