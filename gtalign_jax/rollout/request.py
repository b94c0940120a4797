"""What is asked of whoever generates."""

from __future__ import annotations

import flax.struct

from gtalign_jax.rollout.decode_state import Ending
from gtalign_jax.rollout.grammar import Constraint
from gtalign_jax.types import Array, PromptBatch


@flax.struct.dataclass
class Request:
    """group_size completions of each prompt, of at most max_new_tokens."""

    prompts: PromptBatch
    key: Array
    group_size: int = flax.struct.field(pytree_node=False)
    max_new_tokens: int = flax.struct.field(pytree_node=False)
    ending: Ending | None = None
    constraint: Constraint | None = None
    first_row: int = flax.struct.field(pytree_node=False, default=0)
    seeds: Array | None = None
    stops: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
