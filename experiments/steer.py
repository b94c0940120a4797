"""Steer a trained model by editing its payoff matrix:

    python -m experiments.steer --model=runs/quickstart/hf --policy=per_token --price=6 \
        --prompt="Eva has 5 books and finds 5. How many books has Eva now?"

Prints the matrix the model wrote and the edited one, the action chosen from each, and both answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import jax

from experiments.flag_checks import check_finite, check_seed, utf8_text
from gtalign_jax.chain.prompt import INSTRUCTION, SHORT_INSTRUCTION
from gtalign_jax.errors import UserError, exit_on_user_error, naming
from gtalign_jax.game.moves import GTALIGN, KEYS
from gtalign_jax.game.pricing import POLICIES
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.engine import make_constraint
from gtalign_jax.rollout.folder import EngineOptions, load_engine
from gtalign_jax.rollout.grammar import read_limits
from gtalign_jax.rollout.sampling import GREEDY, SamplingConfig
from gtalign_jax.serving.examples import branch_fields, price_edit
from gtalign_jax.serving.steer import Steered, steer

SYSTEM = {"short": SHORT_INSTRUCTION, "full": INSTRUCTION}


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--prompt", required=True, help="what the user asks")
    parser.add_argument("--policy", default="per_token", choices=sorted(POLICIES))
    parser.add_argument("--price", type=float, default=6.0, help="price of the text of a direct answer")
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
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    if flags.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens={flags.max_new_tokens}: must be at least 1")
    check_seed(flags.seed)
    check_finite(flags, "price")
    flags.prompt, flags.system = utf8_text(flags.prompt, "--prompt"), utf8_text(flags.system, "--system")
    with naming("--"):
        sampling = GREEDY if flags.temperature == 0 else SamplingConfig(temperature=flags.temperature)
    buckets = BucketConfig(completion=(flags.max_new_tokens,), batch=(1,))
    engine, params = load_engine(flags.model, EngineOptions(sampling=sampling, buckets=buckets))
    constraint = None if flags.grammar is None else make_constraint(engine, read_limits(flags.grammar))
    messages = [
        {"role": "system", "content": SYSTEM.get(flags.system, flags.system)},
        {"role": "user", "content": flags.prompt},
    ]
    steered = steer(
        engine,
        params,
        messages,
        price_edit(flags.policy, flags.price),
        jax.random.key(flags.seed),
        max_new_tokens=flags.max_new_tokens,
        constraint=constraint,
    )
    if flags.json:
        print(json.dumps(as_json(steered, flags), ensure_ascii=False))
    else:
        print(as_text(steered, flags))


def as_json(steered: Steered, flags: argparse.Namespace) -> dict[str, Any]:
    """The line of a run's steering.jsonl, with the tokens of the edited branch."""

    return {
        "prompt": flags.prompt,
        "policy": flags.policy,
        "price": flags.price,
        "before": branch_fields(steered.original),
        "after": branch_fields(steered.edited),
        "kept_tokens": steered.kept,
        "prefix_tokens": len(steered.prefix),
    }


def as_text(steered: Steered, flags: argparse.Namespace) -> str:
    """Both matrices side by side, then what each branch went on to write."""
    before, after = steered.original, steered.edited
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
