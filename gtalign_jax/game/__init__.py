"""The game of one turn as arrays: moves and actions, payoffs, equilibria, welfare, pricing, point sets."""
