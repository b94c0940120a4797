"""Who may do what in one turn, by name: the one place that names moves, actions, players and cells.

No JAX, for processes that only read text.
"""

import dataclasses

LLM, USER = 0, 1
VQ, DQ = "VQ", "DQ"  # the user asks vaguely, or in detail
DA, CQ, AQ = "DA", "CQ", "AQ"  # the assistant answers, asks back, or answers and asks


@dataclasses.dataclass(frozen=True)
class Game:
    """Names of the moves, in array order. `keys` are the matrix's JSON keys, in their written order."""

    user_moves: tuple[str, ...] = (VQ, DQ)
    actions: tuple[str, ...] = (DA, CQ, AQ)
    players: tuple[str, str] = ("LLM", "user")

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(sorted(f"{move}_{action}" for move in self.user_moves for action in self.actions))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(U, A, 2), of a payoff matrix."""
        return len(self.user_moves), len(self.actions), len(self.players)

    def split(self, name: str) -> tuple[str | None, str]:
        """(user move, action) of a cell such as `DQ_AQ`, (None, action) of an action, else ValueError."""
        move, cell, action = name.rpartition("_")
        if action not in self.actions or (cell and move not in self.user_moves):
            raise ValueError(f"{name!r} is no cell or action of a game with {', '.join(self.keys)}")
        return (move if cell else None), action

    def cell(self, key: str) -> tuple[int, int]:
        """Array indices of a key such as `DQ_AQ`."""
        move, action = self.split(key)
        if move is None:
            raise ValueError(f"{key!r} is an action and no cell")
        return self.user_moves.index(move), self.actions.index(action)


GTALIGN = Game()
USER_MOVES, ACTIONS, PLAYERS, KEYS = GTALIGN.user_moves, GTALIGN.actions, GTALIGN.players, GTALIGN.keys
