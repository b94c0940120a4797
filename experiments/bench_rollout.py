"""Generation speed on a Qwen2 of 32.5M parameters; one JSON line a case.

    python -m experiments.bench_rollout [--case=NAME] [--repeats=3]

    W         4 prompts x 8 samples, 64 prompt tokens, 128 new ones, against transformers `generate`
    R         the same with 512 prompt tokens
    ragged    31 answers of 32 tokens and one of 128, against what as many tokens cost in W
    grammar   W held to the chain's grammar, against W without
    growth    W at once, twice and four times the batch, the length and the depth

Fields: ours and peer in new tokens a second (medians), their ratio, and limit: what the machine allows,
each step reading every weight once and multiplying it with 32 rows at the rates measured in the same
run. `ragged` gives seconds and `grammar` CPU seconds, which other load on the machine does not change,
with the ratio to stay below as target. Ours and the peer have the same weights and prompts, sample at
temperature 1 and never end early; they run in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from gtalign_jax.chain.grammar import chain_grammar
from gtalign_jax.data.tokenizer import protocol_strings
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.models import hf
from gtalign_jax.models.config import ModelConfig, read_config
from gtalign_jax.models.transformer import init_params
from gtalign_jax.rollout import compaction, programs
from gtalign_jax.rollout.decode import Ending
from gtalign_jax.rollout.grammar import Constraint, compile_constraint
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.types import PromptBatch, PyTree, Rollout

PROMPTS, GROUP, NEW = 4, 8, 128
VOCAB = 16384
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "eos_token_id": None,
    "bos_token_id": None,
}
SAMPLING = SamplingConfig()
NEVER = Ending(np.array([-1], np.int32))


@functools.cache
def models() -> tuple[ModelConfig, PyTree, transformers.Qwen2ForCausalLM]:
    """Our configuration and parameters, and the peer's model, of the same random weights."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = read_config(pathlib.Path(folder))
        return config, hf.load_params(pathlib.Path(folder), config), model


def make_batch(slots: int, prompts: int = PROMPTS) -> PromptBatch:
    """Full prompts of random tokens."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (prompts, slots)).astype(np.int32)
    length = np.full(prompts, slots, np.int32)
    return PromptBatch(tokens, length, np.arange(prompts, dtype=np.int32))


def generate(
    config: ModelConfig,
    params: PyTree,
    batch: PromptBatch,
    *,
    new: int = NEW,
    ending: Ending = NEVER,
    constraint: Constraint | None = None,
) -> Rollout:
    """Ours, as the engine runs it in one program."""
    row = np.arange(len(batch.length), dtype=np.int32)
    return jax.block_until_ready(
        programs.generate(
            params,
            config,
            batch,
            jax.random.key(0),
            SAMPLING,
            group_size=GROUP,
            max_new_tokens=new,
            ending=ending,
            row=row,
            until=np.int32(new),
            constraint=constraint,
        )
    )


def peer_generate(model: transformers.Qwen2ForCausalLM, batch: PromptBatch) -> torch.Tensor:
    """transformers: the samples of a prompt are rows of one batch with a shared setting and no end token."""
    tokens = torch.from_numpy(batch.tokens.astype(np.int64))
    with torch.no_grad():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=GROUP,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            pad_token_id=0,
        )
    if out.shape != (len(tokens) * GROUP, tokens.shape[1] + NEW):
        raise RuntimeError(f"the peer wrote {tuple(out.shape)}, not {NEW} tokens a row")
    return out


def median_seconds(repeats: int, *runs: Callable[[], object], clock=time.perf_counter) -> list[float]:
    """Median time of each run over `repeats` rounds after one to warm up; runs of a round alternate."""
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(repeats + 1):
        for taken, run in zip(seconds, runs, strict=True):
            start = clock()
            run()
            if number:
                taken.append(clock() - start)
    return [statistics.median(taken) for taken in seconds]


@functools.cache
def machine() -> tuple[float, float]:
    """(float32 matmul rate in FLOP/s, memory read rate in bytes/s), the best of five."""
    a, big = jnp.ones((1536, 1536)), jnp.ones(2**26)
    multiply, read = jax.jit(jnp.matmul), jax.jit(jnp.sum)
    times = {}
    for name, run in (("multiply", lambda: multiply(a, a)), ("read", lambda: read(big))):
        jax.block_until_ready(run())
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(run())
            taken.append(time.perf_counter() - start)
        times[name] = min(taken)
    return 2 * a.size * a.shape[0] / times["multiply"], big.nbytes / times["read"]


def limit(params: PyTree, rows: int) -> float:
    """Tokens a second when a step costs its weights' reading or multiplying only, whichever is longer."""
    matmul, memory = machine()
    count = sum(x.size for x in jax.tree.leaves(params))
    return rows / max(2 * count * rows / matmul, 4 * count / memory)


# The cases. -------------------------------------------------------------------------------------------


