"""Servers under load; one JSON line a case and peer.

    python -m experiments.bench_serve [--case=NAME] [--repeats=3] [--peers=build/peers] [--vllm=.venv-vllm]

    W         16 requests at once, 64 prompt tokens, 128 new ones, against `transformers serve`, as it starts
              and with its continuous batching, and vLLM where `make vllm` made its environment
              (`--peers=` and `--vllm=` empty: without)
    steered   answers that are steered against the same answers without, 16 at once and one alone, with the
              analysis written by the model and by the solver
    crowd     500 connections at once, of which 256 may be in work
    memory    10,000 requests, 16 at a time; on the tiny shape

Every contender is a server in a process of its own, with the same weights and prompts, and is asked for
streams by one client. Fields of W: ours and peer in new tokens a second (medians), their ratio, and over the
requests of the last rounds the p50 and p95 of the milliseconds to the first text (`ours_first_ms`,
`peer_first_ms`) and for each token after it (`..._token_ms`). `steered` gives seconds, with the ratio to stay
below as target. `crowd` counts how connections ended; `memory` gives the server's bytes on the way; `held` is
what the server still held when all was answered.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import bench_common as common
from experiments import bench_texts as texts
from experiments.bench_common import Line
from experiments.peers import launch, servers
from experiments.peers.load import Answer, load
from experiments.peers.servers import Server
from gtalign_jax.errors import exit_on_user_error

AT_ONCE = 16
TARGETS = {"transformers serve": 5.0, "transformers serve, continuous": 5.0}
STEERED = 1.15
CROWD, IN_WORK = 500, 256
REQUESTS, LOOKS = 10_000, 4


@dataclasses.dataclass
class Load:
    """A contender: one round asks a server for all of the bodies at once.

    answers: of every round. tokens: that a round should write; RuntimeError where it writes clearly fewer.
    """

    server: Server
    bodies: Sequence[Mapping[str, Any]]
    tokens: int = 0
    answers: list[Answer] = dataclasses.field(default_factory=list)

    def __call__(self) -> None:
        found = load(self.server.port, self.bodies, len(self.bodies))
        if bad := [answer for answer in found if answer.status != 200 or not answer.whole]:
            raise RuntimeError(f"{len(bad)} of {len(found)} requests failed, with status {bad[0].status}")
        written = sum(answer.tokens for answer in found)
        if written < 0.9 * self.tokens:
            raise RuntimeError(f"{written} tokens were written in a round, not {self.tokens}")
        self.answers += found


def at_quantiles(values: Sequence[float | None]) -> list[float]:
    """p50 and p95 in milliseconds."""
    known = [value for value in values if value is not None]
    return [round(1e3 * float(q), 1) for q in np.quantile(known, (0.5, 0.95))] if known else []


# --- cases --------------------------------------------------------------------------------------------


def against_peers(flags: argparse.Namespace) -> list[Line]:
    """Each peer beside ours in a run of its own, so that no more than two servers hold memory."""
    size = common.workload("W", flags.shape)
    folder, tokenizer = texts.weights_folder(flags.shape, flags.dtype)
    prompts = texts.prompts(tokenizer, AT_ONCE, size.slots)
    peers: dict[str, Callable[[], contextlib.AbstractContextManager[Server]]] = {}
    if flags.peers:
        start = functools.partial(servers.transformers_serve, folder, flags.peers)
        peers["transformers serve"] = start
        peers["transformers serve, continuous"] = functools.partial(start, "--continuous-batching")
    if python := servers.vllm_python(flags.vllm):
        peers["vLLM"] = functools.partial(servers.vllm, folder, python, 2 * (size.slots + size.new))

    def body(model: str, prompt: str) -> dict[str, Any]:
        return {"model": model, "prompt": prompt, "max_tokens": size.new, "temperature": 1.0}

    lines, tokens = [], AT_ONCE * size.new
    for name in peers or ("",):
        model = str(folder) if name.startswith("transformers") else "bench"
        with contextlib.ExitStack() as stack:
            mine = stack.enter_context(ours(flags, folder, size.slots, size.new))
            runs = {"ours": Load(mine, [body("bench", prompt) for prompt in prompts], tokens)}
            if name:
                other = stack.enter_context(peers[name]())
                runs["peer"] = Load(other, [body(model, prompt) for prompt in prompts], tokens)
            seconds = common.time_rounds(flags.repeats, {who: _made(run) for who, run in runs.items()})
        line: Line = {"case": "W", "unit": "new tokens/s", "peer_name": name or None}
        line |= common.compare(seconds["ours"], seconds.get("peer"), tokens)
        for who, run in runs.items():
            answers = run.answers[-flags.repeats * AT_ONCE :]  # without those that warmed up
            line[f"{who}_first_ms"] = at_quantiles([answer.first_s for answer in answers])
            line[f"{who}_token_ms"] = at_quantiles([answer.token_s for answer in answers])
        lines.append({**line, "target": TARGETS.get(name)})
    return lines


def _made(run: Load) -> Callable[[], Load]:
    return lambda: run


def ours(
    flags: argparse.Namespace, folder: pathlib.Path, prompt: int, new: int, *more: str
) -> contextlib.AbstractContextManager[Server]:
    """Our server with room for such requests, and for a steered one's prefix."""
    room = [f"--max_prompt_tokens={2 * (prompt + new)}", f"--max_new_tokens={2 * new}"]
    return servers.ours(folder, *room, f"--rows={AT_ONCE}", f"--compute_dtype={flags.dtype}", *more)


