"""Everything that learns from a scored rollout, as one frozen value: trainer, planner and benchmark share it.

    experience = learner.experience(models, batch)            advantages, old and reference logprobs
    state, m   = learner.update(state, experience)            donated

With `algorithm.microbatch_tokens` both run by the micro-batches of a `schedule`, planned on the host.
"""

import dataclasses

import jax

from gtalign_jax.errors import UserError
from gtalign_jax.learning import by_tokens
from gtalign_jax.learning.experience import make_experience
from gtalign_jax.learning.gradients import Metrics
from gtalign_jax.learning.microbatches import Schedule
from gtalign_jax.learning.scores import needs_scores
from gtalign_jax.learning.spec import Spec
from gtalign_jax.learning.state import Streamed
from gtalign_jax.learning.update import Optimizers, update
from gtalign_jax.mesh.memory import EXPERIENCE, UPDATE, compile_to_fit
from gtalign_jax.types import Array, Batch, Experience, Models, PyTree, Rollout, TrainState

experience_program = jax.jit(make_experience, static_argnums=0)

update_program = jax.jit(update, static_argnums=(0, 1), donate_argnums=2)


@dataclasses.dataclass(frozen=True)
class Learner:
    """spec: what all numbers depend on; optimizers: of the policy, and of the critic where there is one.

    Two equal learners share their compiled programs. Raises UserError for moments in the host's memory with
    several mini-batches in one program.
    """

    spec: Spec
    optimizers: Optimizers

    def __post_init__(self) -> None:
        config = self.spec.algorithm
        streamed = any(isinstance(each, Streamed) for each in self.optimizers)
        if streamed and not (config.on_policy or config.microbatch_tokens):
            raise UserError(
                "config.policy_optimizer.offload, config.critic_optimizer.offload: with algorithm.epochs or "
                "minibatches over 1 they need algorithm.microbatch_tokens; set it"
            )

    def schedule(self, rng: Array, rollout: Rollout, shards: int = 1) -> Schedule | None:
        """The micro-batches of a rollout (host arrays) for a state with this rng; None when all are equal
        parts. UserError when the budget cannot hold a prompt on each of the shards."""
        config = self.spec.algorithm
        if not config.microbatch_tokens:
            return None
        slots = rollout.prompts.tokens.shape[1]
        return by_tokens.schedule_of(config, rng, slots, rollout.completions, shards)

    def experience(
        self,
        models: Models,
        batch: Batch,
        kl_coef: Array | None = None,
        schedule: Schedule | None = None,
    ) -> Experience:
        """What the update sees of a batch; kl_coef []: of the state, when a controller moves it."""
        scores = None
        if schedule is not None and needs_scores(self.spec, models):
            scores = by_tokens.score_by_tokens(self.spec, models, batch.rollout, schedule)
        return experience_program(self.spec, models, batch, kl_coef, scores)

    def update(
        self,
        state: TrainState,
        experience: Experience,
        base: PyTree | None = None,
        schedule: Schedule | None = None,
    ) -> tuple[TrainState, Metrics]:
        """(state, metrics) after all updates from one rollout; the state's arrays are donated.

        base: `Models.base`. schedule: the one of the experience.
        """
        if schedule is None:
            return update_program(self.spec, self.optimizers, state, experience, base)
        return by_tokens.update_by_tokens(self.spec, self.optimizers, state, experience, base, schedule)

    def compile(
        self,
        state: TrainState,
        models: Models,
        batch: Batch,
        schedule: Schedule | None = None,
    ) -> None:
        """Make all that `experience` and `update` run for a batch of this shape; the state stays as it is.

        UserError for a program that does not fit in memory.
        """
        if schedule is None:
            lowered = experience_program.lower(self.spec, models, batch, state.kl_coef, None)
            compile_to_fit(lowered, EXPERIENCE)
        seen = self.experience(models, batch, state.kl_coef, schedule)
        if schedule is None:  # kept by the program, which will find it
            lowered = update_program.lower(self.spec, self.optimizers, state, seen, models.base)
            compile_to_fit(lowered, UPDATE)
        else:
            by_tokens.compile_update(self.spec, self.optimizers, state, seen, models.base, schedule)
