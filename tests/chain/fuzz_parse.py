"""Coverage-guided fuzzing of the parser (not collected by pytest; needs `pip install atheris`).

python tests/chain/fuzz_parse.py -runs=1000000
"""

import sys

import atheris

with atheris.instrument_imports():
    from gtalign_jax.chain.parse import named_choice, parse_chain


def one_input(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    fences = provider.ConsumeBool()
    chain = parse_chain(provider.ConsumeUnicode(8192), fences)
    named_choice(chain.analyze)
    if (not chain.errors) != (chain.format_ok and chain.row is not None):
        raise RuntimeError(f"errors disagree with the result: {chain}")


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
