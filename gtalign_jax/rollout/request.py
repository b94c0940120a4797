"""What a generation is asked for, what its rows are held to, and the form its programs take it in.

Request   of a caller: any number of prompts, on the host, with plain numbers
Rules     what ends a row and what its tokens are drawn from
Placed    the prompts in the shapes of a program and on its devices (`rollout.placing`)
"""

from typing import NamedTuple

import flax.struct
import numpy as np

from gtalign_jax.errors import UserError
from gtalign_jax.rollout.grammar import Constraint
from gtalign_jax.types import Array, PromptBatch


class Ending(NamedTuple):
    """What ends a row: an end token, or a stop string found by the automaton of `rollout.stop`.

    eos [E] int32; stop [states, V] int32, the next state after a token, the last state being "found"
    (None: no stop strings).
    """

    eos: Array
    stop: Array | None = None


class Rules(NamedTuple):
    """What rows are held to, the same in every call of a generation.

    constraint: draw from the tokens that its grammar allows (None: from all); rows end within its own budget,
    and log-probabilities are under the constraint.
    """

    ending: Ending
    constraint: Constraint | None = None


class Request(flax.struct.PyTreeNode):
    """G = group_size completions of each prompt, at most max_new_tokens each.

    prompts: host arrays [P, S]. key: the step key, typed. ending: from `engine.make_ending` (None: the
    engine's end tokens and `stops`). constraint: from `engine.make_constraint`; every row is then a whole
    chain within max_new_tokens. first_row: number of the first prompt in the whole step, when this batch is a
    part of it, so that the parts draw what the whole would. seeds [P, G] int32: a seed for each sample
    instead of its number; what a sample draws then depends on the key, its prompt and its seed alone.
    stops: the texts of `ending`, which servers are told.
    """

    prompts: PromptBatch
    key: Array
    group_size: int = flax.struct.field(pytree_node=False)
    max_new_tokens: int = flax.struct.field(pytree_node=False)
    ending: Ending | None = None
    constraint: Constraint | None = None
    first_row: int = flax.struct.field(pytree_node=False, default=0)
    seeds: Array | None = None
    stops: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())


class Own(flax.struct.PyTreeNode):
    """What each row is held to where rows differ, as those of a server do; all [P, G].

    temperature float32 (0: greedy). top_p float32 (1: off). until int32: tokens the row may write. first
    int32: the number of the row's token 0 in the random stream of its key, above 0 where a row goes on from
    what was written before. at int32: the state of the grammar that its token 0 is held to, where the rules
    have one (`grammar.free`: to nothing); its budget is the row's. top bool: its most likely tokens are kept.
    stops bool: a stop string of the rules ends it.
    """

    temperature: Array
    top_p: Array
    until: Array
    first: Array
    at: Array
    top: Array
    stops: Array


class Placed(flax.struct.PyTreeNode):
    """What `decode.start` begins from.

    prompts [P, S]: those of length 0 are padding and cost no steps. key: the step key. group_size: G.
    slots: N, completion slots. row [P] int32: number of each prompt in the whole step, when this batch is a
    part of it (None: 0..P-1); [P, G] is a number of each sample, such as a seed. own: of rows that differ in
    what they are held to. top: how many most likely tokens are kept beside each of a row that asks for them.
    """

    prompts: PromptBatch
    key: Array
    group_size: int = flax.struct.field(pytree_node=False)
    slots: int = flax.struct.field(pytree_node=False)
    row: Array | None = None
    own: Own | None = None
    top: int = flax.struct.field(pytree_node=False, default=0)


def row_numbers(request: Request) -> np.ndarray:
    """`Placed.row` of a request's prompts, on the host; UserError for seeds of another shape."""
    count = request.prompts.tokens.shape[0]
    if request.seeds is None:
        return request.first_row + np.arange(count, dtype=np.int32)
    found, needed = np.shape(request.seeds), (count, request.group_size)
    if found != needed:
        raise UserError(f"seeds: shape {found}, needs {needed}, one a sample")
    return np.asarray(request.seeds, np.int32)
