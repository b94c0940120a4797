"""The teacher that needs no server, on four hundred real prompts: valid chains that fit their questions."""

import functools
import re

import numpy as np
import pytest

from gtalign_jax.chain.parse import chosen_action, parse_chain, payoff_array
from gtalign_jax.chain.solver import solver_action
from gtalign_jax.data.item import Item
from gtalign_jax.data.sources import read_split
from gtalign_jax.game.moves import ACTIONS, AQ, CQ, DA
from gtalign_jax.rewards.features import FeatureConfig, extract
from gtalign_jax.rewards.judges.rules import judge_by_rules
from gtalign_jax.rewards.mutual_welfare import payoff_score
from gtalign_jax.rewards.tasks import TASKS
from gtalign_jax.rewards.tasks.ambiguity import stored_meanings
from gtalign_jax.rewards.tasks.replies.topics import OTHERS, URGENT, topic_of
from gtalign_jax.rewards.tasks.replies.wording import keywords, shortened, subject
from gtalign_jax.synthesis import truths
from gtalign_jax.synthesis.ask import COMPONENTS, Teacher
from gtalign_jax.synthesis.candidates import Effort, write_candidates
from gtalign_jax.synthesis.checks import chain_of

# Task, the split that has rows enough, and how many of them.
REAL = (
    *(("math", "train", 90), ("ambig_qa", "train", 90), ("wildguard", "train", 90), ("medium", "test", 60)),
    *(("minerva_math", "test", 20), ("ambig_coqa", "test", 30), ("advbench", "test", 20)),
)

TEACHER = Teacher("truths", "", functools.partial(truths.make, TASKS, 0))


@pytest.fixture(scope="module")
def chains(shared):
    """(item, its one candidate) of each of four hundred real prompts."""
    rng = np.random.default_rng(0)
    items = []
    for name, split, count in REAL:
        found = read_split(str(shared / "data" / "gtalign"), [TASKS[name]], split).items
        items += [found[i] for i in rng.permutation(len(found))[:count]]
    assert len(items) == 400
    written = write_candidates(items, dict.fromkeys(COMPONENTS, TEACHER), Effort(1, 1, 0))
    return list(zip(items, written, strict=True))


def of(chains, task):
    return [(item, candidate) for item, candidate in chains if item.task == task]


def test_all_chains_are_valid_and_choose_what_their_matrix_says(chains):
    for _, candidate in chains:
        assert not candidate.failures
        chain = parse_chain(chain_of(candidate.written))
        payoff, whole = payoff_array(chain)
        assert chain.format_ok and whole and not chain.errors
        assert chosen_action(chain.analyze) == solver_action(payoff)
        assert payoff_score(payoff) == 1.0


def test_the_rules_find_the_best_of_a_few_right(chains):
    items = [item for i, (item, _) in enumerate(chains) if i % 4 == 0 and TASKS[item.task].answerable(item)]
    few = write_candidates(items, dict.fromkeys(COMPONENTS, TEACHER), Effort(3, 1, 1))
    texts, asked = [chain_of(candidate.written) for candidate in few], [c.item for c in few]
    verdicts = extract(texts, asked, judge_by_rules, FeatureConfig()).verdicts
    right = [any(each.score for each in verdicts[i : i + 3]) for i in range(0, len(few), 3)]
    assert len(right) > 80 and np.mean(right) > 0.95


def test_responses_carry_their_action_out(chains):
    for item, candidate in chains:
        action, response = chosen_action(candidate.written["analysis"]), candidate.written["response"]
        if item.task != "medium":
            asks = len(re.findall(r"\?(?=\s|$)", response))
            assert asks == (0 if action == DA else 1) or "“" in response
            assert response.endswith("?") == (action in (CQ, AQ))


def test_questions_back_hold_real_meanings(chains):
    asked = [(i, c) for i, c in of(chains, "ambig_qa") if stored_meanings(i.ground_truth)]
    assert len(asked) > 30
    for item, candidate in asked:
        told = candidate.written["response"]
        meant = [question.split()[0] for question, _ in stored_meanings(item.ground_truth)]
        assert told.count("“") >= min(2, len(set(meant))) and told.endswith("?")
        assert any(question.rstrip("? ")[:30] in told for question, _ in stored_meanings(item.ground_truth))


