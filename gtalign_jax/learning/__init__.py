"""All that changes parameters: scores, advantages, losses, updates, micro-batches, states, the cold start."""
