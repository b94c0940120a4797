"""Step k is a function of (seed, k), hosts split one batch, and what does not fit is counted."""

import numpy as np
import pytest

from gtalign_jax.data.config import DataConfig
from gtalign_jax.data.item import Item
from gtalign_jax.data.loader import (
    encode_prompts,
    mend_of_length,
    named,
    pad_completions,
    rows_in_memory,
    step_rows,
)
from gtalign_jax.data.order import REFILL_STRIDE, Batching
from gtalign_jax.errors import UserError


def test_an_epoch_visits_every_row_once_in_a_new_order():
    first = np.concatenate([step_rows(12, 4, 0, k) for k in range(3)])
    second = np.concatenate([step_rows(12, 4, 0, k) for k in range(3, 6)])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first.tolist() != second.tolist()
    assert step_rows(12, 4, 0, 5).tolist() == second[8:].tolist()
    assert step_rows(12, 4, 1, 0).tolist() != first[:4].tolist()


def test_hosts_take_parts_of_the_same_batch():
    parts = [step_rows(10, 4, 3, 7, (host, 2)) for host in range(2)]
    assert np.concatenate(parts).tolist() == step_rows(10, 4, 3, 7).tolist()


def item(i, text):
    return Item(i, ({"role": "user", "content": text},), "math-hard", "math", "1", text)


def test_long_prompts_are_dropped_and_counted_never_cut():
    items = [item(0, "abc"), item(1, "abcdefgh"), item(2, "ab")]
    encode = lambda messages: list(messages[-1]["content"].encode())
    kept = encode_prompts(items, encode, lambda tokens: len(tokens) <= 4, DataConfig())
    assert [i.id for i in kept.items] == [0, 2] and kept.dropped == (items[1],) and kept.cut == 0
    assert kept.tokens == [list(b"abc"), list(b"ab")]
    with pytest.raises(UserError, match="the shortest has 2 tokens; raise the last of config.buckets.prompt"):
        encode_prompts(items, encode, lambda tokens: False, DataConfig())


def test_what_is_left_out_is_named_by_its_row():
    rows = [f"q.jsonl:{i}" for i in range(9)]
    assert named(rows, 30) == "; ".join(rows[:5]) + " and 25 more"
    assert named(rows[:2], 2) == "q.jsonl:0; q.jsonl:1" and named(rows, 9).endswith(" and 4 more")
    assert "too_long=cut" in mend_of_length(DataConfig())
    assert mend_of_length(DataConfig(too_long="cut")) == "raise the last of config.buckets.prompt"


def test_completions_are_padded_on_the_right():
    tokens, length = pad_completions([[[1, 2], [3]], [[4, 5, 6], []]], 4)
    assert tokens.tolist() == [[[1, 2, 0, 0], [3, 0, 0, 0]], [[4, 5, 6, 0], [0, 0, 0, 0]]]
    assert length.tolist() == [[2, 1], [3, 0]]


def feed_of(rows, batch, width=len, **fields):
    """The batches of texts, each of the task that its first letter names."""
    config = DataConfig(tasks=("ann", "ben"), seed=5, **fields)
    parts = ["ab".index(row[0]) for row in rows]
    return rows_in_memory(rows, parts, config, Batching(batch, width, 5, config.bucket_steps))


@pytest.mark.parametrize("batch", [1, 4])
def test_the_first_step_of_every_width_is_found(batch):
    """Against a list of all steps: a width that no batch has is absent, and steps may begin anywhere."""
    rows = ["a" * n for n in np.random.default_rng(0).choice([8, 16, 64], 30, p=[0.8, 0.15, 0.05])]
    for steps in (range(25), range(9, 40), range(3)):
        all_widths = [max(len(rows[i]) for i in step_rows(30, batch, 5, k)) for k in steps]
        want = {width: steps[all_widths.index(width)] for width in set(all_widths)}
        assert feed_of(rows, batch).steps_by_width(steps) == want


def test_rows_in_memory_come_in_the_order_of_their_steps():
    rows = [f"a{i}" for i in range(10)]
    feed = feed_of(rows, 4)
    for k in (0, 7, 3, REFILL_STRIDE + 2):
        assert feed.batch(k) == [rows[i] for i in step_rows(10, 4, 5, k)]
    assert feed.state(3) == {}


def test_weights_share_out_every_batch_and_each_task_has_epochs_of_its_own():
    rows = [f"a{i}" for i in range(6)] + [f"b{i}" for i in range(30)]
    feed = feed_of(rows[::-1], 8, weights=(3.0, 1.0))
    met = [row for k in range(15) for row in feed.batch(k)]
    for k in range(15):
        assert sum(row[0] == "a" for row in feed.batch(k)) == 6
    small, large = ([row for row in met if row[0] == task] for task in "ab")
    assert all(sorted(small[i : i + 6]) == rows[:6] for i in range(0, 90, 6)) and small[:6] != small[6:12]
    assert sorted(large) == sorted(rows[6:])
    with pytest.raises(UserError, match="weights: task 'ben' has no training row"):
        feed_of(rows[:6], 2, weights=(1.0, 1.0))


def test_rows_of_several_steps_are_sorted_by_their_buckets():
    """The same rows as without, in fewer wide batches; and not the narrow ones first."""
    rows = ["a" * n for n in np.random.default_rng(0).choice([8, 64], 48, p=[0.8, 0.2])]
    plain, sorted_ = feed_of(rows, 4), feed_of(rows, 4, bucket_steps=6)
    for first in (0, 6):
        a, b = ([feed.batch(k) for k in range(first, first + 6)] for feed in (plain, sorted_))
        assert sorted(sum(a, [])) == sorted(sum(b, []))
        assert sum(max(map(len, batch)) == 64 for batch in b) < sum(max(map(len, batch)) == 64 for batch in a)
    widths = [max(map(len, sorted_.batch(k))) for k in range(12)]
    assert widths[:6] != sorted(widths[:6]) or widths[6:] != sorted(widths[6:])
