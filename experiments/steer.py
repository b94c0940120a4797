"""Steer a trained model by editing its payoff matrix:

    python -m experiments.steer --model=runs/quickstart/hf --policy=per_token --price=6 \
        --prompt="Eva has 5 books and finds 5. How many books has Eva now?"

Prints the matrix the model wrote and the edited one, the action chosen from each, and both answers.
A data set at several prices, with a table and a figure of what each price does:

    python -m experiments.steer --model=runs/quickstart/hf --policy=per_token \
        --prompts=P.jsonl --prices=0,1,2,4,8,below,above --out=O.jsonl

`below` and `above` are just beside the price at which the recommendation of each prompt's own matrix flips.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from experiments.flag_checks import (
    add_pricing_flags,
    check_finite,
    check_pricing_flags,
    check_seed,
    utf8_text,
)
from gtalign_jax import jsonl
from gtalign_jax.chain.prompt import INSTRUCTION, SHORT_INSTRUCTION
from gtalign_jax.errors import UserError, exit_on_user_error, naming
from gtalign_jax.evaluation.steering import format_curve, save_curve, steering_curve
from gtalign_jax.files import drafts, paths
from gtalign_jax.game.moves import GTALIGN, KEYS
from gtalign_jax.game.pricing import POLICIES
from gtalign_jax.rollout import lines
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.engine import Messages, encode, make_constraint
from gtalign_jax.rollout.folder import EngineOptions, load_engine
from gtalign_jax.rollout.grammar import read_limits
from gtalign_jax.rollout.sampling import GREEDY, SamplingConfig
from gtalign_jax.run.progress import batches
from gtalign_jax.serving import sweep
from gtalign_jax.serving.examples import branch_fields
from gtalign_jax.serving.solution import solution
from gtalign_jax.serving.splice import AGAIN, ANALYZE, ERROR, GRAMMAR, MODEL, UNSTEERED, UNUSABLE
from gtalign_jax.serving.steer import Options, Steered, steer, stop_ending
from gtalign_jax.serving.sweep import Pricing

SYSTEM = {"short": SHORT_INSTRUCTION, "full": INSTRUCTION}


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--prompt", help="what the user asks")
    parser.add_argument(
        "--prompts",
        help="JSON lines with prompt (text) or messages, and optionally id; or a run's rollout file",
    )
    parser.add_argument("--out", help="JSON lines to write, of --prompts; the figure goes to OUT.svg")
    parser.add_argument("--policy", default="per_token", help=f"{', '.join(POLICIES)}, or module:function")
    parser.add_argument("--price", type=float, default=6.0, help="price of the text of a direct answer")
    parser.add_argument("--prices", default="0,1,2,4,8", help="of --prompts: numbers, below, above")
    add_pricing_flags(parser)
    parser.add_argument("--analyze", default=MODEL, choices=ANALYZE, help="who writes the edited <analyze>")
    parser.add_argument(
        "--unusable", choices=UNUSABLE, help="matrix not readable (default: error, unsteered for --prompts)"
    )
    parser.add_argument(
        "--system",
        default="short",
        help=f"system message: a text, or one of {', '.join(SYSTEM)} (short is the quickstart's)",
    )
    parser.add_argument(
        "--grammar",
        nargs="?",
        const="",
        metavar="LIMITS",
        help="write only valid chains; LIMITS: tokens a block may take, such as thinking=60,response=200",
    )
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=16, help="prompts steered together")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    _check(flags)
    pricing = Pricing(
        flags.policy,
        sweep.named_policy(flags.policy, "--policy"),
        sweep.read_amounts(flags.amounts, flags.tokens_per_s),
        flags.step,
    )
    with naming("--"):
        sampling = GREEDY if flags.temperature == 0 else SamplingConfig(temperature=flags.temperature)
    if flags.prompts is None:
        _steer_one(flags, pricing, sampling)
    else:
        _steer_all(flags, pricing, sampling)


def _check(flags: argparse.Namespace) -> None:
    if (flags.prompt is None) == (flags.prompts is None):
        raise UserError("give --prompt=TEXT, or --prompts=FILE with --out=FILE")
    if flags.prompts is not None:
        if flags.out is None:
            raise UserError("--prompts needs --out=FILE")
        drafts.check(flags.out, "--out", flags.prompts)
    for name in ("max_new_tokens", "batch_size"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)}: must be at least 1")
    check_seed(flags.seed)
    check_finite(flags, "price", "tokens_per_s")
    check_pricing_flags(flags)
    if flags.tokens_per_s <= 0:
        raise UserError(f"--tokens_per_s={flags.tokens_per_s}: must be positive")
    if flags.unusable == AGAIN and flags.temperature == 0:
        raise UserError("--unusable=again: a greedy second try is the first one; set --temperature")
    flags.system = utf8_text(flags.system, "--system")


def _messages(flags: argparse.Namespace, prompt: str) -> Messages:
    return [
        {"role": "system", "content": SYSTEM.get(flags.system, flags.system)},
        {"role": "user", "content": prompt},
    ]


def _questions(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prompt lines; of a rollout file, whose `input` is what the user asked, each question once."""
    asked: dict[Any, dict[str, Any]] = {}
    for line in given:
        if isinstance(line.get("input"), str) and "output" in line:
            asked.setdefault(line["input"], {**line, "prompt": line["input"]})
        else:
            asked[line["line"]] = line
    return list(asked.values())


