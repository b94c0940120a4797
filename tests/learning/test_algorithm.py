"""Settings of an algorithm: presets, a user's own, and the one line that refuses a wrong one."""

import pytest

from gtalign_jax.errors import UserError
from gtalign_jax.learning.algorithm import PRESETS, AlgorithmConfig, resolve_algorithm


def mine():
    return AlgorithmConfig(scale="none", clip_high=0.5)


def not_an_algorithm():
    return {"scale": "none"}


def not_a_choice():
    return AlgorithmConfig(ratio="word")


def test_presets_and_a_users_own():
    wanted = "ppo_paper ppo grpo dr_grpo dapo gspo rloo gdpo reinforce_pp cispo".split()
    assert set(wanted) <= set(PRESETS)
    assert all(resolve_algorithm(name) is PRESETS[name] for name in PRESETS)
    assert resolve_algorithm(f"{__name__}:mine") == mine()
    assert hash(mine()) == hash(resolve_algorithm(f"{__name__}:mine"))


def test_the_papers_run():
    """verl's defaults: gamma 1, lambda 1, clip 0.2, dual clip 3, value clip 0.5; 512 / 32 mini-batches."""
    c = PRESETS["ppo_paper"]
    assert (c.advantage, c.gamma, c.lam, c.clip_low, c.clip_high) == ("gae", 1.0, 1.0, 0.2, 0.2)
    assert (c.dual_clip, c.value_clip, c.minibatches, c.epochs, c.kl_coef) == (3.0, 0.5, 16, 1, 0.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grpoo", "use one of ppo_paper, ppo, grpo"),
        ("no_such_module:f", "No module named"),
        (f"{__name__}:nothing", "nothing"),
        (f"{__name__}:not_an_algorithm", "must return an AlgorithmConfig, not dict"),
        (f"{__name__}:PRESETS", "is not a function"),
        (
            f"{__name__}:not_a_choice",
            "config.align.algorithm='.*:not_a_choice': ratio='word': must",
        ),
        (":mine", "config.align.algorithm=':mine': write module:function"),
    ],
)
def test_a_wrong_name_is_one_line(name, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve_algorithm(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(advantage="vtrace"), "^advantage='vtrace': must be one of group, gae, returns"),
        (dict(scale="mean"), "must be one of std, none, rloo, batch, gdpo or module:function"),
        (dict(ratio="a:b"), "must be one of token, sequence"),
        (dict(kl_coef=0.1, kl_estimator="k1"), "no expected gradient in a loss"),
        (dict(scale="gdpo", kl_coef=0.1, kl_place="reward"), "use kl_place='loss'"),
        (dict(kl_target=0.1), "kl_target needs a KL term"),
        (dict(reference_every=10), "reference_every needs a KL term"),
        (dict(dual_clip=1.1), "must exceed 1 \\+ clip_high"),
        (dict(std_ddof=2), "std_ddof=2"),
        (dict(overlong_margin=200.0), "must be a share"),
        (dict(component_weights=(1.0,)), "one for each"),
        (dict(epochs=0), "^epochs=0: must be positive"),
    ],
)
def test_a_wrong_field_is_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        AlgorithmConfig(**fields)
    assert "\n" not in str(caught.value)
