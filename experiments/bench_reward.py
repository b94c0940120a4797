"""Throughput of the reward; one JSON line a case.

    python -m experiments.bench_reward [--case=NAME] [--rows=4096] [--full]

    welfare    jitted welfare, feature rows a second on all cores
    math       text to welfare on one core, recorded verdicts, against the plain-Python formulas
    writing    the same with BLEU
    broken     the math case with every chain broken somewhere, failure reports included
    growth     rows a CPU second and resident memory from 1e3 to 1e5 rows (1e6 with --full), in batches
    workers    the writing case over 1, 2, .. worker processes

Fields: rows, ours_per_s, peer_per_s, ratio and target where there is a peer. The peer is `peer_score`
below: the published formulas as a reader of the paper would write them, one completion at a time,
without failure reports. It runs in the same process, in turn with ours; both numbers are the best of
`--repeats` rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import numpy as np

from gtalign_jax.chain.prompt import format_chain
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.game.moves import KEYS
from gtalign_jax.rewards.features import FeatureConfig, extract
from gtalign_jax.rewards.judges.base import JudgeRequest, Verdict
from gtalign_jax.rewards.judges.verdict import read_verdict
from gtalign_jax.rewards.mutual_welfare import REWARDS, RewardConfig
from gtalign_jax.types import Features

GROUP = 8
BATCH = 4096
WORDS = (
    "the a of to and in we you that is this for with as it on be are by an or from at which can user "
    "question answer value number article model payoff both sides gain time cost write clear detail long "
    "short reader topic market music river garden health safe simple, useful, therefore however. Yes. No."
).split()


@dataclasses.dataclass(frozen=True)
class Row:
    """One recorded completion; also the item that `extract` asks about."""

    task: str
    intent: str
    ground_truth: str
    completion: str
    judge_text: str


def make_rows(task: str, count: int, seed: int = 0) -> list[Row]:
    """Groups of GROUP completions of about 310 words, as one training step scores them."""
    rng = np.random.default_rng(seed)

    def say(n: int) -> str:
        return " ".join(rng.choice(WORDS, n))

    rows: list[Row] = []
    while len(rows) < count:
        truth = say(250) if task == "medium" else str(rng.integers(1000))
        verdict = "\\boxed{3}" if task == "medium" else "\\boxed{1}"
        for _ in range(GROUP):
            response = say(200) if task == "medium" else f"{say(198)} \\boxed{{{truth}}}."
            matrix = rng.uniform(-5, 5, (2, 3, 2)).round(1)
            text = format_chain(say(60), matrix, f"{say(20)} choose DQ_AQ", response)
            rows.append(Row(task, str(len(rows)), truth, text, f"{say(30)} {verdict}"))
    return rows[:count]


def break_rows(rows: Sequence[Row]) -> list[Row]:
    """Each chain broken in one of four ways."""
    breaks = (
        ("</payoff>", ""),
        ("<response>", ""),
        ('"user": ', '"user": x'),
        ("<thinking>", "<thinking><payoff>"),
    )
    return [
        dataclasses.replace(row, completion=row.completion.replace(*breaks[i % len(breaks)], 1))
        for i, row in enumerate(rows)
    ]


def score_ours(rows: Sequence[Row], workers: int = 0) -> np.ndarray:
    """Welfare [B] through the product's own path."""

    def judge(requests: Sequence[JudgeRequest]) -> list[Verdict]:
        return [_recorded(rows, request) for request in requests]

    texts = [row.completion for row in rows]
    batch = extract(texts, rows, judge, FeatureConfig(workers=workers))
    return np.asarray(_welfare(batch.features))


def _recorded(rows: Sequence[Row], request: JudgeRequest) -> Verdict:
    return read_verdict(rows[int(request.question)].judge_text, request.task)


@jax.jit
def _welfare(features: Features) -> jax.Array:
    return REWARDS["cobb_douglas"](features, RewardConfig()).welfare


# The peer. ---------------------------------------------------------------------------------------------

_FORMAT = re.compile(
    r"^<thinking>.*?</thinking>\s*<payoff>.*?</payoff>\s*<analyze>.*?</analyze>\s*<response>.*?</response>$",
    re.DOTALL | re.MULTILINE,
)
_QUOTES = {"“": '"', "”": '"', "‘": "'", "’": "'"}


