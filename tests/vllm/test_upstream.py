"""A price steers a real vLLM: the server in front of it edits the matrix between two of its answers."""

import asyncio
import contextlib
import ssl

import numpy as np
import pytest

from gtalign_jax.chain.prompt import format_chain
from gtalign_jax.chain.solver import solver_analysis
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.game.pricing import as_written, per_token
from gtalign_jax.models import hf
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.remote.client import open_client
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.serving.server.ask import Ask, Pricing
from gtalign_jax.serving.server.parts import Usage
from gtalign_jax.serving.server.upstream import Upstream, find_models

ASKED = ({"role": "user", "content": "Which train do you mean?"},)
FREE = np.array([[[2, 2], [0, 0], [2.5, 2.5]]] * 2)
PAID = as_written(per_token(FREE, 4.0))
CHAINS = {
    name: format_chain("A guess may be wrong.", matrix, solver_analysis(matrix), response)
    for name, matrix, response in (("AQ", FREE, "At noon. Which day?"), ("DA", PAID, "At noon."))
}
PRICE = Pricing("per_token", 4.0)


@pytest.fixture(scope="module")
def engine():
    tokenizer = train_tokenizer([*CHAINS.values(), ASKED[0]["content"]] * 3, 420)
    config = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        initializer_range=0.1,
    )
    return Engine(tokenizer, config, (tokenizer.eos_token_id,))


@pytest.fixture(scope="module")
def url(serve, engine, teach, tmp_path_factory):
    prompt, folder = engine_lib.encode(engine, ASKED), tmp_path_factory.mktemp("taught")
    ids = {name: engine_lib.encode(engine, chain) for name, chain in CHAINS.items()}
    params = teach(engine, [[*prompt, *ids[name], *engine.eos_ids] for name in ("AQ", "AQ", "DA")])
    hf.save_params(params, engine.model_config, folder / "hf")
    engine.tokenizer.save_pretrained(folder / "hf")
    return f"{serve(folder / 'hf').url}/v1"


def answer(url, ask):
    """(text, usage, how it ended, what was done to the matrix) of its one answer."""

    async def collect():
        client = open_client(url, "none", 4, 60.0, ssl.create_default_context())
        async with client:
            (parts,) = Upstream(client, await find_models(client, url)).answers(ask)
            async with contextlib.aclosing(parts):
                return [part async for part in parts]

    found = asyncio.run(collect())
    usage = sum((part.usage for part in found), Usage())
    return "".join(part.text for part in found), usage, found[-1].finish, found[-1].steering


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("analyze", [None, "model", "solver"])
def test_a_price_changes_what_vllm_answers(url, engine, chat, analyze):
    ids = engine_lib.encode(engine, ASKED)
    prompt = ASKED if chat else engine.tokenizer.decode(ids)
    pricing = {} if analyze is None else {"pricing": PRICE, "analyze": analyze}
    text, usage, finish, steering = answer(
        url, Ask(chat, (prompt,), temperature=0.0, max_tokens=224, **pricing)
    )
    name = "AQ" if analyze is None else "DA"
    assert (text, finish) == (CHAINS[name], "stop")
    count = len(engine_lib.encode(engine, text)) + 1
    if analyze is None:
        assert steering is None and usage == Usage(len(ids), count)
    else:
        assert steering["steered"] and steering["action"] == steering["recommended"] == "DA"
        assert usage.prompt > 2 * len(ids) and usage.completion <= count


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
