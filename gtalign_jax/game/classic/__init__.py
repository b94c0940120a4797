"""Three classic games as environments in turns, each with its exact solution (paper: negative result)."""
