"""What real servers behind ours are asked: a model that knows chains by heart, and its steered answers."""

import asyncio
import contextlib
import ssl

import jax
import numpy as np

from gtalign_jax.chain.prompt import format_chain
from gtalign_jax.chain.solver import solver_analysis
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.game.pricing import as_written, per_token
from gtalign_jax.models import hf
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.remote.client import open_client
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import placing, programs
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.decode_state import Forced
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.request import Placed, Rules
from gtalign_jax.rollout.sampling import GREEDY
from gtalign_jax.serving.server.ask import Ask, Pricing
from gtalign_jax.serving.server.parts import Usage
from gtalign_jax.serving.server.upstream import Upstream
from gtalign_jax.serving.splice import CLOSE

ASKED = ({"role": "user", "content": "Which train do you mean?"},)
FREE = np.array([[[2, 2], [0, 0], [2.5, 2.5]]] * 2)
PAID = as_written(per_token(FREE, 4.0))
CHAINS = {
    name: format_chain("A guess may be wrong.", matrix, solver_analysis(matrix), response)
    for name, matrix, response in (("AQ", FREE, "At noon. Which day?"), ("DA", PAID, "At noon."))
}
PRICE = Pricing("per_token", 4.0)
UNSEEN = Pricing("subscription", 1.7)  # a matrix that the model was not taught
ROOM = 224


def make_engine():
    tokenizer = train_tokenizer([*CHAINS.values(), ASKED[0]["content"]] * 3, 470)
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
    buckets = BucketConfig(prompt=(64,), completion=(ROOM,))
    return Engine(tokenizer, config, (tokenizer.eos_token_id,), buckets=buckets)


def write_folder(engine, teach, folder):
    """(folder, parameters) of the model that knows the chains, the free one better."""
    prompt = engine_lib.encode(engine, ASKED)
    ids = {name: engine_lib.encode(engine, chain) for name, chain in CHAINS.items()}
    params = teach(engine, [[*prompt, *ids[name], *engine.eos_ids] for name in ("AQ", "AQ", "DA")])
    end = {"eos_token_id": engine.tokenizer.eos_token_id}
    hf.save_params(params, engine.model_config, folder, tokenizer=engine.tokenizer, generation=end)
    return folder, params


def answer(url, model, ask):
    """(text, usage, how it ended, what was done to the matrix) of its one answer."""

    async def collect():
        async with open_client(url, "none", 4, 60.0, ssl.create_default_context()) as client:
            (parts,) = Upstream(client, (model,)).answers(ask)
            async with contextlib.aclosing(parts):
                return [part async for part in parts]

    found = asyncio.run(collect())
    usage = sum((part.usage for part in found), Usage())
    return "".join(part.text for part in found), usage, found[-1].finish, found[-1].steering


def asked(engine, chat, **changes):
    """The question as a chat, or as the same text."""
    prompt = ASKED if chat else engine.tokenizer.decode(engine_lib.encode(engine, ASKED))
    return Ask(chat, (prompt,), temperature=0.0, max_tokens=ROOM, **changes)


def forced_ids(engine, params, prefix):
    """One whole greedy generation of ours whose first tokens are given."""
    tokens = np.zeros((1, 1, ROOM), np.int32)
    tokens[..., : len(prefix)] = prefix
    placed = Placed(
        prompts=placing.place_prompts(
            engine, engine_lib.prompt_batch(engine, [engine_lib.encode(engine, ASKED)]), 1
        ),
        key=jax.random.key(0),
        group_size=1,
        slots=ROOM,
    )
    given = Forced(tokens, np.full((1, 1), len(prefix), np.int32))
    rules = Rules(engine_lib.make_ending(engine))
    made = programs.generate(params, engine.model_config, placed, GREEDY, rules, forced=given)
    return engine_lib.completion_ids(made.completions)[0].tolist()


def check_is_forced(engine, params, text, analyze):
    """A steered answer is, token for token, one whole generation of ours that is forced to its prefix."""
    tag = CLOSE if analyze == "model" else "<response>\n"
    before, _, after = text.partition(tag)
    prefix = engine_lib.encode(engine, before + tag)
    whole = forced_ids(engine, params, prefix)
    assert after and engine_lib.decode_tokens(engine, whole) == text
    assert whole[: len(prefix)] == prefix
    rest = engine_lib.encode(engine, after)
    assert whole[len(prefix) :] == rest + list(engine.eos_ids)[: len(whole) - len(prefix) - len(rest)]