def peer_score(row: Row) -> dict[str, float]:
    """The published fields of one completion by the paper's formulas in plain Python."""
    names = "score answer_reward format_reward user_reward llm_reward utility reward_gap".split()
    text = row.completion
    response, payoff = peer_block(text, "response"), peer_matrix(peer_block(text, "payoff"))
    if response is None or payoff is None:
        return dict.fromkeys(names, 0.0)
    found = re.search(r"\\boxed\{(\d+)\}", row.judge_text)
    verdict = int(found.group(1)) if found else 0
    q_user: float = min(verdict, 1)
    q_llm: float = q_user
    if row.task == "medium":
        q_user, q_llm = peer_bleu(response, row.ground_truth), min(verdict, 4) / 4
    matrix = 0.0
    for cell in payoff.values():
        x, y = cell["user"], cell["LLM"]
        matrix += (x != y) / 12 + (abs(x - y) / max(abs(x), abs(y), 1e-8) > 0.1) / 12
    before = text.split("<response>")[0]
    user = 1e-4 + 0.5 * q_user + 0.2 * peer_band(response, 20, 500) + 0.3 * math.exp(-len(before) / 500)
    form = 1.0 if _FORMAT.match(text) else 0.0
    llm = 1e-4 + 0.2 * form + 0.2 * matrix + 0.4 * q_llm + 0.2 * peer_band(text, 500, 1000)
    welfare = math.sqrt(user * llm)
    fields = (welfare, max(q_user, q_llm), 0.1 * form + 0.15 * matrix, user, llm, welfare, abs(user - llm))
    return dict(zip(names, fields, strict=True))


def peer_block(text: str, name: str) -> str | None:
    found = re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
    return found.group(1).strip() if found else None


def peer_matrix(text: str | None) -> dict | None:
    for curly, straight in _QUOTES.items():
        text = text and text.replace(curly, straight)
    try:
        value = json.loads(text or "")
    except ValueError:
        return None
    if not isinstance(value, dict) or set(value) != set(KEYS):
        return None
    for cell in value.values():
        if not isinstance(cell, dict) or set(cell) != {"LLM", "user"}:
            return None
        if not all(isinstance(number, int | float) for number in cell.values()):
            return None
    return value


def peer_band(text: str, low: float, high: float) -> float:
    count = len(text.split())
    return 1 / (1 + math.exp(-0.005 * (count - low))) / (1 + math.exp(-0.005 * (high - count)))


def peer_bleu(candidate: str, reference: str) -> float:
    """BLEU-4 over characters, which is what the published code computes."""
    logs = 0.0
    for n in range(1, 5):
        ours = Counter(candidate[i : i + n] for i in range(len(candidate) - n + 1))
        theirs = Counter(reference[i : i + n] for i in range(len(reference) - n + 1))
        matched = sum(min(count, theirs[gram]) for gram, count in ours.items())
        logs += math.log(matched / sum(ours.values()) if matched else sys.float_info.min) / 4
    short = len(candidate) <= len(reference)
    return math.exp(logs) * (math.exp(1 - len(reference) / len(candidate)) if short else 1.0)


# The cases. --------------------------------------------------------------------------------------------


