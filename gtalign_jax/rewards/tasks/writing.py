"""Writing: BLEU against the reference for the user, the judge's 0-4 for the LLM (paper section 4).

The number is sacrebleu's sentence BLEU (13a tokens, exponential smoothing, effective order). Its token
rules and its formula are the library's; the counting is done here, because a reference serves a whole
group of samples and words repeat: both are kept.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

from gtalign_jax.data.item import Item, Record, make_item, read_question, text_of
from gtalign_jax.rewards.scale import GRADES
from gtalign_jax.rewards.tasks import surface
from gtalign_jax.rewards.tasks.replies import writing as replies
from gtalign_jax.rewards.tasks.task import AnswerScore, Judged, Task, reader

ORDERS = 4
SHORTEST = 40  # words of a piece of writing
_TITLE = 0.3  # of the request's content words: a piece on its subject has them
_TOUCHES, _KEEPS_TO = 0.15, 0.3  # share of a piece's content words that request and reference have too
_MAX_CACHED_WORD, _MAX_CACHED_WORDS = 48, 2**16
_split = TokenizerRegexp()


class Reference(NamedTuple):
    """A reference text counted: its length in tokens, each token's number, and per order n its n-grams.

    An n-gram is the key (number of its first n - 1 tokens as an (n-1)-gram) * V + (its last token), so
    keys stay small at any order. keys are sorted; counts stand beside them.
    """

    size: int
    vocabulary: dict[str, int]
    orders: list[tuple[np.ndarray, np.ndarray]]


def bleu(response: str, reference: str) -> float:
    """Sentence BLEU in [0, 1]; 0 when either text is blank."""
    found = tokens(response)
    if not found or not reference.strip():
        return 0.0
    counted = _reference(reference)
    correct = _matches(found, counted)
    total = [max(len(found) - order, 0) for order in range(ORDERS)]
    result = BLEU.compute_bleu(
        correct, total, len(found), counted.size, smooth_method="exp", effective_order=True
    )
    return min(result.score / 100, 1.0)


def answer_score(score: float, response: str, reference: str) -> tuple[float, float, float]:
    """(Q_u, Q_l, answer) = (BLEU, J, max(BLEU, J)) with J the verdict over 4."""
    judged = min(max(score / 4, 0.0), 1.0)
    overlap = bleu(response, reference)
    return overlap, judged, max(overlap, judged)


def tokens(text: str) -> list[str]:
    """The 13a tokens of a text.

    Its rules never reach over white space except for what is undone first (an end-of-line hyphen and
    four entities), so words can be split one by one and remembered.
    """
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "")
    if "&" in text:
        for old, new in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
            text = text.replace(old, new)
    return list(itertools.chain.from_iterable(map(_words.__getitem__, text.split())))


class _Words(dict):
    """word → its tokens; forgets everything when full, and never keeps a long word."""

    def __missing__(self, word: str) -> tuple[str, ...]:
        if word.isalnum():
            found = (word,)
        else:
            found = tuple(_split(f" {word} ").split())
            TokenizerRegexp.__call__.cache_clear()  # the library would keep every text it has seen
        if len(word) <= _MAX_CACHED_WORD:
            if len(self) >= _MAX_CACHED_WORDS:
                self.clear()
            self[word] = found
        return found


_words = _Words()


@functools.lru_cache(maxsize=256)
def _reference(text: str) -> Reference:
    found = tokens(text)
    vocabulary: dict[str, int] = {}
    ids = np.array([vocabulary.setdefault(token, len(vocabulary)) for token in found], np.int64)
    orders, prefix = [], np.zeros(len(ids), np.int64)
    for n in range(min(ORDERS, len(ids))):
        key = prefix[: len(ids) - n] * len(vocabulary) + ids[n:]
        keys, prefix, counts = np.unique(key, return_inverse=True, return_counts=True)
        orders.append((keys, counts))
    return Reference(len(found), vocabulary, orders)


def _matches(found: list[str], reference: Reference) -> list[int]:
    """Per order, the n-grams found in the reference, each at most as often as it stands there.

    Only places whose (n-1)-gram was found are looked at again.
    """
    number = reference.vocabulary.get
    ids = np.array([number(token, -1) for token in found], np.int64)
    place, prefix = np.arange(len(ids)), np.zeros(len(ids), np.int64)
    correct = [0] * ORDERS
    for n, (keys, counts) in enumerate(reference.orders):
        inside = place + n < len(ids)
        place, prefix = place[inside], prefix[inside]
        last = ids[place + n]
        key = np.where(last < 0, -1, prefix * len(reference.vocabulary) + last)
        index = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        hit = keys[index] == key
        place, prefix = place[hit], index[hit]
        correct[n] = int(np.minimum(np.bincount(prefix, minlength=len(keys)), counts).sum())
    return correct


_WRITING = """\
Grade the response as a finished piece of writing for the request. The reference is one good piece on the \
subject; other contents and styles may be as good.
4: does what was asked, is rich in substance, well ordered, in a fitting tone and length; ready to use.
3: does what was asked, with small faults of substance, order or tone.
2: usable after real work: thin, repetitive, partly off the subject or clearly off the length.
1: touches the subject and little more, or is badly broken.
0: no piece of writing on the subject, such as only a question or a plan."""


def by_overlap(response: str, truth: str, item: Judged) -> float:
    """0-4 by overlap with the reference: a BLEU of one half or more is full marks."""
    del item
    return float(round(4 * min(1.0, 2 * bleu(response, truth))))


def _rule(response: str, truth: str, item: Judged) -> float | None:
    """`by_overlap` of a text that reads and is no copy of the request.

    1 or 2 for another piece on the subject, whose content words stand in the request or the reference: how
    good that one is cannot be told.
    """
    reads = surface.reads(response)
    if reads is False or surface.copies(response, item.intent):
        return 0.0
    mine, asked = surface.stems(response), surface.stems(item.intent)
    share = len(mine & (asked | surface.stems(truth))) / max(len(mine), 1)
    fits = len(mine & asked) >= _TITLE * len(asked) > 0 and len(response.split()) >= SHORTEST
    subject = 0.0 if not fits or share < _TOUCHES else 1.0 if share < _KEEPS_TO else 2.0
    grade = max(by_overlap(response, truth, item), subject)
    return None if grade and reads is None else grade


def _score(verdict: float, response: str, truth: str) -> AnswerScore:
    return AnswerScore(*answer_score(verdict, response, truth))


def _respond(item: Item, action: str, correct: bool, rng: np.random.Generator) -> str:
    del correct
    return replies.write(item, action, rng)


def _read_medium(record: Record) -> Item | None:
    """CollabLLM's own records: an article, what it was asked by, perhaps the talk that leads there."""
    request = text_of(record, "single_turn_prompt")
    reference = text_of(record, "single_turn_completion")
    if record.get("prompt") is None:
        return make_item([{"role": "user", "content": request}], reference)
    return read_question({"messages": record["prompt"], "truth": reference, "intent": request})


MEDIUM = Task(
    name="medium",
    read=reader(_read_medium, ("single_turn_prompt", "single_turn_completion")),
    scale=GRADES,
    rule=_rule,
    rubric=_WRITING,
    score=_score,
    heavy=True,
    respond=_respond,
    consider=replies.consider,
)
