"""`transformers serve` behind ours, for what it can do: texts, whole and steered; chats that just begin."""

import pathlib

import pytest

from experiments.peers import launch, servers
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.serving.server.ask import ApiError
from tests import upstreams
from tests.upstreams import ASKED, CHAINS, PRICE, UNSEEN

REPO = pathlib.Path(__file__).resolve().parents[3]
PEERS = REPO / launch.DEFAULT


@pytest.fixture(scope="module")
def engine():
    if not (PEERS / "transformers_serve" / "installed.txt").is_file():
        pytest.skip(f"no transformers serve in {PEERS}: bench_serve --case=W makes it")
    return upstreams.make_engine()


@pytest.fixture(scope="module")
def taught(engine, teach, tmp_path_factory):
    return upstreams.write_folder(engine, teach, tmp_path_factory.mktemp("taught") / "hf")


@pytest.fixture(scope="module")
def ask(taught, engine):
    """ask(chat, **changes): the answer's text, usage, end and steering."""
    with servers.transformers_serve(taught[0], str(PEERS)) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        yield lambda chat, **changes: upstreams.answer(
            url, str(taught[0]), upstreams.asked(engine, chat, **changes)
        )


@pytest.mark.parametrize("chat", [True, False])
def test_an_answer_without_a_price_is_passed_on(ask, engine, chat):
    text, usage, finish, steering = ask(chat)
    assert (text, finish, steering) == (CHAINS["AQ"], "stop", None)
    assert usage.prompt == len(engine_lib.encode(engine, ASKED)) and usage.completion > 50


def test_a_stop_string_ends_it_and_is_no_part_of_it(ask):
    assert ask(False, stop=("</payoff>",))[0] == CHAINS["AQ"].partition("</payoff>")[0]


@pytest.mark.parametrize("analyze", ["model", "solver"])
def test_a_price_changes_what_it_answers(ask, analyze):
    text, _, finish, steering = ask(False, pricing=PRICE, analyze=analyze)
    assert (text, finish) == (CHAINS["DA"], "stop")
    assert steering["steered"] and steering["action"] == steering["recommended"] == "DA"


@pytest.mark.parametrize("analyze", ["model", "solver"])
@pytest.mark.parametrize("price", [PRICE, UNSEEN])
def test_a_steered_answer_is_one_generation_forced_to_its_prefix(ask, engine, taught, analyze, price):
    text, _, _, steering = ask(False, pricing=price, analyze=analyze)
    assert steering["steered"]
    upstreams.check_is_forced(engine, taught[1], text, analyze)


def test_a_chat_that_it_cannot_go_on_with_is_refused_with_its_reason(ask):
    with pytest.raises(ApiError, match="continue_final_message") as refused:
        ask(True, pricing=PRICE)
    assert refused.value.status == 422