def _prompt(flags: argparse.Namespace, line: Mapping[str, Any]) -> tuple[str, Messages]:
    """(where a line stands, its messages as they are, or its text under the system message)."""
    where = f"{flags.prompts}:{line['line']}"
    name, value = lines.prompt_field(line, where, allowed=("prompt", "messages"))
    return where, value if name == "messages" else _messages(flags, value)


def _steer_prompts(
    flags: argparse.Namespace,
    sampling: SamplingConfig,
    batch: int,
    prompts: list[tuple[str, Messages]],
    edits: list[sweep.Edit],
) -> Iterator[Steered]:
    """Every prompt, with where it stands, under every edit, `batch` at a time."""
    buckets = BucketConfig(completion=(flags.max_new_tokens,), batch=(batch,))
    engine, params = load_engine(flags.model, EngineOptions(sampling=sampling, buckets=buckets))
    encoded = [encode(engine, messages) for _, messages in prompts]
    for (where, _), ids in zip(prompts, encoded, strict=True):
        lines.check_fits(engine, ids, where)
    unusable = flags.unusable or (ERROR if flags.prompts is None else UNSTEERED)
    needed = flags.grammar is not None or unusable == GRAMMAR
    constraint = make_constraint(engine, read_limits(flags.grammar or "")) if needed else None
    options = Options(flags.max_new_tokens, flags.analyze, unusable)
    stop, done = stop_ending(engine), 0
    for part in batches(encoded, batch):
        key = jax.random.fold_in(jax.random.key(flags.seed), done) if done else jax.random.key(flags.seed)
        yield from steer(engine, params, part, edits, key, options, stop=stop, constraint=constraint)
        done += len(part)
        if len(prompts) > 1:
            print(f"{done}/{len(prompts)} prompts", file=sys.stderr)


def _steer_one(flags: argparse.Namespace, pricing: Pricing, sampling: SamplingConfig) -> None:
    flags.prompt = utf8_text(flags.prompt, "--prompt")
    edits = [sweep.point_edit(pricing, flags.price)]
    (steered,) = _steer_prompts(flags, sampling, 1, [("--prompt", _messages(flags, flags.prompt))], edits)
    if flags.json:
        print(json.dumps(as_json(steered, flags), ensure_ascii=False))
    else:
        print(as_text(steered, flags))


def _steer_all(flags: argparse.Namespace, pricing: Pricing, sampling: SamplingConfig) -> None:
    points = [sweep.read_point(text.strip(), "--prices") for text in flags.prices.split(",")]
    given = _questions(lines.read_lines(flags.prompts))
    prompts = [_prompt(flags, line) for line in given]
    edits = [sweep.point_edit(pricing, point) for point in points]
    written: list[dict[str, Any]] = []

    def each() -> Iterator[dict[str, Any]]:
        found = _steer_prompts(flags, sampling, flags.batch_size, prompts, edits)
        for number, (line, steered) in enumerate(zip(given, found, strict=True)):
            for fields in sweep.point_lines(steered, pricing, points):
                written.append({"id": line.get("id", number), "policy": pricing.name, **fields})
                yield written[-1]

    jsonl.write(flags.out, each(), keep=True)
    curve = steering_curve(written)
    if flags.json:
        print(json.dumps({str(point): row for point, row in curve.items()}))
    else:
        print(format_curve(curve))
    if any(not isinstance(point, str) for point in points):
        save_curve(curve, paths.path(flags.out).with_suffix(".svg"))


def as_json(steered: Steered, flags: argparse.Namespace) -> dict[str, Any]:
    """The line of a run's steering.jsonl, with both solutions and the tokens of the edited branch."""
    branches = {"before": steered.original, "after": steered.edited[0] if steered.edited else None}
    found: dict[str, Any] = {"prompt": flags.prompt, "policy": flags.policy, "price": flags.price}
    for name, branch in branches.items():
        found[name] = None if branch is None else branch_fields(branch)
        if branch is not None and branch.payoff is not None:
            found[name] |= {"solution": solution(branch.payoff), "seconds": branch.seconds}
    if steered.edited:
        splice = steered.edited[0].splice
        return {**found, "kept_tokens": splice.kept, "prefix_tokens": len(splice.prefix)}
    return {**found, "failure": steered.failure}


def as_text(steered: Steered, flags: argparse.Namespace) -> str:
    """Both matrices side by side, then what each branch went on to write."""
    before = steered.original
    if not steered.edited:
        return f"not steered: {steered.failure}\n{before.text}"
    after = steered.edited[0]
    assert before.payoff is not None and after.payoff is not None
    lines = [f"{'cell':<8}{'as written':>20}{f'{flags.policy} {flags.price:g}':>24}"]
    lines.append(f"{'':<8}{'LLM':>12}{'user':>8}{'LLM':>16}{'user':>8}")
    for key in KEYS:
        cell = GTALIGN.cell(key)
        (a, b), (c, d) = before.payoff[cell], after.payoff[cell]
        lines.append(f"{key:<8}{a:>12.1f}{b:>8.1f}{c:>16.1f}{d:>8.1f}")
    for name, branch in (("as written", before), ("edited", after)):
        rest = branch.text.partition("</payoff>")[2].strip()
        lines.append(f"\n{name}: chose {branch.action or 'no action'}\n{rest}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
