"""A prompt before its answer, with log-probabilities: what tools that score given texts ask for."""

import asyncio
import dataclasses
import threading

import jax
import numpy as np
import openai
import pytest
import torch
import transformers

from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.models import hf
from gtalign_jax.models.transformer import init_params
from gtalign_jax.rollout import continuous, programs
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.folder import EngineOptions, load_engine
from gtalign_jax.serving.server import answers
from gtalign_jax.serving.server.answers import Account
from gtalign_jax.serving.server.ask import Ask, Bounds
from gtalign_jax.serving.server.local import Local
from gtalign_jax.serving.server.scheduler import Closed
from tests.small import small_model

TEXT = "the payoff of a clear question\n"
LONG = TEXT * 7
ATOL = 1e-4
NAMED = {"model": "small", "temperature": 0}
SCORED = {**NAMED, "echo": True, "max_tokens": 1, "logprobs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small"
    tokenizer = train_tokenizer([TEXT] * 3, 450)
    config = small_model(len(tokenizer) + 3)  # as padded tables have: tokens that no text stands for
    hf.save_params(init_params(jax.random.key(0), config), config, path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def local(folder):
    engine, params = load_engine(folder, EngineOptions(buckets=BucketConfig((16, 64), (16,))))
    return Local(continuous.open_places(engine, params, 2), "small")


@pytest.fixture(scope="module")
def bounds():
    return Bounds(16, 8, ("none",))


@pytest.fixture(scope="module")
def peer(folder):
    """peer(ids): the log-probabilities [n, V] that transformers has after each token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def scored(ids):
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1).numpy()

    return scored


def prompts(local, count):
    """Token lists of every length, those of padded tables and end tokens among them."""
    rng, vocab = np.random.default_rng(count), local._places.engine.model_config.vocab_size
    return [[*rng.integers(0, vocab, n).tolist(), vocab - 1] for n in rng.permutation(60)[:count]]


def test_a_prompts_tokens_have_the_log_probabilities_of_transformers(client, local, peer):
    asked = prompts(local, 8)
    choices = client.completions.create(prompt=asked, **SCORED).choices
    assert [choice.index for choice in choices] == list(range(8))
    for ids, choice in zip(asked, choices, strict=True):
        found, want = choice.logprobs, peer(ids)
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == len(ids) + 1
        theirs = want[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(found.token_logprobs[1:-1], theirs, atol=ATOL)
        largest = [max(top.values()) for top in found.top_logprobs[1:]]
        np.testing.assert_allclose(largest, want.max(-1), atol=ATOL)
        # The token written, an end token too, which the text does not show.
        assert found.token_logprobs[-1] == pytest.approx(want[-1].max(), abs=ATOL)


def test_the_likeliest_tokens_of_a_prompt_are_those_of_transformers(direct, local, peer):
    ids = local._places.engine.tokenizer(LONG)["input_ids"]
    asked = {**SCORED, "logprobs": 5, "max_tokens": 0}
    (choice,) = direct.completions.create(prompt=LONG, **asked).choices
    decoded = [local._places.engine.tokenizer.decode([i]) for i in range(peer(ids).shape[1])]
    for there, want, at in zip(ids[1:], peer(ids), choice.logprobs.top_logprobs[1:], strict=False):
        expected = {decoded[i]: want[i] for i in (*np.argsort(want)[-5:], there)}
        assert at == pytest.approx(expected, abs=ATOL)


def test_the_text_is_the_prompt_and_what_follows(client):
    alone = client.completions.create(prompt=TEXT, max_tokens=9, logprobs=1, **NAMED).choices[0]
    asked = {"prompt": TEXT, "max_tokens": 9, "echo": True, **NAMED}
    plain = client.completions.create(**asked).choices[0]
    assert plain.text == TEXT + alone.text and plain.logprobs is None
    whole = client.completions.create(logprobs=1, **asked).choices[0]
    assert whole.text == plain.text and whole.finish_reason == alone.finish_reason
    told, after = whole.logprobs, alone.logprobs
    count = len(told.tokens) - len(after.tokens)
    assert "".join(told.tokens[:count]) == TEXT and told.tokens[count:] == after.tokens
    assert told.text_offset[:count] == [len("".join(told.tokens[:i])) for i in range(count)]
    assert told.text_offset[count:] == [len(TEXT) + at for at in after.text_offset]
    np.testing.assert_allclose(told.token_logprobs[count:], after.token_logprobs, atol=1e-5)
    events = [e.choices[0] for e in client.completions.create(logprobs=1, stream=True, **asked)]
    assert "".join(event.text for event in events) == whole.text
    said = [logp for event in events if event.logprobs for logp in event.logprobs.token_logprobs]
    assert said == pytest.approx(whole.logprobs.token_logprobs)


def test_the_prompt_alone(client):
    made = client.completions.create(prompt=[TEXT, LONG], **{**SCORED, "max_tokens": 0})
    assert [choice.text for choice in made.choices] == [TEXT, LONG]
    assert {choice.finish_reason for choice in made.choices} == {"length"}
    assert made.usage.completion_tokens == 0
    one = client.completions.create(prompt=[5], **{**SCORED, "max_tokens": 0})
    assert one.choices[0].logprobs.token_logprobs == [None]


def test_an_end_token_is_told_after_an_echo(local, peer):
    """Who adds up the log-probabilities of a given text counts tokens from the end of the list."""
    places = local._places
    ids = places.engine.tokenizer(TEXT)["input_ids"]
    likeliest = int(peer(ids)[-1].argmax())
    engine = dataclasses.replace(places.engine, eos_ids=(likeliest,))
    ending = Local(continuous.open_places(engine, places.params, 1), "small")
    ask = Ask(False, (tuple(ids),), max_tokens=1, temperature=0.0, logprobs=True, top=1, echo=True)
    (choice,) = asyncio.run(answers.whole(ask, ending.answers(ask), "small", Account()))["choices"]
    assert (choice["finish_reason"], choice["text"]) == ("stop", TEXT)
    told = choice["logprobs"]
    assert len(told["tokens"]) == len(ids) + 1 and told["text_offset"][-1] == len(TEXT)
    assert told["token_logprobs"][-1] == pytest.approx(peer(ids)[-1].max(), abs=ATOL)
    asyncio.run(ending.close())


def test_nothing_is_compiled_for_a_prompt_that_is_scored(direct, local):
    before = programs.compiled_programs()
    direct.completions.create(prompt=prompts(local, 5), **SCORED)
    assert programs.compiled_programs() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"echo": 1}, "echo=1: must be true or false"),
        ({"max_tokens": 0, "echo": False}, "max_tokens: must be a whole number from 1 to 16; 0 with echo"),
        ({"max_tokens": 0, "echo": None}, "max_tokens: must be a whole number from 1 to 16; 0 with echo"),
        ({"logprobs": None, "reasoning": "hidden"}, "echo: shows a prompt before an answer"),
        ({"logprobs": None, "pricing": {"policy": "none", "price": 0}}, "echo: shows a prompt"),
        ({"prompt": [1] * 65}, "the prompt has 65 tokens; at most 64"),
    ],
)
def test_an_echo_that_cannot_be_is_refused(direct, changes, said):
    body = {"prompt": TEXT, **SCORED, **changes}
    with pytest.raises(openai.BadRequestError, match=said):
        direct.post("/completions", body=body, cast_to=object)


def test_a_chat_has_no_echo(direct):
    with pytest.raises(openai.BadRequestError, match="echo: of /v1/completions alone"):
        direct.chat.completions.create(
            model="small", messages=[{"role": "user", "content": TEXT}], extra_body={"echo": True}
        )
    neutral = direct.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": TEXT}],
        max_tokens=1,
        extra_body={"echo": False},
    )
    assert neutral.usage.completion_tokens == 1


def test_what_fails_is_the_request_that_asked_for_it(direct, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such device")

    with monkeypatch.context() as patched:
        patched.setattr(continuous, "score", broken)
        with pytest.raises(openai.InternalServerError, match="the server failed"):
            direct.completions.create(prompt=TEXT, **SCORED)
        assert direct.completions.create(prompt=TEXT, max_tokens=2, **NAMED).usage.completion_tokens == 2
    assert direct.completions.create(prompt=TEXT, **SCORED).choices[0].text.startswith(TEXT)


def test_work_beside_the_rows_waits_for_its_turn_and_for_nobody_who_left(folder):
    engine, params = load_engine(folder, EngineOptions(buckets=BucketConfig((16,), (16,))))
    other = Local(continuous.open_places(engine, params, 1), "small")
    scheduler, gate = other._scheduler, threading.Event()
    first = scheduler.compute(lambda: gate.wait(30))
    left, last = scheduler.compute(lambda: 1 / 0), scheduler.compute(lambda: 5)
    assert left.cancel() and scheduler.load().waiting >= 1
    gate.set()
    assert first.result(30) and last.result(30) == 5
    with pytest.raises(ZeroDivisionError):
        scheduler.compute(lambda: 1 / 0).result(30)
    scheduler.close(30)
    with pytest.raises(Closed):
        scheduler.compute(lambda: 5)
