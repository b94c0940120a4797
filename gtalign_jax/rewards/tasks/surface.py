"""What the surface of a text tells of it: does it read as English, what is it about, is it a copy?

A judgement is True, False, or None where the surface cannot tell; a rule that is told None gives no verdict.
What is looked at, and how far it goes: docs/judges.md. Numbers, formulas and line breaks are read past.
"""

import functools
import re
from typing import NamedTuple

FAULTS, DOUBTFUL = 0.06, 0.035  # faults a place: nonsense from here on (two at least), doubtful from there on
LONG_ENOUGH = 8  # words, from which on a text without function words is no English
BARE, THIN = 0.1, 0.15  # share of function words below which it is none, or cannot be told
FRESH = 0.4  # share of different runs of three words, under which a text goes in circles
COPIED = 0.8  # share of a text's runs of three words that stand in the question
OWN = 5  # content words, from which on a text that shares none with the question is about something else

_KINDS = {  # words that are nearly always of one kind
    "article": "a an the my your our their its every",
    "preposition": "of from with into onto upon among during",
    "to": "to",
    "loose": "in on at by for",
    "being": "is are was were am",
    "having": "has have had",
    "modal": "will would can could should may might must",
    "doing": "does did",
    "subject": "i he she we they",
    "joining": "and or but because",
}
_KIND = {word: kind for kind, words in _KINDS.items() for word in words.split()}
_VERBS = {"being", "having", "modal", "doing"}
_NEVER_NEXT = {  # "end": a mark, or the end of the text
    "article": {"article", "preposition", "to", "loose", "subject", "joining", "end"} | _VERBS,
    "preposition": {"to", "subject"} | _VERBS,
    "to": {"being", "modal", "doing", "subject", "preposition"},
    "loose": {"subject"} | _VERBS,
    "being": _VERBS,
    "having": {"being", "modal", "doing"},
    "modal": {"being", "modal", "doing", "to", "preposition"},
    "doing": _VERBS,
    "subject": {"article", "preposition", "subject"},
    "joining": {"joining", "end"},
}
_MAY_REPEAT = {"that", "had", "very", "so", "ha", "no", "bye"}
# Capitals inside a sentence are faults on these; May, Will, A and I can be names, months and labels.
_OPENERS = {*_KIND, *"it this that there if when as what how you".split()} - {"i", "a", "may", "will", "can"}
_FUNCTION = set(_KIND) | set(
    (
        "it this that these those you me him her us them his who which what when where how why if as "
        "than then so not no nor about after before over under between through out up down off all "
        "any some most more each other such only own same too very just also there here be been being "
        "do done having while until though although since whether yes don't isn't it's i'm can't one "
        "two"
    ).split()
)
_GENERIC = set(  # what answers to any question are padded with
    (
        "able always answer answers article ask asked asking aspect aspects assist assistance back "
        "based become best better big can't cannot certainly clarify clear come consider could course "
        "create depend depends detail details different discuss even every example examples explain "
        "factor factors feel find first following free further generate get give given glad go good "
        "great happy help helped helpful helps high however i'm idea ideas imagine important include "
        "including information instead keep kind know last less let level like long look lot make "
        "many matter may mean meaning means meant might much need needs new next part people person "
        "please point possible provide provided question questions really request requests response "
        "right said say says second see sense several short small sorry sort specific start still "
        "subject sure take tell thank thanks thing things think time today topic unable understand "
        "use used useful user various want wants way ways welcome well words work would write"
    ).split()
)
NUMBER = "0"  # what a formula is read as
_ENDINGS = ("ing", "ied", "ed", "ies", "es", "s", "ly", "e", "y")
_FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\boxed\s*\{[^\n]*\}", re.DOTALL)
_CHUNK = re.compile(r"\n+|\S+")
_PARTS = re.compile(r"(\W*)(.*?)(\W*)", re.DOTALL)
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_VOWEL = re.compile(r"[aeio](?!ne\b|nce\b|u)")
_CONSONANT = re.compile(r"[bcdfgjklmnpqrstvwyz][a-z]")


def reads(text: str) -> bool | None:
    """Whether a text reads as English: words in an order that there is, function words, no loop."""
    words = [word.text.lower() for word in _words(text) if not word.text.isdigit()]
    found, places = faults(text)
    rate = found / max(places, 1)
    function = sum(word in _FUNCTION for word in words) / max(len(words), 1)
    judged = len(words) >= LONG_ENOUGH
    if (found > 1 and rate > FAULTS) or (judged and function < BARE) or _loops(words):
        return False
    return None if rate > DOUBTFUL or (judged and function < THIN) else True


