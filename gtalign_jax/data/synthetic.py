"""Rows of the embedded tasks in the published schema, made from seeded families of questions.

A row is a combination of a family's slots. Combinations are split into train and test by a hash, so that a
test item is a new combination of parts that were seen, and the two sets never meet.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from gtalign_jax.chain.prompt import SHORT_INSTRUCTION
from gtalign_jax.data.family import Family
from gtalign_jax.errors import UserError


class Embedded(Protocol):
    """What making rows needs to know of a task."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def family(self) -> Family | None: ...


def make_records(tasks: Sequence[Embedded], split: str, per_task: int, seed: int) -> list[dict[str, Any]]:
    """`per_task` rows (0: all there are) of each task in the published schema, shuffled; slots repeat when
    asked for more.

    split: `train` or `test`. The same arguments give the same rows. UserError for a task without a family.
    """
    rows = [row for task in tasks for row in _family_records(task, split, per_task, seed)]
    order = np.random.default_rng([seed, 7]).permutation(len(rows))
    return [rows[i] for i in order]


def _family_records(task: Embedded, split: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    if task.family is None:
        raise UserError(
            f"config.data.tasks: {task.name!r} is not an embedded task; name its data in config.data.source"
        )
    pool = task.family.combinations(split, task.source)
    count = count or len(pool)
    rng = np.random.default_rng([seed, zlib.crc32(f"{task.name} {split}".encode())])
    order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))])[:count]
    for index, choice in enumerate(order):
        slots = pool[choice]
        question, truth = task.family.write(**slots)
        yield _record(task.source, question, truth, slots, split, index)


def _record(source: str, question: str, truth: str, slots: dict, split: str, index: int) -> dict[str, Any]:
    return {
        "prompt": [
            {"role": "system", "content": SHORT_INSTRUCTION},
            {"role": "user", "content": question},
        ],
        "data_source": source,
        "ability": source,
        "source": source,
        "conv_id": f"{split}-{source}-{index}",
        "unique_conv_id": f"{split}-{source}-{index}",
        "turn_id": 1,
        "adversarial": False,
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {
            "single_turn_prompt": question,
            "single_turn_completion": truth,
            "chat_history": [{"role": "user", "content": question}],
            "adversarial": False,
            "index": index,
            "split": split,
            "slots": slots,
        },
    }
