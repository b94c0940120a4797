"""Serve a model under the OpenAI protocol, with a price: python -m experiments.serve --model=DIR

    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "What is 2+2?", "max_tokens": 20}'

docs/serving.md says which fields a request may have, ours among them. SIGTERM and Ctrl-C let what is in work
end. Logs go to stderr, one JSON object a request, without prompts unless --log_prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import ssl
import sys
from collections.abc import Sequence

import openai

from experiments.flag_checks import add_pricing_flags, check_pricing_flags
from gtalign_jax.errors import UserError, exit_on_user_error, naming
from gtalign_jax.files import paths
from gtalign_jax.game.pricing import POLICIES
from gtalign_jax.models.config import RuntimeConfig
from gtalign_jax.remote.client import api_key, check_urls, open_client
from gtalign_jax.rollout import continuous
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.engine import make_constraint
from gtalign_jax.rollout.folder import EngineOptions, load_engine
from gtalign_jax.serving.server.access import Limits, read_keys
from gtalign_jax.serving.server.app import Service, make_app
from gtalign_jax.serving.server.ask import Bounds
from gtalign_jax.serving.server.connections import Patience, allow_files, bind, make_server
from gtalign_jax.serving.server.local import Local
from gtalign_jax.serving.server.parts import Backend
from gtalign_jax.serving.server.upstream import Upstream, find_models
from gtalign_jax.serving.splice import AGAIN, CLOSE, ERROR, GRAMMAR, UNSTEERED, UNUSABLE
from gtalign_jax.serving.sweep import read_amounts

SHORTEST_PROMPT = 64  # slots of the smallest program for prompts


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", help="Hugging Face folder that is served here")
    parser.add_argument("--upstream", help="or a server that writes: its URL, such as http://host:8000/v1")
    parser.add_argument("--upstream_key_env", default="", help="environment variable with the upstream's key")
    parser.add_argument(
        "--name",
        default="",
        help="what clients call the model (default: its folder's name); of --upstream: which of its models "
        "is asked (default: the first that it lists)",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--keys", help="file of API keys, one a line; else GTALIGN_API_KEYS; without any all may ask"
    )
    add_pricing_flags(parser)
    parser.add_argument(
        "--unusable",
        default=UNSTEERED,
        choices=UNUSABLE,
        help="a priced answer's matrix not readable, where the request does not say (grammar: of --model)",
    )
    parser.add_argument("--rows", type=int, default=16, help="answers decoded at a time, the others wait")
    parser.add_argument(
        "--max_prompt_tokens", type=int, default=1024, help="a steered answer's first half counts"
    )
    parser.add_argument("--max_new_tokens", type=int, default=1024)
    parser.add_argument("--compute_dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--max_requests", type=int, default=256, help="in work at a time; the next get 429")
    parser.add_argument("--max_requests_per_key", type=int, default=128)
    parser.add_argument("--max_choices", type=int, default=16, help="answers of one request, prompts × n")
    parser.add_argument("--max_body_bytes", type=int, default=1_000_000)
    parser.add_argument("--request_s", type=float, default=600.0, help="seconds until an answer is given up")
    parser.add_argument(
        "--drain_s", type=float, default=30.0, help="seconds that a stop leaves to what is in work"
    )
    parser.add_argument("--log_prompts", action="store_true", help="log what was asked and answered too")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    check_flags(flags)
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    for name in ("gtalign_jax", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
    amounts = read_amounts(flags.amounts, flags.tokens_per_s)
    unusable = tuple(dict.fromkeys((flags.unusable, UNSTEERED, AGAIN, ERROR)))
    bounds = Bounds(flags.max_new_tokens, flags.max_choices, tuple(POLICIES), amounts, unusable, flags.step)
    keys = read_keys(flags.keys, bounds)
    limits = Limits(
        total=flags.max_requests,
        per_key=flags.max_requests_per_key,
        body_bytes=flags.max_body_bytes,
        request_s=flags.request_s,
    )
    patience = Patience()
    allow_files(patience.connections)
    address = bind(flags.host, flags.port)
    backend = open_backend(flags)
    app = make_app(Service(backend, keys, bounds, limits, flags.log_prompts))
    host, port = address.getsockname()[:2]
    print(f"serving {', '.join(backend.models)} at http://{host}:{port}/v1", file=sys.stderr)
    print(f"a page to try it on: http://{host}:{port}/", file=sys.stderr)
    make_server(app, patience, flags.drain_s).run(sockets=[address])


def check_flags(flags: argparse.Namespace) -> None:
    """UserError for a number that no server can work with."""
    if (flags.model is None) == (flags.upstream is None):
        raise UserError("give --model=DIR, or --upstream=URL")
    if flags.unusable == GRAMMAR and flags.upstream is not None:
        raise UserError("--unusable=grammar: needs --model; an upstream is asked for no grammar of ours")
    whole = (
        "rows",
        "max_prompt_tokens",
        "max_new_tokens",
        "max_requests",
        "max_requests_per_key",
        "max_choices",
    )
    for name in (*whole, "max_body_bytes"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)}: must be at least 1")
    for name in ("request_s", "drain_s", "tokens_per_s"):
        if not 0 < getattr(flags, name) < 1e6:
            raise UserError(f"--{name}={getattr(flags, name)}: must be a number above 0")
    check_pricing_flags(flags)
    if not 0 <= flags.port < 2**16:
        raise UserError(f"--port={flags.port}: must be from 0 (any free one) to {2**16 - 1}")


def open_backend(flags: argparse.Namespace) -> Backend:
    """What writes the answers."""
    return open_model(flags) if flags.upstream is None else open_upstream(flags)


def open_upstream(flags: argparse.Namespace) -> Backend:
    """The server behind this one, asked once for its models."""
    with naming("--"):
        check_urls((flags.upstream,), "upstream", "http://host:8000/v1")
    key = api_key(flags.upstream_key_env, "--upstream_key_env")
    trust, url = ssl.create_default_context(), flags.upstream.rstrip("/").removesuffix("/v1") + "/v1"

    def client(timeout_s: float) -> openai.AsyncOpenAI:
        return open_client(url, key, flags.max_requests * flags.max_choices, timeout_s, trust)

    async def models() -> Sequence[str]:
        async with client(30.0) as asked:
            return await find_models(asked, url)

    names = (flags.name,) if flags.name else asyncio.run(models())
    return Upstream(client(flags.request_s), names)


def open_model(flags: argparse.Namespace) -> Backend:
    """The model on the device, compiled for every request that may come."""
    buckets = BucketConfig(prompt=prompt_buckets(flags.max_prompt_tokens), completion=(flags.max_new_tokens,))
    runtime = RuntimeConfig(compute_dtype=flags.compute_dtype)
    engine, params = load_engine(flags.model, EngineOptions(buckets=buckets, runtime=runtime))
    print("compiling", file=sys.stderr)
    name = flags.name or paths.path(flags.model).resolve().name
    constraint = make_constraint(engine) if flags.unusable == GRAMMAR else None
    return Local(continuous.open_places(engine, params, flags.rows, constraint, (CLOSE,)), name)


def prompt_buckets(longest: int) -> tuple[int, ...]:
    """Powers of four up to the longest prompt: few programs, little padding."""
    sizes, size = [], SHORTEST_PROMPT
    while size < longest:
        sizes.append(size)
        size *= 4
    return (*sizes, longest)


if __name__ == "__main__":
    main()
