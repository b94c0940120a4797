"""Steered examples of a trained model for the report: the same prompts under an edited matrix."""

import dataclasses
from typing import Any

import jax

from gtalign_jax.data.item import Item
from gtalign_jax.errors import UserError
from gtalign_jax.game.pricing import STEP, apply_policy, as_written
from gtalign_jax.rollout.sampling import GREEDY
from gtalign_jax.run.job import Job
from gtalign_jax.serving.steer import Branch, Edit, Options, Steered, steer, stop_ending
from gtalign_jax.types import PyTree


def steer_examples(job: Job, params: PyTree) -> list[dict[str, Any]]:
    """One line of steering.jsonl a task, of the first test prompt whose action changes; none without a chain.

    When none of `config.steer.tries` prompts changes, the first that has a usable matrix is shown.
    Decoding is greedy, so the two branches differ by the edit alone.
    """
    if job.settings.features.plain:
        return []
    buckets = dataclasses.replace(job.engine.buckets, batch=(1,))
    engine = dataclasses.replace(job.engine, sampling=GREEDY, buckets=buckets)
    stop = stop_ending(engine)
    config = job.settings.steer
    edit = price_edit(config.policy, config.price, config.step)

    def attempt(tokens: list[int]) -> Steered | None:
        try:
            return steer(
                engine,
                params,
                [tokens],
                [edit],
                jax.random.key(0),
                Options(job.settings.max_new_tokens),
                stop=stop,
                constraint=job.generator.constraint,
            )[0]
        except UserError:
            return None  # this chain has no usable matrix to edit; another prompt's may

    examples = []
    for task in dict.fromkeys(item.task for item in job.test.items):
        shown = None
        asked = zip(job.test.items, job.test.tokens, strict=True)
        for item, tokens in [(item, tokens) for item, tokens in asked if item.task == task][: config.tries]:
            steered = attempt(tokens)
            if steered is None:
                continue
            changed = steered.edited[0].action != steered.original.action
            if shown is None or changed:
                shown = _line(item, steered, config.policy, config.price)
            if changed:
                break
        if shown is not None:
            examples.append(shown)
    return examples


def price_edit(policy: str, price: float, step: float = STEP) -> Edit:
    """The edit of a pricing policy, as it is written."""
    return lambda payoff: as_written(apply_policy(payoff, policy, price), step)


def _line(item: Item, steered: Steered, policy: str, price: float) -> dict[str, Any]:
    return {
        "task": item.task,
        "prompt": item.messages[-1]["content"],
        "policy": policy,
        "price": price,
        "before": branch_fields(steered.original),
        "after": branch_fields(steered.edited[0]),
    }


def branch_fields(branch: Branch) -> dict[str, Any]:
    """A branch as steering.jsonl holds it."""
    payoff = None if branch.payoff is None else branch.payoff.tolist()
    return {"payoff": payoff, "action": branch.action, "text": branch.text}
