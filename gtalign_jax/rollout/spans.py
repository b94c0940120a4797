"""Which tokens of a completion lie inside a tagged block, however the tags were cut into tokens."""

from collections.abc import Sequence

import numpy as np

from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.stop import stop_table

Tables = tuple[np.ndarray, np.ndarray]


def block_tables(block: str, token_texts: Sequence[str]) -> Tables:
    """The automata [states, V] of a block's opening and closing tag, for `inside_block`."""
    return stop_table([f"<{block}>"], token_texts), stop_table([f"</{block}>"], token_texts)


def engine_tables(engine: Engine, blocks: Sequence[str]) -> tuple[Tables, ...]:
    """`block_tables` of several blocks, in the tokens of an engine."""
    if not blocks:
        return ()
    texts = engine_lib.token_texts(engine)
    return tuple(block_tables(block, texts) for block in blocks)


def inside_block(tables: Tables, tokens: np.ndarray) -> np.ndarray:
    """[..., N] bool: tokens after the one that completes the opening tag, up to the closing tag's.

    tokens [..., N] int32. The closing tag belongs to the block; a block that is never closed reaches
    to the end. Padding after a row's end may be marked: mask it by the row's length.
    """
    opened, closed = (_completed(table, tokens) for table in tables)
    # The state before each token: open tags seen so far minus closed ones, at most one at a time.
    depth = np.zeros(tokens.shape[:-1], bool)
    inside = np.zeros(tokens.shape, bool)
    for n in range(tokens.shape[-1]):
        inside[..., n] = depth
        depth = (depth | opened[..., n]) & ~closed[..., n]
    return inside


def token_weights(
    blocks: Sequence[Tables], weights: Sequence[float], rows: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """The weight of every token of rows of ids, float32: its block's, and 1 outside of all blocks."""
    tokens = np.zeros((len(rows), max(map(len, rows), default=0)), np.int32)
    for into, row in zip(tokens, rows, strict=True):
        into[: len(row)] = row
    found = np.ones(tokens.shape, np.float32)
    for tables, weight in zip(blocks, weights, strict=True):
        found[inside_block(tables, tokens)] = weight
    return [found[i, : len(row)] for i, row in enumerate(rows)]


def _completed(table: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[..., N] bool: the tokens at which the automaton's string is completed."""
    state = np.zeros(tokens.shape[:-1], np.int64)
    found = np.zeros(tokens.shape, bool)
    for n in range(tokens.shape[-1]):
        state = table[state, tokens[..., n]]
        found[..., n] = state == len(table) - 1
    return found
