"""What every number of training depends on besides arrays: one frozen value, static under `jit`."""

import dataclasses

from gtalign_jax.learning.algorithm import AlgorithmConfig
from gtalign_jax.learning.vocabulary import Head
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.types import Limit


@dataclasses.dataclass(frozen=True)
class Spec:
    """temperature: of the sampler, under which all log-probabilities are. limit: what the sampler was held
    to, when not all tokens were open. old_from_sampler: the sampler had other parameters than the policy
    before the update, and old log-probabilities are its.
    """

    model: ModelConfig
    algorithm: AlgorithmConfig
    temperature: float = 1.0
    limit: Limit | None = None
    old_from_sampler: bool = False

    @property
    def head(self) -> Head:
        """How logits are read."""
        return Head(self.temperature, limit=self.limit and self.limit.logits)

    @property
    def reads_old(self) -> bool:
        """Whether the policy's old log-probabilities are computed before the update.

        Anything but the update's own forward pass reads them, and they are not the sampler's.
        """
        config = self.algorithm
        read = not config.on_policy or config.is_cap > 0 or config.kl_place == "reward"
        return read and not self.old_from_sampler
