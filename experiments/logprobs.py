"""Score token rows: python -m experiments.logprobs --model=DIR --tokens=T.jsonl --out=L.jsonl

A line {"token_ids": [...]} of n tokens becomes {"logprobs": [...]} of n - 1 float32 values: value i is
log p(token i + 1 | tokens 0..i). An `id` is carried along.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator

import jax
import numpy as np

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.files import drafts
from gtalign_jax.learning.logprobs import row_logprobs
from gtalign_jax.models.config import RuntimeConfig
from gtalign_jax.rollout import lines
from gtalign_jax.rollout.buckets import bucket
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.folder import EngineOptions, load_engine
from gtalign_jax.types import PyTree


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--tokens", required=True, help="JSON lines to read")
    parser.add_argument("--out", required=True, help="JSON lines to write")
    parser.add_argument("--batch_size", type=int, default=16, help="rows computed together")
    parser.add_argument("--compute_dtype", default="float32", choices=("float32", "bfloat16"))
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    if flags.batch_size < 1:
        raise UserError(f"--batch_size={flags.batch_size}: must be at least 1")
    rows = lines.read_lines(flags.tokens)
    drafts.check(flags.out, "--out", flags.tokens)
    engine, params = load_engine(
        flags.model, EngineOptions(runtime=RuntimeConfig(compute_dtype=flags.compute_dtype))
    )
    jsonl.write(flags.out, score(engine, params, rows, flags), keep=True)


def score(engine: Engine, params: PyTree, rows: list[dict], flags: argparse.Namespace) -> Iterator[dict]:
    """Output lines in input order; each batch is padded to its bucket of row length."""
    config = engine.model_config
    ids = [
        lines.token_ids(row.get("token_ids"), config.vocab_size, f"{flags.tokens}:{row['line']}")
        for row in rows
    ]
    compute = jax.jit(functools.partial(row_logprobs, config=config))
    for first in range(0, len(rows), flags.batch_size):
        part = ids[first : first + flags.batch_size]
        slots = bucket(max(map(len, part)), engine.buckets.prompt, "prompt", "the longest row")
        tokens = np.zeros((flags.batch_size, slots), np.int32)
        for row, values in zip(tokens, part, strict=False):
            row[: len(values)] = values
        length = np.ones(flags.batch_size, np.int32)
        length[: len(part)] = [len(values) for values in part]
        logp = np.asarray(compute(params, tokens=tokens, length=length))
        for i, values in enumerate(part):
            carried = {"id": rows[first + i]["id"]} if "id" in rows[first + i] else {}
            yield {**carried, "logprobs": logp[i, : len(values) - 1].tolist()}
        print(f"{first + len(part)}/{len(rows)} rows", file=sys.stderr)


if __name__ == "__main__":
    main()
