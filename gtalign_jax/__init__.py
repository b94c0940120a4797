"""gtalign-jax: game-theoretic alignment of LLM assistants (arXiv 2510.08872) in JAX and Flax."""

__version__ = "0.2.0"