def steered(flags: argparse.Namespace) -> list[Line]:
    """The model knows a chain by heart and its matrix is spliced as it was, so all answers are the same."""
    size = common.workload("W", flags.shape)
    folder, prompt, written = texts.taught_folder(flags.shape, flags.dtype, size.slots)
    asked = {"model": "bench", "prompt": prompt, "temperature": 0.0}
    lines = []
    with ours(flags, folder, size.slots, written) as server:
        for analyze, count in itertools.product(("model", "solver"), (AT_ONCE, 1)):
            priced = {**asked, "pricing": {"policy": "none", "price": 0}, "analyze": analyze}
            runs = {"ours": Load(server, [priced] * count), "peer": Load(server, [asked] * count)}
            seconds = common.time_rounds(flags.repeats, {who: _made(run) for who, run in runs.items()})
            said = {answer.text for run in runs.values() for answer in run.answers}
            done = [answer.choice.get("steering", {}).get("steered") for answer in runs["ours"].answers]
            if said != {texts.chain()} or not all(done):
                raise RuntimeError(f"an answer is not the chain, steered: {sorted(said)}")
            line: Line = {"case": "steered", "variant": f"{count} at once, analysis by the {analyze}"}
            line |= {"unit": "s", "peer_name": "without a price"}
            line |= common.lower_is_better(seconds["ours"], seconds["peer"])
            lines.append({**line, "tokens": count * written, "target": STEERED})
    return lines


def crowd(flags: argparse.Namespace) -> list[Line]:
    """Connections that all come at once end as answered or as 429, and the server holds nothing after."""
    size = common.workload("W", flags.shape)
    folder, tokenizer = texts.weights_folder(flags.shape, flags.dtype)
    prompts = texts.prompts(tokenizer, AT_ONCE, size.slots)
    bodies = [{"prompt": prompts[i % AT_ONCE], "max_tokens": 16} for i in range(CROWD)]
    with ours(flags, folder, size.slots, size.new, f"--max_requests={IN_WORK}") as server:
        begun = time.perf_counter()
        answers = load(server.port, bodies, CROWD, wait_s=120.0)
        seconds = time.perf_counter() - begun
        answered = sum(answer.status == 200 and answer.whole for answer in answers)
        refused = sum(answer.status == 429 for answer in answers)
        hung = sum(answer.status == -1 for answer in answers)
        line: Line = {"case": "crowd", "unit": "connections", "ours": CROWD, "answered": answered}
        line |= {"refused": refused, "hung": hung, "other": CROWD - answered - refused - hung}
        line["held"] = held(server)
    return [{**line, "seconds": {"ours": [round(seconds, 3)]}}]


def memory(flags: argparse.Namespace) -> list[Line]:
    """The server's bytes after each quarter of the requests; the ratio is of the end and the middle."""
    size = common.workload("W", "tiny")
    folder, tokenizer = texts.weights_folder("tiny", flags.dtype)
    prompts = texts.prompts(tokenizer, AT_ONCE, size.slots)
    part = REQUESTS // LOOKS
    bodies = [{"prompt": prompts[i % AT_ONCE], "max_tokens": size.new} for i in range(part)]
    seen = list[int]()
    with ours(flags, folder, size.slots, size.new) as server:
        begun = time.perf_counter()
        for _ in range(LOOKS):
            answers = load(server.port, bodies, AT_ONCE)
            if any(answer.status != 200 or not answer.whole for answer in answers):
                raise RuntimeError("a request failed")
            seen.append(server.memory())
        seconds, left = time.perf_counter() - begun, held(server)
    line: Line = {"case": "memory", "variant": f"{REQUESTS:,} requests", "unit": "bytes, s"}
    line |= {"ours": seen[-1], "peer_name": "after half of them", "peer": seen[LOOKS // 2 - 1]}
    line |= {"ratio": round(seen[-1] / seen[LOOKS // 2 - 1], 4), "target": 1.01, "bytes": seen, "held": left}
    line["shape"] = "tiny"
    return [{**line, "seconds": {"ours": [round(seconds, 3)]}}]


def held(server: Server) -> int:
    """Requests in work and rows that wait or sit, a moment after the last answer."""
    names = ("requests_in_work", "rows_waiting", "rows_seated")
    for _ in range(100):
        text = server.get("/metrics") or ""
        found = [re.search(rf"^gtalign_{name} (\S+)$", text, re.M) for name in names]
        count = sum(math.inf if match is None else float(match[1]) for match in found)
        if not count:
            break
        time.sleep(0.05)
    return int(count)


def cases(flags: argparse.Namespace) -> dict[str, Sequence[Callable[[], list[Line]]]]:
    """Name -> what to measure, in the order of the docstring."""
    measures = {"W": against_peers, "steered": steered, "crowd": crowd, "memory": memory}
    return {name: [functools.partial(measure, flags)] for name, measure in measures.items()}


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    common.add_flags(parser)
    parser.add_argument(
        "--peers", default=launch.DEFAULT, help="folder of the peers' environments; empty: none"
    )
    parser.add_argument("--vllm", default=servers.VLLM, help="vLLM's environment; empty: without")
    argv = sys.argv[1:] if argv is None else argv
    flags = parser.parse_args(argv)
    common.restart_tuned("experiments.bench_serve", argv, flags)
    common.run_cases("serve", flags, cases(flags))


if __name__ == "__main__":
    main()
