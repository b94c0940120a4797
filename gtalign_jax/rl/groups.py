"""Dynamic sampling (DAPO, arXiv 2503.14476): a full batch of groups whose rewards differ.

A trainer draws batches of P groups until `select` finds P informative ones or its patience ends, then
trains on `take(join(parts), rows)`. Every function is the same for a rollout, its rewards or any pytree
whose leaves begin with the prompt axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from gtalign_jax.types import PyTree


def select(informative: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """(rows [count], how many of them are informative) from informative [M] bool, M >= count.

    The first `count` informative groups, in order; when there are fewer, the first of the others fill
    the batch, so that its shape never changes (they have advantage 0). Raises ValueError if M < count.
    """
    informative = np.asarray(informative, bool)
    if len(informative) < count:
        raise ValueError(f"{len(informative)} groups cannot fill a batch of {count}")
    order = np.argsort(~informative, kind="stable")[:count]
    return np.sort(order), int(informative[order].sum())


def join(parts: Sequence[PyTree]) -> PyTree:
    """Batches joined along the prompt axis; later axes are padded on the right with zeros to the widest."""

    def leaf(*arrays) -> np.ndarray:
        arrays = [np.asarray(a) for a in arrays]
        widest = np.max([a.shape[1:] for a in arrays], axis=0).astype(int)
        pads = [[(0, 0), *((0, w - s) for w, s in zip(widest, a.shape[1:], strict=True))] for a in arrays]
        return np.concatenate([np.pad(a, p) for a, p in zip(arrays, pads, strict=True)])

    return jax.tree.map(leaf, *parts)


def take(tree: PyTree, rows: np.ndarray) -> PyTree:
    """The groups `rows` of every leaf."""
    return jax.tree.map(lambda x: x[rows], tree)
