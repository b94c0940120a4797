"""Flags that several commands share, and their checks; each UserError names the flag and the mend."""

from __future__ import annotations

import argparse
import math

from gtalign_jax.errors import UserError, naming
from gtalign_jax.game.pricing import STEP, check_step


def add_pricing_flags(parser: argparse.ArgumentParser) -> None:
    """What a price is for, and how finely it is put on a matrix."""
    parser.add_argument(
        "--amounts",
        help="what DA, CQ and AQ write: three numbers, or a rollout file, whose prices are then for 1000 "
        "tokens (default: 1,0.25,1.25, in direct answers)",
    )
    parser.add_argument(
        "--tokens_per_s", type=float, default=50.0, help="of --amounts, for the latency policy"
    )
    parser.add_argument(
        "--step",
        type=float,
        default=STEP,
        help="what edited payoffs are rounded to: as finely as the model was taught to read, 0.5 by the "
        "quickstart (default: %(default)s)",
    )


def check_pricing_flags(flags: argparse.Namespace) -> None:
    """The step is one that matrices are written in."""
    with naming("--"):
        check_step(flags.step)


def check_finite(flags: argparse.Namespace, *names: str) -> None:
    """These numbers are neither NaN nor infinite."""
    for name in names:
        if not math.isfinite(getattr(flags, name)):
            raise UserError(f"--{name}={getattr(flags, name)}: must be a finite number")


def check_seed(seed: int) -> None:
    """A seed is what a random key holds; beyond, two seeds would draw the same."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed={seed}: must be from 0 to {2**32 - 1}")


def utf8_text(text: str, flag: str) -> str:
    """A flag's text, read as UTF-8 in any locale; UserError when it is none."""
    try:
        return text.encode("utf-8", errors="surrogateescape").decode()
    except ValueError as error:
        raise UserError(f"{flag}: the text is not UTF-8; write it in a UTF-8 terminal") from error
