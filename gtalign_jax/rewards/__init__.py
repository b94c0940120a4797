"""From text to welfare: features read from completions, tasks, judges, the jitted reward, normalisation."""
