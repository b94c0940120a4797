"""A price steers a real vLLM: the server in front of it edits the matrix between two of its answers."""

import asyncio
import ssl

import pytest

from gtalign_jax.remote.client import open_client
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.serving.server.ask import Ask
from gtalign_jax.serving.server.parts import Usage
from gtalign_jax.serving.server.upstream import Upstream, find_models
from tests import upstreams
from tests.upstreams import ASKED, CHAINS, PRICE, UNSEEN


@pytest.fixture(scope="module")
def engine():
    return upstreams.make_engine()


@pytest.fixture(scope="module")
def taught(engine, teach, tmp_path_factory):
    return upstreams.write_folder(engine, teach, tmp_path_factory.mktemp("taught") / "hf")


@pytest.fixture(scope="module")
def url(serve, taught):
    return f"{serve(taught[0]).url}/v1"


def test_the_models_that_vllm_lists_are_found(url):
    async def names():
        async with open_client(url, "none", 4, 60.0, ssl.create_default_context()) as client:
            return await find_models(client, url)

    assert asyncio.run(names()) == ["policy"]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("analyze", [None, "model", "solver"])
def test_a_price_changes_what_vllm_answers(url, engine, chat, analyze):
    ids = engine_lib.encode(engine, ASKED)
    pricing = {} if analyze is None else {"pricing": PRICE, "analyze": analyze}
    ask = upstreams.asked(engine, chat, **pricing)
    text, usage, finish, steering = upstreams.answer(url, "policy", ask)
    name = "AQ" if analyze is None else "DA"
    assert (text, finish) == (CHAINS[name], "stop")
    count = len(engine_lib.encode(engine, text)) + 1
    if analyze is None:
        assert steering is None and usage == Usage(len(ids), count)
    else:
        assert steering["steered"] and steering["action"] == steering["recommended"] == "DA"
        assert usage.prompt > 2 * len(ids) and usage.completion <= count


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("analyze", ["model", "solver"])
@pytest.mark.parametrize("price", [PRICE, UNSEEN])
def test_a_steered_answer_of_vllm_is_one_generation_forced_to_its_prefix(
    url, engine, taught, chat, analyze, price
):
    ask = upstreams.asked(engine, chat, pricing=price, analyze=analyze)
    text, _, _, steering = upstreams.answer(url, "policy", ask)
    assert steering["steered"]
    upstreams.check_is_forced(engine, taught[1], text, analyze)


def test_the_tokens_that_vllm_writes_come_with_their_log_probabilities(url, engine):
    async def collect():
        async with open_client(url, "none", 4, 60.0, ssl.create_default_context()) as client:
            (parts,) = Upstream(client, ("policy",)).answers(
                Ask(True, (ASKED,), temperature=0.0, max_tokens=9, logprobs=True)
            )
            return [part async for part in parts]

    found = asyncio.run(collect())
    said = [token for part in found for token in part.tokens]
    assert len(said) == 9 and all(-2 < token.logp <= 0 for token in said)
    assert "".join(token.text for token in said) == "".join(part.text for part in found)
    assert found[-1].finish == "length"
