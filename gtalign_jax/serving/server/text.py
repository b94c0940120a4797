"""From tokens to text while they come: whole characters, stop strings, and the blocks of a chain.

    stream = TextStream(engine, stops)        piece = stream.feed(tokens)      piece = stream.end()
    view   = View(mode)                       shown = view.feed(text)          shown = view.end()
    before = Before(tag)                      text = before.feed(text)        text = before.end()

What might still turn out to be part of a stop string, of a tag or of a character is held back until it is
settled, so what was given out is never taken back.
"""

import dataclasses
from collections.abc import Sequence

from gtalign_jax.rollout.engine import Engine

UNFINISHED = "\ufffd"  # what a tokenizer shows in place of a character whose bytes are not all there
SHOWN, HIDDEN, APART = "shown", "hidden", "reasoning_content"
MODES = (SHOWN, HIDDEN, APART)
OPEN, CLOSE = "<response>", "</response>"


@dataclasses.dataclass(frozen=True)
class Spoken:
    """One token of the text: its id, its log-probability, and the character of the text it begins at.

    likely: (id, log-probability) of the most likely tokens there, where they were asked for.
    """

    id: int
    logp: float
    at: int
    likely: Sequence[tuple[int, float]] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """The next text and the tokens that begin in it; stopped: a stop string ended it and nothing follows.

    end: the end token after it, which is no text.
    """

    text: str = ""
    tokens: tuple[Spoken, ...] = ()
    stopped: bool = False
    end: tuple[Spoken, ...] = ()


class TextStream:
    """The text of one row. stops: strings that end it and are not part of it. tokens: all ids fed."""

    def __init__(self, engine: Engine, stops: Sequence[str] = ()) -> None:
        self._engine, self._stops = engine, tuple(stops)
        self.tokens: list[int] = []
        self.text = ""  # of whole characters, settled or not
        self._sent = self._begin = self._read = 0
        self._pending: list[Spoken] = []
        self._stopped = False

    def feed(
        self,
        ids: Sequence[int],
        logps: Sequence[float],
        likely: Sequence[Sequence[tuple[int, float]]] = (),
    ) -> Piece:
        """The next tokens of the row, an end token left out; nothing after a stop string counts.

        logps, likely: theirs, and perhaps those of an end token; no `likely` where none were asked for.
        """
        for i, logp, others in zip(ids, logps, likely or [()] * len(ids), strict=False):
            if self._stopped:
                break
            self.tokens.append(i)
            self._pending.append(Spoken(i, logp, len(self.text), others))
            found = self._decoded()
            if not found.endswith(UNFINISHED):
                self._take(found)
        if self._stopped:
            return self._piece(len(self.text))
        return self._piece(len(self.text) - _held(self.text, self._stops))

    def end(self) -> Piece:
        """What was held back, when no token follows; tokens that add no text come too."""
        if not self._stopped:
            self._take(self._decoded())
        piece = self._piece(len(self.text))
        left, self._pending = () if self._stopped else tuple(self._pending), []
        return dataclasses.replace(piece, tokens=piece.tokens + left)

    def _decoded(self) -> str:
        """The text of the tokens that have none yet, read after those before: they may change its look."""
        before = self._text(self.tokens[self._begin : self._read])
        return self._text(self.tokens[self._begin :])[len(before) :]

    def _text(self, ids: Sequence[int]) -> str:
        tokenizer = self._engine.tokenizer
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _take(self, found: str) -> None:
        self.text += found
        self._begin, self._read = self._read, len(self.tokens)
        starts = [i for stop in self._stops if (i := self.text.find(stop, self._sent)) >= 0]
        if starts:
            self.text, self._stopped = self.text[: min(starts)], True

    def _piece(self, ready: int) -> Piece:
        text, self._sent = self.text[self._sent : ready], max(ready, self._sent)
        spoken = tuple(token for token in self._pending if token.at < ready)
        self._pending = self._pending[len(spoken) :]
        return Piece(text, spoken, self._stopped)


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a reader is given: of the reasoning apart, and of the answer."""

    reasoning: str = ""
    content: str = ""


class View:
    """A chain as a reader asked for it: all of it, the inside of its <response> alone, or both apart."""

    def __init__(self, mode: str) -> None:
        self._mode, self._text, self._inside = mode, "", False

    def feed(self, text: str) -> Shown:
        """More of the text."""
        if self._mode == SHOWN:
            return Shown(content=text)
        self._text += text
        reasoning = ""
        if not self._inside:
            before, tag, after = self._text.partition(OPEN)
            if not tag:
                ready = len(before) - _held(before, (OPEN,))
                reasoning, self._text = before[:ready], before[ready:]
                return Shown(reasoning=reasoning) if self._mode == APART else Shown()
            reasoning, self._text, self._inside = before, after, True
            self._begun = False
        content = self._content(final=False)
        return Shown(reasoning if self._mode == APART else "", content)

    def end(self) -> Shown:
        """What was held back."""
        if self._mode == SHOWN:
            return Shown()
        if not self._inside:
            return Shown(reasoning=self._text) if self._mode == APART else Shown()
        return Shown(content=self._content(final=True))

    def _content(self, final: bool) -> str:
        """The settled part of the response, without the white space around it."""
        inside, tag, _ = self._text.partition(CLOSE)
        if not self._begun:
            inside = inside.lstrip()
            self._begun = bool(inside)
        if tag or final:
            self._text = CLOSE  # what follows it is nobody's
            return inside.rstrip()
        ready = len(inside[: len(inside) - _held(inside, (CLOSE,))].rstrip())
        self._text = inside[ready:]
        return inside[:ready]


class Before:
    """The text before the first of `tags`, in pieces; nothing after it. found: whether one came."""

    def __init__(self, *tags: str) -> None:
        self._tags, self._text, self.found = tags, "", False

    def feed(self, text: str) -> str:
        """The next of it that is settled."""
        if self.found:
            return ""
        text = self._text + text
        starts = [i for tag in self._tags if (i := text.find(tag)) >= 0]
        self.found = bool(starts)
        ready = min(starts) if starts else len(text) - _held(text, self._tags)
        self._text = "" if starts else text[ready:]
        return text[:ready]

    def end(self) -> str:
        """What was held back."""
        text, self._text = self._text, ""
        return text


def _held(text: str, ends: Sequence[str]) -> int:
    """How many last characters may be the beginning of one of `ends`."""
    longest = 0
    for end in ends:
        for n in range(min(len(end) - 1, len(text)), longest, -1):
            if text.endswith(end[:n]):
                longest = n
                break
    return longest
