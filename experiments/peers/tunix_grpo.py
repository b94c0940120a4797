"""Tunix's GRPOLearner, one global step a round. Runs in the environment of tunix.txt.

Policy, reference and rollout lie on one mesh, so rollouts read the policy's own weights; one micro-batch.
"""

import itertools
import re

import jax
import numpy as np
import optax
from flax import nnx
from rounds import Rounds, read_spec
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout import base_rollout
from tunix_model import load, load_tokenizer

Role = rl_cluster.Role


def main() -> None:
    spec, rounds = read_spec(), Rounds()
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), (jax.sharding.AxisType.Auto,) * 2)
    written: list[int] = []

    def reward(prompts, completions, **_):
        written[:] = [len(re.findall(r"[ab]\d+|<", text)) for text in completions]
        return [len(text.split()) % 8 / 7 for text in completions]

    with mesh:
        cluster = rl_cluster.RLCluster(
            actor=load(spec, mesh),
            reference=load(spec, mesh),
            tokenizer=load_tokenizer(spec),
            cluster_config=cluster_config(spec, mesh),
        )
        algorithm = GRPOConfig(num_generations=spec["group"], num_iterations=1, beta=spec["kl_coef"])
        learner = GRPOLearner(cluster, algorithm, reward)

        def batches():
            for _ in itertools.count():
                rounds.wait()
                yield {"prompts": np.array(spec["prompts"])}
                # Asked for the next batch: the step of this one has been started, and ends here.
                jax.block_until_ready(jax.tree.leaves(nnx.state(cluster.actor_trainer.model)))
                rounds.done(tokens=sum(written))

        learner.train(batches())


def cluster_config(spec: dict, mesh) -> rl_cluster.ClusterConfig:
    prompts = len(spec["prompts"])
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(spec["lr"], b1=0.9, b2=0.999, weight_decay=0.01)
    )
    return rl_cluster.ClusterConfig(
        role_to_mesh={role: mesh for role in (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)},
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optimizer,
            eval_every_n_steps=10**6,
            max_steps=10**6,
            mini_batch_size=prompts,
            train_micro_batch_size=prompts,
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=spec["new"],
            max_prompt_length=spec["slots"],
            kv_cache_size=spec["slots"] + spec["new"],
            temperature=1.0,
            top_p=1.0,
            top_k=None,
            eos_tokens=[-1],
        ),
    )


if __name__ == "__main__":
    main()
