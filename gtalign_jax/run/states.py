"""How training starts: optimizers, learners and states at step 0, as the settings say."""

import jax
import jax.numpy as jnp
import numpy as np

from gtalign_jax.learning.learner import Learner
from gtalign_jax.learning.sft import SftSetup
from gtalign_jax.learning.spec import Spec
from gtalign_jax.learning.state import init_model, init_state, make_optimizer
from gtalign_jax.learning.update import Optimizers
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.heads import init_value_model
from gtalign_jax.rollout.buckets import bucket
from gtalign_jax.run.settings import Settings
from gtalign_jax.types import Completions, Limit, PyTree, TrainState

PHASES = ("sft", "align")


def sft_setup(settings: Settings, model: ModelConfig) -> SftSetup:
    """What the steps of the cold start have in common."""
    optimizer = make_optimizer(settings.sft_optimizer, settings.sft.steps)
    return SftSetup(model, optimizer, settings.sft.microbatches)


def sft_state(settings: Settings, setup: SftSetup, start: PyTree) -> TrainState:
    """The state of the cold start at step 0; start: what is trained (`lora.split`)."""
    return init_state(jax.random.key(settings.seed), init_model(start, setup.optimizer))


def make_learner(settings: Settings, model: ModelConfig, limit: Limit | None) -> Learner:
    """What learns in alignment; limit: what the sampler is held to."""
    algorithm = settings.algorithm
    # A rollout from before the last update has its sampler's logprobs for old ones, or weights instead.
    stale = settings.align.overlap and not algorithm.is_cap
    spec = Spec(model, algorithm, settings.sampling.temperature, limit, old_from_sampler=stale)
    updates = settings.align.steps * algorithm.epochs * algorithm.minibatches
    critic = make_optimizer(settings.critic_optimizer, updates) if algorithm.needs_critic else None
    return Learner(spec, Optimizers(make_optimizer(settings.policy_optimizer, updates), critic))


def align_state(settings: Settings, learner: Learner, reference: PyTree) -> TrainState:
    """The state of alignment at step 0: the policy is a copy of the reference, and the critic starts from its
    trunk.

    reference: what is trained of it (`lora.split`); with adapters, policy and critic are adapters only.
    """
    algorithm, optimizers, critic = settings.algorithm, learner.optimizers, None
    # Copies, because the state is donated and the reference must live on.
    if optimizers.critic is not None:
        value_model = init_value_model(jax.tree.map(jnp.copy, reference), learner.spec.model)
        critic = init_model(value_model, optimizers.critic)
    return init_state(
        jax.random.key(settings.seed + 1),
        init_model(jax.tree.map(jnp.copy, reference), optimizers.policy),
        critic,
        kl_coef=algorithm.kl_coef if algorithm.kl_target > 0 else None,
        reference=reference if algorithm.reference_every > 0 else None,
        waiting=no_completions(settings) if settings.align.overlap else None,
    )


def no_completions(settings: Settings) -> Completions:
    """What stands for completions that are not written yet, host arrays in their shapes [P, G, N]."""
    slots = bucket(settings.max_new_tokens, settings.buckets.completion, "completion", "max_new_tokens")
    rows = (settings.align.prompts, settings.align.group_size)
    return Completions(
        tokens=np.zeros((*rows, slots), np.int32),
        length=np.zeros(rows, np.int32),
        finished=np.zeros(rows, bool),
        logp=np.zeros((*rows, slots), np.float32),
        action_mask=np.zeros((*rows, slots), bool),
    )