def about(text: str, question: str) -> bool | None:
    """Whether a text is about what was asked: it shares content words, the more the longer the question.

    A blank question is not known and limits nothing.
    """
    if not question.strip():
        return True
    mine, asked = stems(text), stems(question)
    shared = len(mine & asked)
    if shared >= (1 if len(asked) < 8 else 2 if len(asked) < 60 else 3) or 2 * shared >= len(mine) > 0:
        return True
    padding = not mine and len(_WORD.findall(text)) > OWN
    return False if asked and not shared and (padding or len(mine) >= OWN) else None


def copies(text: str, question: str) -> bool:
    """Whether a text is little but the question or a piece of it."""
    runs, theirs = (_runs(_plain(each)) for each in (text, question))
    return repeats(text, question) or len(runs & theirs) >= COPIED * len(runs) > 2


def repeats(text: str, question: str) -> bool:
    """Whether a text holds nearly all of the question and no content word beside it."""
    mine, asked = _plain(text), _plain(question)
    if not mine or mine == asked:
        return bool(mine)
    theirs = _runs(asked)
    held = len(_runs(mine) & theirs) >= COPIED * len(theirs) > 0
    return held and stems(text) <= stems(question)


@functools.lru_cache(maxsize=1024)
def stems(text: str) -> frozenset[str]:
    """The content words of a text, cut to what their forms have in common."""
    words = set(_WORD.findall(text.lower().replace("’", "'"))) - _FUNCTION - _GENERIC
    return frozenset(_stem(word) for word in words if len(word) > 1 and word.split("'")[0] not in _FUNCTION)


def faults(text: str) -> tuple[int, int]:
    """(places at which English does not go on like this, places looked at)."""
    words = _words(text)
    cased = any(word.text[0].isupper() for word in words)
    threes = list(zip(words, words[1:], [*words[2:], None], strict=False))
    found = sum(_misplaced(one, two) or (cased and _miscased(one, two, last)) for one, two, last in threes)
    if words and "\n" not in text.strip():
        last = words[-1]
        found += cased and words[0].text[0].islower()
        found += any(word.ends for word in words[:-1]) and not last.closed and not last.text.isdigit()
        found += not last.closed and "end" in _NEVER_NEXT.get(last.kind, ())
    return found, len(threes)


class _Word(NamedTuple):
    """first: of a sentence or after a mark or a line's end. closed: a mark follows; ends: one that ends a
    sentence."""

    text: str
    first: bool
    closed: bool
    ends: bool

    @property
    def kind(self) -> str:
        """Its kind; "" for a name, a word with a capital inside a sentence."""
        name = self.text[0].isupper() and not self.first
        return "" if name else _KIND.get(self.text.lower(), "")


def _words(text: str) -> list[_Word]:
    """The words of a text in order; a formula is a number."""
    found: list[_Word] = []
    first = True
    for chunk in _CHUNK.findall(_FORMULA.sub(_as_number, text)):
        parts = _PARTS.fullmatch(chunk)
        before, word, after = parts.groups() if parts else ("", "", "")
        if word:
            found.append(_Word(word, first or bool(before), bool(after), any(m in after for m in ".!?")))
        first = not word or after not in ("", ",")
    return found


def _as_number(formula: re.Match[str]) -> str:
    """0, and the mark that stands at the end inside the formula."""
    mark = formula.group().rstrip("$])}\\ \n")[-1:]
    return f" {NUMBER}{mark}" if mark in (".", ",", "?") else f" {NUMBER}"


def _misplaced(one: _Word, two: _Word) -> bool:
    """Whether the second word cannot follow the first."""
    never = _NEVER_NEXT.get(one.kind, set())
    if one.closed:
        return "end" in never and not one.first and len(one.text) > 1
    a, b = one.text.lower(), two.text.lower()
    if two.kind in never or (a == b and a.isalpha() and len(a) > 1 and a not in _MAY_REPEAT):
        return True
    sound = {"a": _VOWEL, "an": _CONSONANT}.get(one.text)
    return sound is not None and len(b) > 2 and sound.match(two.text) is not None


def _miscased(one: _Word, two: _Word, after: _Word | None) -> bool:
    """Whether a sentence begins small, or a word that begins one is large inside; titles are let be."""
    if one.ends:
        whole = len(one.text) > 3 or one.text == NUMBER  # no abbreviation
        return whole and two.text.isalpha() and two.text[0].islower()
    title = not one.text[0].islower() or (after is not None and after.text[0].isupper())
    large = two.text[0].isupper() and not two.text.isupper() and two.text.lower() in _OPENERS
    return large and not title and not two.first


def _loops(words: list[str]) -> bool:
    """Whether most runs of three words have stood before."""
    count = len(words) - 2
    return count >= 20 and len(_runs(words)) < FRESH * count


def _plain(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: list[str]) -> set[tuple[str, str, str]]:
    return set(zip(words, words[1:], words[2:], strict=False))


def _stem(word: str) -> str:
    word = word.removesuffix("'s")
    ending = next((e for e in _ENDINGS if word.endswith(e) and len(word) - len(e) >= 3), "")
    return word.removesuffix(ending)[:6]
