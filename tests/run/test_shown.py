"""What the cold start shows: exercises beside chains, and the weight of the choice in both."""

import dataclasses
import re

import numpy as np
import pytest

from configs import quickstart
from gtalign_jax.chain.solver import solver_analysis
from gtalign_jax.errors import UserError
from gtalign_jax.game.moves import ACTIONS
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.run.job import make_job
from gtalign_jax.run.shown import write_exercises
from gtalign_jax.serving.splice import read_payoff


def job_of(tmp_path, **sft):
    config = quickstart.get_config("tiny")
    config.sft.update(sft)
    return make_job(config, tmp_path)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return job_of(tmp_path_factory.mktemp("shown"), exercises=0.5, choice_weight=5.0)


def parts_of(job):
    """(chains, bare games, chains at a price) of a job's demonstrations."""
    chains = [row for row in job.demonstrations if row.task]
    exercises = job.demonstrations[len(chains) :]
    assert not any(row.task for row in exercises)
    return chains, exercises[::2], exercises[1::2]


def texts_of(job, rows):
    return [engine_lib.decode_tokens(job.engine, ids) for row in rows for ids in row.completions]


def test_exercises_follow_the_chains_and_fill_their_rows(job):
    chains, games, priced = parts_of(job)
    assert len(games) + len(priced) == round(len(chains) / 2)
    found = texts_of(job, games)
    assert len(set(found)) == len(found) == 2 * len(games)
    for text in found:
        lines = r"(DA .*: (DA|CQ), AQ .*: choose (DA|CQ|AQ)\.\n)"
        assert re.fullmatch(rf"<analyze>\n{lines}{{1,6}}</analyze>", text), text
    for rows, ends in ((games, True), (priced, False)):
        for ids in (ids for row in rows for ids in row.completions):
            assert len(ids) <= job.settings.max_new_tokens
            assert (ids[-1] == job.engine.eos_ids[0]) is ends


def test_a_chain_at_a_price_is_cut_after_the_analysis_that_follows_from_its_matrix(job):
    chains, _, priced = parts_of(job)
    written = {text.partition("<payoff>")[0] for text in texts_of(job, chains)}
    edited = 0
    for row in priced:
        assert row.prompt in [chain.prompt for chain in chains]
        for text in texts_of(job, [row]):
            before, _, after = text.partition("<payoff>")
            payoff = read_payoff(text[: text.index("</payoff>") + len("</payoff>")])
            assert before in written and after.endswith(f"<analyze>\n{solver_analysis(payoff)}\n</analyze>")
            edited += f"<payoff>{after}" not in "".join(texts_of(job, chains))
    assert edited > len(priced)


def test_what_an_analysis_settles_on_weighs_more_and_of_a_chain_at_a_price_nothing_else_is_learnt(job):
    chains, games, priced = parts_of(job)
    for row in job.demonstrations:
        for ids, weight in zip(row.completions, row.weights, strict=True):
            named = [engine_lib.decode_tokens(job.engine, [i]).strip() for i in np.array(ids)[weight > 1]]
            text = engine_lib.decode_tokens(job.engine, ids)
            assert named == re.findall(r": (?:choose )?(DA|CQ|AQ)", text) and set(named) <= set(ACTIONS)
    assert {w for row in chains + games for weight in row.weights for w in weight.tolist()} == {1.0, 5.0}
    for row in priced:
        for ids, weight in zip(row.completions, row.weights, strict=True):
            left_out = engine_lib.decode_tokens(job.engine, np.array(ids)[weight == 0])
            assert '{"DQ_AQ": {"LLM":' in left_out and "</payoff>" in left_out and "choose" not in left_out


def test_weights_of_blocks_and_of_the_choice_multiply(tmp_path):
    job = job_of(tmp_path, exercises=0.1, choice_weight=3.0, block_weights=(1.0, 1.0, 2.0, 1.0))
    chains, games, priced = parts_of(job)
    for rows, values in ((chains, {1.0, 2.0, 6.0}), (games, {1.0, 3.0}), (priced, {0.0, 1.0, 2.0, 6.0})):
        assert {w for row in rows for weight in row.weights for w in weight.tolist()} == values


def test_without_a_chain_there_are_no_exercises(tmp_path):
    config = quickstart.get_config("tiny")
    config.features.chain = "plain"
    config.sft.update(exercises=1.0, choice_weight=5.0)
    assert all(row.task for row in make_job(config, tmp_path).demonstrations)


def test_a_row_without_room_for_one_game_is_refused(job):
    with pytest.raises(UserError, match="max_new_tokens=20: no exercise fits; raise it"):
        write_exercises(
            job.engine, job.demonstrations[:4], dataclasses.replace(job.settings, max_new_tokens=20)
        )
