"""Texts that nearly stand in another set of texts, found by datasketch's MinHash.

A text is the set of its runs of five words. A run that stands in more than half of all texts says nothing (an
instruction, a template) and is left out. Two texts are near when their sets are: Jaccard similarity of
`THRESHOLD` or more, which is computed for the pairs that the hashes bring together.
"""

import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from datasketch import MinHash, MinHashLSH

THRESHOLD = 0.8
_CANDIDATE = 0.6  # the hashes miss few pairs that are a good deal nearer than this
WORDS = 5
HASHES = 128
FEW = 10  # of fewer texts one cannot say what all have in common
_WORD = re.compile(r"\w+")
Runs = frozenset[int]


def near_duplicates(texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Whether each of `texts` [N] is near one of `others`: bool [N]."""
    found = np.zeros(len(texts), bool)
    mine, theirs = _without_common([_runs(text) for text in texts], [_runs(text) for text in others])
    known = MinHashLSH(threshold=_CANDIDATE, num_perm=HASHES)
    for i, runs in enumerate(theirs):
        if runs:
            known.insert(i, _hashed(runs))
    for i, runs in enumerate(mine):
        near = known.query(_hashed(runs)) if runs else []
        found[i] = any(_similarity(runs, theirs[j]) >= THRESHOLD for j in near)
    return found


def _runs(text: str) -> Runs:
    """A number for each run of words of a text; a shorter text is one run."""
    words = [word.encode() for word in _WORD.findall(text.lower())]
    ends = range(min(WORDS, len(words)), len(words) + 1)
    return frozenset(zlib.crc32(b" ".join(words[max(end - WORDS, 0) : end])) for end in ends if end)


def _without_common(*sets: list[Runs]) -> tuple[list[Runs], ...]:
    """The same without the runs that stand in more than half of all texts."""
    count = sum(map(len, sets))
    stands = Counter(run for texts in sets for runs in texts for run in runs)
    common = {run for run, n in stands.items() if count >= FEW and n > count / 2}
    return tuple([runs - common for runs in texts] for texts in sets)


def _hashed(runs: Runs) -> MinHash:
    hashes = MinHash(num_perm=HASHES, hashfunc=int)  # the runs are hashes already
    hashes.update_batch(runs)
    return hashes


def _similarity(a: Runs, b: Runs) -> float:
    return len(a & b) / len(a | b)
