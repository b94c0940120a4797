"""Writing: BLEU against the reference for the user, the judge's 0-4 for the LLM (paper section 4)."""

from __future__ import annotations

import functools

from sacrebleu.metrics import BLEU


@functools.cache
def _metric() -> BLEU:
    return BLEU(effective_order=True, smooth_method="exp")


def bleu(response: str, reference: str) -> float:
    """Sentence BLEU in [0, 1] with the standard 13a tokenisation and exponential smoothing."""
    if not response.strip() or not reference.strip():
        return 0.0
    return min(_metric().sentence_score(response, [reference]).score / 100, 1.0)


def answer_score(score: float, response: str, reference: str) -> tuple[float, float, float]:
    """(Q_u, Q_l, answer) = (BLEU, J, max(BLEU, J)) with J the verdict over 4."""
    judged = min(max(score / 4, 0.0), 1.0)
    overlap = bleu(response, reference)
    return overlap, judged, max(overlap, judged)
