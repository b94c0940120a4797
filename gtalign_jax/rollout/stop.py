"""Stop strings across token boundaries: a string automaton lifted from characters to tokens.

The states are the proper prefixes of the stop strings (Aho and Corasick, 1975). Running a token's text
from every state gives a table [states, V] that decoding follows with one gather a step, so a row stops
at the very token that completes `</payoff>`, however it was cut.
"""

from collections.abc import Sequence

import numpy as np


def stop_table(stops: Sequence[str], token_texts: Sequence[str]) -> np.ndarray:
    """The automaton over tokens: int32 [states, V].

    token_texts: the text of every token id. State 0 is the start; the last state means that a stop
    string was completed inside the token just read, and behaves as the start afterwards.
    """
    step, alphabet = _character_automaton(stops)
    found = len(step)  # one more state than prefixes
    step = np.vstack([step, step[:1]])
    codes = _encode(token_texts, alphabet)
    begin = np.append(np.arange(found), 0)
    state = np.broadcast_to(begin[:, None], (found + 1, len(token_texts)))
    hit = np.zeros_like(state, dtype=bool)
    for column in codes.T:
        inside = column >= 0
        state = np.where(inside, step[state, column], state)
        hit |= inside & (state == found)
    return np.where(hit, found, state).astype(np.int32)


def _character_automaton(stops: Sequence[str]) -> tuple[np.ndarray, dict[str, int]]:
    """(step [prefixes, characters + 1], character codes); code 0 is any character not in a stop."""
    if not stops or not all(stops):
        raise ValueError(f"stop strings must not be empty, got {list(stops)}")
    alphabet = {c: i + 1 for i, c in enumerate(sorted(set("".join(stops))))}
    prefixes = sorted({s[:i] for s in stops for i in range(len(s))}, key=lambda p: (len(p), p))
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    step = np.zeros((len(prefixes), len(alphabet) + 1), np.int32)
    for prefix, i in number.items():
        for c, code in alphabet.items():
            text = prefix + c
            if any(text.endswith(s) for s in stops):
                step[i, code] = len(prefixes)
            else:
                step[i, code] = next(number[text[j:]] for j in range(len(text) + 1) if text[j:] in number)
    return step, alphabet


def _encode(texts: Sequence[str], alphabet: dict[str, int]) -> np.ndarray:
    """Character codes [V, longest], padded with -1."""
    codes = np.full((len(texts), max(map(len, texts))), -1, np.int32)
    for i, text in enumerate(texts):
        codes[i, : len(text)] = [alphabet.get(c, 0) for c in text]
    return codes
