"""A hundred thousand mutated completions through the parser: never a crash, never a long one."""

import random
import time

import numpy as np

from gtalign_jax.chain.parse import MAX_ERRORS, Chain, named_choice, parse_chain
from gtalign_jax.chain.prompt import format_chain

COUNT = 100_000
SECONDS = 1.0  # CPU seconds for the slowest single text of at most a few kilobytes
GOOD = format_chain("Think.", np.arange(12.0).reshape(2, 3, 2) / 10, "Choose DQ_AQ.", "Answer.")
TOKENS = [
    *("<thinking>", "</thinking>", "<payoff>", "</payoff>", "<analyze>", "</analyze>", "<response>"),
    *("</response>", "<", ">", "</", "{", "}", '"', "'", ":", ",", "LLM", "user", "DQ_AQ", "VQ_DA", "NaN"),
    *("1e999", "9" * 400, "-", "+", "\\", "\\u0041", "\\ud800", "\ud800", "\x00", "“", "”", "\u2028", "é"),
    *(
        "```json\n",
        "```",
        "true",
        "None",
        "[",
        "(",
        "1+1j",
        "0x1",
        "#",
        "\n",
        " ",
        "\t",
        "AQ",
        "😀",
        "é" * 50,
    ),
]


def mutate(rng: random.Random, text: str) -> str:
    """Insert, delete, double or swap a few slices."""
    for _ in range(rng.randint(1, 6)):
        i, j = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:i] + text[j:]
        elif kind == 1:
            text = text[:j] + text[i:]
        elif kind == 2:
            text = text[:i] + text[i:j][::-1] + text[j:]
        else:
            text = text[:i] + rng.choice(TOKENS) * rng.choice((1, 1, 1, 7)) + text[i:]
    return text[:4000]


def check(text: str, code_fences: bool) -> Chain:
    """Parse one text and hold the result to what every result must be."""
    chain = parse_chain(text, code_fences)
    named_choice(chain.analyze)
    assert (not chain.errors) == (chain.format_ok and chain.row is not None)
    assert len(chain.errors) <= MAX_ERRORS + 1
    assert chain.row is None or (len(chain.row) == 12 and all(abs(x) <= 1e6 for x in chain.row))
    return chain


def test_mutated_completions_are_all_read():
    rng = random.Random(20251008)
    pool, accepted, slowest = [GOOD], 0, 0.0
    for i in range(COUNT):
        text = mutate(rng, rng.choice(pool))
        if i % 50 == 0:
            pool = [GOOD, *pool[-200:], text]
        clock = time.process_time()
        chain = check(text, bool(i % 2))
        slowest = max(slowest, time.process_time() - clock)
        accepted += chain.reward_ok
    # The mutations reach both sides of the border.
    assert COUNT // 1000 < accepted < COUNT // 2
    assert slowest < SECONDS
