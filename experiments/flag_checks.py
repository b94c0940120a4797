"""Checks that the flags of several commands share; each UserError names the flag and the mend."""

from __future__ import annotations

import argparse
import math

from gtalign_jax.errors import UserError


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