def against_peer(name: str, slots: int, repeats: int) -> dict[str, object]:
    config, params, model = models()
    batch = make_batch(slots)
    ours, peer = median_seconds(
        repeats, lambda: generate(config, params, batch), lambda: peer_generate(model, batch)
    )
    tokens = PROMPTS * GROUP * NEW
    return {
        "case": name,
        "ours": round(tokens / ours, 1),
        "peer": round(tokens / peer, 1),
        "ratio": round(peer / ours, 2),
        "limit": round(limit(params, PROMPTS * GROUP), 1),
        "target": 2.5 if name == "W" else None,
    }


def ragged(repeats: int, short: int = 32) -> dict[str, object]:
    """One row runs on alone: the others end at a token of theirs that it never writes."""
    config, params, _ = models()
    batch = make_batch(64)
    free = np.asarray(generate(config, params, batch).completion).reshape(-1, NEW)
    ends = np.setdiff1d(free[1:, short - 1], free[0]).astype(np.int32)
    ending = Ending(np.resize(ends, PROMPTS * GROUP).astype(np.int32))
    row, rows = np.arange(PROMPTS, dtype=np.int32), PROMPTS * GROUP
    shape = {"group_size": GROUP, "max_new_tokens": NEW, "ending": ending}

    def compacted() -> Rollout:
        state = programs.start(params, config, batch, jax.random.key(0), SAMPLING, row=row, **shape)
        sizes = compaction.batch_sizes(rows, 1)
        return compaction.finish(
            params, config, state, SAMPLING, ending=ending, until=NEW, every=8, sizes=sizes
        )

    written = int(np.sum(compacted().length))
    ours, plain = median_seconds(repeats, compacted, lambda: generate(config, params, batch))
    proportional = plain * written / (rows * NEW)
    return {
        "case": "ragged",
        "tokens": written,
        "ours": round(ours, 3),
        "peer": round(proportional, 3),
        "ratio": round(ours / proportional, 2),
        "target": 1.3,
    }


def grammar(repeats: int) -> dict[str, object]:
    """The vocabulary: bytes, the protocol's strings, and pieces of this repository's text."""
    config, params, _ = models()
    start = time.perf_counter()
    constraint = compile_constraint(chain_grammar(), vocabulary(), [VOCAB - 1], budget=NEW)
    compiled = time.perf_counter() - start
    constraint, batch = jax.device_put(constraint), make_batch(64)
    held, free = median_seconds(
        repeats,
        lambda: generate(config, params, batch, constraint=constraint),
        lambda: generate(config, params, batch),
        clock=time.process_time,
    )
    return {
        "case": "grammar",
        "ours": round(held, 3),
        "peer": round(free, 3),
        "ratio": round(held / free, 3),
        "target": 1.05,
        "compile_s": round(compiled, 2),
        "tables": list(constraint.step.shape),
    }


def vocabulary() -> list[bytes | None]:
    """The bytes of VOCAB tokens, the last one the end token."""
    text = b"".join(path.read_bytes() for path in sorted(pathlib.Path(__file__).parent.glob("*.py")))
    known = dict.fromkeys([bytes([b]) for b in range(256)] + [s.encode() for s in protocol_strings()])
    rng = np.random.default_rng(0)
    while len(known) < VOCAB - 1:
        at, size = rng.integers(len(text)), rng.integers(2, 9)
        known.setdefault(text[at : at + size])
    return [*known, None]


def growth(name: str, factor: int, repeats: int) -> dict[str, object]:
    config, _, _ = models()
    if name == "depth":
        config = dataclasses.replace(config, num_layers=config.num_layers * factor, source=None)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    batch = make_batch(64, PROMPTS * (factor if name == "batch" else 1))
    new = NEW * (factor if name == "length" else 1)
    (seconds,) = median_seconds(repeats, lambda: generate(config, params, batch, new=new))
    rows = len(batch.length) * GROUP
    line = {"case": "growth", "grown": name, "factor": factor, "ours": round(rows * new / seconds, 1)}
    return {**line, "seconds": round(seconds, 3), "limit": round(limit(params, rows), 1)}


def cases(repeats: int) -> dict[str, Sequence[Callable[[], dict[str, object]]]]:
    """Name -> what to measure, in the order of the docstring."""
    sizes = [("batch", 1), *((name, factor) for name in ("batch", "length", "depth") for factor in (2, 4))]
    return {
        "W": [lambda: against_peer("W", 64, repeats)],
        "R": [lambda: against_peer("R", 512, repeats)],
        "ragged": [lambda: ragged(repeats)],
        "grammar": [lambda: grammar(repeats)],
        "growth": [functools.partial(growth, name, factor, repeats) for name, factor in sizes],
    }


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", default="", help="one case; all of them without it")
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args(argv)
    known = cases(flags.repeats)
    if flags.repeats < 1:
        raise UserError(f"--repeats={flags.repeats}: must be at least 1")
    if flags.case and flags.case not in known:
        raise UserError(f"--case={flags.case}: must be one of {', '.join(known)}")
    print(f"{jax.devices()[0].device_kind}, {torch.get_num_threads()} torch threads", file=sys.stderr)
    for name in [flags.case] if flags.case else known:
        for measure in known[name]:
            print(json.dumps(measure()), flush=True)


if __name__ == "__main__":
    main()