def best_seconds(
    repeats: int, *runs: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Shortest time of each run over `repeats` rounds; the runs of a round follow one another."""
    seconds = [math.inf] * len(runs)
    for _ in range(repeats):
        for i, run in enumerate(runs):
            start = clock()
            run()
            seconds[i] = min(seconds[i], clock() - start)
    return seconds


def one_core(name: str, rows: Sequence[Row], target: float | None, repeats: int) -> dict[str, object]:
    """Ours against the peer on one core, in CPU time: other load on the machine does not count."""
    peer_rows = rows[: max(len(rows) // 4, 1)]
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        score_ours(rows)

        def peer_run() -> list:
            return [peer_score(row) for row in peer_rows]

        ours, peer = best_seconds(repeats, lambda: score_ours(rows), peer_run, clock=time.process_time)
        ours, peer = len(rows) / ours, len(peer_rows) / peer
    finally:
        os.sched_setaffinity(0, cores)
    line = {"case": name, "rows": len(rows), "ours_per_s": round(ours), "peer_per_s": round(peer)}
    return {**line, "ratio": round(ours / peer, 2), "target": target}


def welfare_rows(count: int, repeats: int) -> dict[str, object]:
    """The jitted reward alone, on features that already lie on the device."""
    rng = np.random.default_rng(0)

    def uniform(*shape: int) -> np.ndarray:
        return rng.uniform(0, 1, (count, *shape)).astype(np.float32)

    features = jax.device_put(
        Features(
            valid=np.ones(count, bool),
            format_ok=uniform() > 0.1,
            answer_user=uniform(),
            answer_llm=uniform(),
            payoff=10 * uniform(2, 3, 2) - 5,
            payoff_ok=uniform() > 0.1,
            frontier=uniform(),
            reasoning_chars=2000 * uniform(),
            response_words=500 * uniform(),
            total_words=1000 * uniform(),
            source=np.zeros(count, np.int32),
        )
    )

    def run() -> jax.Array:
        return jax.block_until_ready(_welfare(features))

    run()
    rate = count / best_seconds(repeats, run)[0]
    cores = len(os.sched_getaffinity(0))
    line = {"case": "welfare", "rows": count, "ours_per_s": round(rate), "target": 10_000_000}
    return {**line, "cores": cores, "device": jax.devices()[0].device_kind}


def growth(count: int) -> dict[str, object]:
    """Rows streamed in batches, as `experiments.score` does; the same batch, so that memory is ours."""
    rows = make_rows("math", min(BATCH, count))
    score_ours(rows[: count % BATCH or None])
    start, most = time.process_time(), 0.0
    for first in range(0, count, BATCH):
        score_ours(rows[: min(BATCH, count - first)])
        most = max(most, resident_mib())
    seconds = time.process_time() - start
    line = {"case": "growth", "rows": count, "ours_per_s": round(count / seconds)}
    return {**line, "us_per_row": round(1e6 * seconds / count, 1), "rss_mib": round(most)}


def resident_mib() -> float:
    """Memory of this process now, in MiB (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def workers(count: int, processes: int, repeats: int) -> dict[str, object]:
    """Writing with its BLEU in worker processes, against none."""
    rows = make_rows("medium", count)
    score_ours(rows, processes)
    runs = (lambda: score_ours(rows), lambda: score_ours(rows, processes))
    alone, rate = (count / seconds for seconds in best_seconds(repeats, *runs))
    line = {"case": "workers", "rows": count, "workers": processes, "ours_per_s": round(rate)}
    return {**line, "without_per_s": round(alone), "speedup": round(rate / alone, 2), "cores": os.cpu_count()}


def cases(rows: int, repeats: int, full: bool) -> dict[str, list[Callable[[], dict[str, object]]]]:
    """Name → what to measure, in the order of the docstring."""
    one = functools.partial(one_core, repeats=repeats)
    sizes = (10**3, 10**4, 10**5, *((10**6,) if full else ()))
    counts = [n for n in (1, 2, 4, 8, 16) if n <= (os.cpu_count() or 1)]
    return {
        "welfare": [lambda: welfare_rows(2_000_000, max(repeats, 5))],
        "math": [lambda: one("math", make_rows("math", rows), target=2.0)],
        "writing": [lambda: one("writing", make_rows("medium", rows), target=4.0)],
        "broken": [lambda: one("broken", break_rows(make_rows("math", rows)), target=None)],
        "growth": [functools.partial(growth, size) for size in sizes],
        "workers": [functools.partial(workers, rows, n, repeats) for n in counts],
    }


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", default="", help="one case; all of them without it")
    parser.add_argument("--rows", type=int, default=4096, help="completions in the text cases")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="growth up to a million rows")
    flags = parser.parse_args(argv)
    if flags.rows < GROUP or flags.repeats < 1:
        raise UserError(f"--rows={flags.rows} --repeats={flags.repeats}: at least {GROUP} rows and 1 repeat")
    known = cases(flags.rows, flags.repeats, flags.full)
    if flags.case and flags.case not in known:
        raise UserError(f"--case={flags.case}: must be one of {', '.join(known)}")
    for name in [flags.case] if flags.case else known:
        for measure in known[name]:
            print(json.dumps(measure()), flush=True)


if __name__ == "__main__":
    main()
