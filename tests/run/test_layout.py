"""What stands in a checkpoint, by name: runs of other versions must find it there."""

import jax
import numpy as np
import pytest

from gtalign_jax.run.layout import restored, stored
from gtalign_jax.types import Completions, ModelState, TrainState

WAITING = Completions(*(np.full(2, i) for i in range(5)))
PLAIN = TrainState(policy=ModelState({"w": np.ones(2)}, ()), critic=None, step=np.int32(3), rng=np.zeros(2))


def test_a_plain_state_has_no_places_for_parts_it_lacks():
    assert list(stored(PLAIN)) == ["policy", "critic", "step", "rng"]


def test_completions_that_wait_have_the_names_of_version_0_1():
    tree = stored(PLAIN.replace(waiting=WAITING))
    assert tree["kl_coef"] is None and tree["reference"] is None
    assert sorted(tree["waiting"]) == ["action_mask", "completion", "finished", "length", "sampler_logp"]
    assert tree["waiting"]["completion"] is WAITING.tokens
    assert tree["waiting"]["sampler_logp"] is WAITING.logp


@pytest.mark.parametrize(
    "state",
    [
        PLAIN,
        PLAIN.replace(waiting=WAITING),
        PLAIN.replace(kl_coef=np.float32(0.1), reference={"w": np.ones(2)}),
    ],
    ids=["plain", "overlap", "slow parts"],
)
def test_a_state_comes_back_as_it_was(state):
    again = restored(stored(state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
