"""Generate completions: python -m experiments.generate --model=DIR --prompts=P.jsonl --out=O.jsonl

A prompt line holds `prompt` (text), `messages` (chat, through the model's template) or `token_ids`, and
optionally `id`. Each output line holds id, sample, text, token_ids, finished and, on request, logprobs.
With --server=URL an inference server (vLLM, SGLang, ...) writes them; of --model only the tokenizer and the
configs are read then. A sample that did not come back has no tokens.
A generation that is stopped or killed leaves its finished batches beside O.jsonl, as
.O.jsonl.NAME.incomplete; the same command with --resume=.O.jsonl.NAME.incomplete goes on after them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator

import jax

from experiments.flag_checks import check_seed, utf8_text
from gtalign_jax import jsonl
from gtalign_jax.errors import UserError, exit_on_user_error, naming
from gtalign_jax.files import drafts, paths
from gtalign_jax.models import hf
from gtalign_jax.models.config import RuntimeConfig
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import external, generate, lines, servers
from gtalign_jax.rollout.backends import KINDS
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.folder import EngineOptions, folder_engine, load_engine
from gtalign_jax.rollout.generator import Write
from gtalign_jax.rollout.grammar import read_limits
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.run import progress
from gtalign_jax.types import PyTree

# A queue ends on its longest answers, which are then gathered into smaller batches.
COMPACT_EVERY = 16


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--prompts", required=True, help="JSON lines to read")
    parser.add_argument("--out", required=True, help="JSON lines to write")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--min_p", type=float, default=0.0)
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--n", type=int, default=1, help="completions of each prompt")
    parser.add_argument("--stop", action="append", default=[], help="stop string, may be repeated")
    parser.add_argument(
        "--grammar",
        nargs="?",
        const="",
        metavar="LIMITS",
        help="write only valid chains; LIMITS: tokens a block may take, such as thinking=60,response=200",
    )
    parser.add_argument("--logprobs", action="store_true", help="write the log-probability of each token")
    parser.add_argument("--batch_size", type=int, default=32, help="prompts computed together")
    parser.add_argument("--rows", type=int, default=0, help="completions decoded at a time, the rest wait")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", default="", help="lines of a generation that was stopped, to go on after")
    parser.add_argument("--compute_dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--server", action="append", default=[], help="URL that writes, may be repeated")
    parser.add_argument("--kind", default="vllm", choices=KINDS, help="the protocol of --server")
    parser.add_argument("--served_model", default="", help="its name there (default: --model)")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    for name in ("max_new_tokens", "n", "batch_size"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)}: must be at least 1")
    if flags.rows < 0:
        raise UserError(f"--rows={flags.rows}: must be 0 (all at once) or positive")
    check_seed(flags.seed)
    flags.stop = [utf8_text(stop, "--stop") for stop in flags.stop]
    if not all(flags.stop):
        raise UserError("--stop=: must not be empty; leave it out to stop at end tokens alone")
    with naming("--"):
        sampling = SamplingConfig(
            repetition_penalty=flags.repetition_penalty,
            temperature=flags.temperature,
            top_k=flags.top_k,
            top_p=flags.top_p,
            min_p=flags.min_p,
        )
    prompts = lines.read_lines(flags.prompts)
    kept = taken_up(flags.resume, prompts, flags.n) if flags.resume else []
    drafts.check(flags.out, "--out", flags.prompts, *([flags.resume] if flags.resume else []))
    with progress.stage("load the model"):
        engine, params, write = open_engine(flags, sampling)
    written = complete(engine, params, prompts, flags, write, begin=len(kept) // flags.n)
    jsonl.write(flags.out, itertools.chain(kept, written), keep=True)


def taken_up(path: str, prompts: list[dict], n: int) -> list[dict]:
    """The lines of whole prompts that a generation left when it was stopped, in the order of these prompts.

    UserError where they are not of these prompts, or not n a prompt.
    """
    if not paths.path(path).is_file():
        raise UserError(f"--resume={path}: not found; it stands beside --out, as .OUT.*.incomplete")
    left = jsonl.read(path)
    for number, line in enumerate(left):
        p, sample = divmod(number, n)
        due = (prompts[p].get("id", p), sample) if p < len(prompts) else None
        if (line.get("id"), line.get("sample")) != due:
            raise UserError(f"--resume={path}: line {number + 1} is not of these prompts with --n={n}")
    return left[: len(left) // n * n]


def open_engine(flags: argparse.Namespace, sampling: SamplingConfig) -> tuple[Engine, PyTree, Write]:
    """(engine, parameters, rollout function): our own, or a server's, which needs no parameters here."""
    buckets = BucketConfig(completion=(flags.max_new_tokens,), batch=(flags.batch_size,))
    if not flags.server:
        options = EngineOptions(
            sampling=sampling,
            buckets=buckets,
            compact_every=COMPACT_EVERY if flags.rows else 0,
            rows=flags.rows,
            runtime=RuntimeConfig(compute_dtype=flags.compute_dtype),
        )
        return *load_engine(flags.model, options), generate.rollout
    options = EngineOptions(sampling=sampling, buckets=buckets)
    engine = folder_engine(hf.resolve_folder(flags.model), options)
    name = flags.served_model or flags.model
    with naming("--server: "):
        config = servers.ServerConfig(kind=flags.kind, endpoints=tuple(flags.server), model=name)
    return engine, None, functools.partial(external.rollout, servers.connect(config))


def complete(
    engine: Engine,
    params: PyTree,
    prompts: list[dict],
    flags: argparse.Namespace,
    write: Write,
    begin: int = 0,
) -> Iterator[dict]:
    """Output lines in input order from prompt `begin` on, batch by batch; what a prompt draws does not depend
    on its batch."""
    encoded = [lines.prompt_ids(engine, line, flags.prompts) for line in prompts]
    for line, ids in zip(prompts, encoded, strict=True):
        lines.check_fits(engine, ids, f"{flags.prompts}:{line['line']}")
    ending = engine_lib.make_ending(engine, flags.stop)
    constraint = None
    if flags.grammar is not None:
        constraint = engine_lib.make_constraint(engine, read_limits(flags.grammar))
    key = jax.random.key(flags.seed)
    for first in range(begin, len(prompts), flags.batch_size):
        part = slice(first, first + flags.batch_size)
        batch = engine_lib.prompt_batch(engine, encoded[part])
        request = Request(
            prompts=batch,
            key=key,
            group_size=flags.n,
            max_new_tokens=flags.max_new_tokens,
            ending=ending,
            constraint=constraint,
            first_row=first,
            stops=tuple(flags.stop),
        )
        completions = jax.device_get(write(engine, params, request)).completions
        written, texts = engine_lib.completion_ids(completions), engine_lib.texts(engine, completions)
        for row, (p, g) in enumerate(itertools.product(range(len(encoded[part])), range(flags.n))):
            line = {
                "id": prompts[first + p].get("id", first + p),
                "sample": g,
                "text": texts[row],
                "token_ids": written[row].tolist(),
                "finished": bool(completions.finished[p, g]),
            }
            if flags.logprobs:
                line["logprobs"] = completions.logp[p, g, : len(written[row])].tolist()
            yield line
        print(f"{first + len(encoded[part])}/{len(prompts)} prompts", file=sys.stderr)


if __name__ == "__main__":
    main()
