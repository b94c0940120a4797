"""Self-play on classic games beside their solutions: does it get there, and does it stay?"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from gtalign_jax.evaluation.bootstrap import bootstrap_means
from gtalign_jax.evaluation.paper.tables import Table
from gtalign_jax.game.classic import bargaining, dilemma, play, signalling

NEAR = 0.1  # of its solution: what a seed has reached
LATE = 0.25  # the last share of the updates, over which movement is measured


class Studied(NamedTuple):
    """A game and a number of its play: read(policy [..., 2, O, A]) [...], which is `solution` in
    subgame-perfect or separating play."""

    name: str
    environment: play.Environment
    read: Callable[[np.ndarray], np.ndarray]
    solution: float


def studied() -> list[Studied]:
    """The three games, by six numbers."""
    pd, pie, work = dilemma.Dilemma(), bargaining.Bargaining(), signalling.Signalling()
    offers = np.arange(pie.parts + 1) / pie.parts

    def kept(policy: np.ndarray) -> np.ndarray:
        return 1.0 - policy[..., 0, 0, : pie.parts + 1] @ offers

    games = (dilemma.environment(pd), bargaining.environment(pie), signalling.environment(work))
    separates = float(signalling.separates(work))
    return [
        Studied("dilemma: first defects", games[0], lambda p: p[..., 0, 0, dilemma.DEFECT], 1.0),
        Studied("dilemma: second defects on trust", games[0], lambda p: p[..., 1, 1, dilemma.DEFECT], 1.0),
        Studied("bargaining: first keeps", games[1], kept, float(bargaining.shares_in_parts(pie)[0])),
        Studied("signalling: able buy it", games[2], lambda p: p[..., 0, 1, signalling.SIGNAL], separates),
        Studied("signalling: others buy it", games[2], lambda p: p[..., 0, 0, signalling.SIGNAL], 0.0),
    ]


def learning_curves(steps: int, seeds: int, seed: int = 0) -> dict[str, np.ndarray]:
    """{name: the watched number after each update [seeds, steps]}."""
    keys = jax.random.split(jax.random.key(seed), seeds)
    curves, played = {}, {}
    for one in studied():
        game = one.name.partition(":")[0]
        if game not in played:
            run = jax.jit(jax.vmap(lambda key, env=one.environment: play.self_play(env, key, steps).policy))
            played[game] = np.asarray(run(keys))
        curves[one.name] = one.read(played[game])
    return curves


def games_table(curves: dict[str, np.ndarray]) -> Table:
    """A row a number: its solution, where the seeds ended, how many within NEAR of it, and how far it still
    moves: the standard deviation over the last LATE of the updates. Intervals are over seeds."""
    rows = {}
    for one in studied():
        values = curves[one.name]
        late = values[:, -max(2, int(LATE * values.shape[1])) :]
        ended, near = late.mean(axis=1), np.abs(late.mean(axis=1) - one.solution) < NEAR
        columns = np.stack([np.full(len(values), one.solution), ended, near, late.std(axis=1)], axis=1)
        names = ("solution", "learnt", "reached", "moves")
        rows[one.name] = dict(zip(names, bootstrap_means(columns), strict=True))
    return Table(rows)