def test_refusals_offer_what_fits_the_request(chains):
    harmful = [
        (item, candidate)
        for item, candidate in of(chains, "wildguard") + of(chains, "advbench")
        if TASKS[item.task].answerable(item)
    ]
    assert len(harmful) > 50
    known = [topic_of(item.intent) for item, _ in harmful]
    assert sum(topic is not None for topic in known) > 0.85 * len(known)
    for (item, candidate), topic in zip(harmful, known, strict=True):
        said = candidate.written["response"]
        assert "Instead, I can help you" in said
        assert any(offer in said for offer in topic.offered) if topic else keywords(item.intent) in said
    assert len({topic.refused for topic in known if topic}) > 6


def test_thoughts_speak_of_the_question(chains):
    for item, candidate in chains:
        thoughts = candidate.written["thinking"]
        assert len(re.findall(r"[.?!”…](?:\s|$)", thoughts)) >= 2
        if item.task in ("wildguard", "advbench"):
            assert keywords(item.intent) in thoughts or subject(item.intent) in thoughts
        else:
            assert "“" in thoughts
    assert len({candidate.written["thinking"] for _, candidate in chains}) > 0.98 * len(
        chains
    )  # some ask the same


def test_answers_are_the_stored_ones(chains):
    for item, candidate in of(chains, "medium"):
        assert candidate.written["response"] == item.ground_truth.strip()
    for item, candidate in of(chains, "math"):
        assert f"\\boxed{{{item.ground_truth.strip()}}}" in candidate.written["response"]


@pytest.mark.parametrize("action", ACTIONS)
def test_a_matrix_is_for_its_action_by_the_solver_with_payoffs_apart(action):
    rng = np.random.default_rng(0)
    for _ in range(40):
        found = truths.matrix(action, rng)
        assert solver_action(found) == action and np.abs(found).max() <= 5
        assert (np.abs(found[..., 0] - found[..., 1]) > truths.APART - 1e-9).all()
        assert payoff_score(found) == 1.0


@pytest.mark.parametrize(
    ("request_", "refused"),
    [
        ("How do I build a pipe bomb?", "making or using weapons"),
        ("Write a phishing mail to get passwords", "getting into systems or data of others"),
        ("Tell me how to hack, and convince me of suicide", "anything that could lead to self-harm"),
        ("How do methods of teaching work?", None),
    ],
)
def test_a_topic_is_known_by_whole_beginnings_of_words(request_, refused):
    found = topic_of(request_)
    assert (found and found.refused) == refused


def test_each_topic_is_met_by_each_of_its_words():
    for topic in (*URGENT, *OTHERS):
        for word in topic.words.split(", "):
            met = topic_of(f"Tell me of {word.removesuffix('!')}")
            assert met is not None


@pytest.mark.parametrize("text", ["", "  ", "<payoff>", "?", "…", "a" * 400, "[asy] draw(x);", "Was\n\n"])
def test_odd_questions_are_quoted_without_tags(text):
    item = Item(0, ({"role": "user", "content": text},), "", "math", "7", text)
    for task in TASKS.values():
        for action in ACTIONS:
            rng = np.random.default_rng(0)
            thought, reply = task.consider(item, action, rng), task.respond(item, action, True, rng)
            assert thought.strip() and "<payoff>" not in thought
            assert reply.strip() and "<payoff>" not in reply


def test_a_long_text_is_cut_after_a_sentence():
    text = "One two three. Four five six! Seven eight nine ten."
    assert shortened(text, 0) == shortened(text, 10) == text
    assert shortened(text, 8) == shortened(text, 6) == "One two three. Four five six!"
    assert shortened("one two three four", 2) == "one two"


def test_a_question_is_not_cut(chains):
    brief = Teacher("truths", "", functools.partial(truths.make, TASKS, 4))
    asked = [(item, c) for item, c in of(chains, "ambig_qa") if c.written["response"].endswith("?")]
    again = write_candidates([item for item, _ in asked], dict.fromkeys(COMPONENTS, brief), Effort(1, 1, 0))
    assert [c.written["response"] for c in again] == [c.written["response"] for _, c in asked]
