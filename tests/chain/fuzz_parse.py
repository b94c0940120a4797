"""Coverage-guided fuzzing of the parser (not collected by pytest; needs `pip install atheris`).

python tests/chain/fuzz_parse.py -runs=1000000 -max_len=2000

An input is a sequence of pieces of the protocol and of free text, so that mutations reach past the tags.
"""

import sys

import atheris

with atheris.instrument_imports():
    from gtalign_jax.chain.parse import BLOCKS, named_choice, parse_chain
    from gtalign_jax.game.moves import KEYS

CELL = '{"LLM": 1.5, "user": -2}'
PIECES = [
    *(f"<{slash}{name}>" for name in BLOCKS for slash in ("", "/")),
    *(f'"{key}": ' for key in KEYS),
    *("{" + ", ".join(f'"{key}": {CELL}' for key in KEYS) + "}", CELL, '"LLM": ', '"user": ', "DQ_AQ", "CQ"),
    *(
        "{",
        "}",
        ",",
        ":",
        "'",
        '"',
        "\\",
        "\\u0044",
        "1e999",
        "9" * 400,
        "NaN",
        "true",
        "+.5",
        "```json\n",
        "```",
    ),
    *("\n", " ", "<", ">", "“", "”", "\u2028", "\ud800", "é"),
]


def one_input(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    fences, parts = provider.ConsumeBool(), []
    while provider.remaining_bytes():
        choice = provider.ConsumeIntInRange(0, len(PIECES))
        parts.append(PIECES[choice] if choice < len(PIECES) else provider.ConsumeUnicode(12))
    chain = parse_chain("".join(parts), fences)
    named_choice(chain.analyze)
    if (not chain.errors) != (chain.format_ok and chain.row is not None):
        raise RuntimeError(f"errors disagree with the result: {chain}")


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
