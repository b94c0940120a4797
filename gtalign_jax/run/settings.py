"""Everything a config can set, as frozen dataclasses: one `Settings`, a field a section."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_collections

from gtalign_jax import config as config_lib
from gtalign_jax.chain.parse import BLOCKS
from gtalign_jax.data.config import DataConfig
from gtalign_jax.data.tokenizer import SMALLEST
from gtalign_jax.errors import INF, MAX_COUNT, MAX_SEED, UserError, in_range
from gtalign_jax.game.pricing import POLICIES, STEP, check_step
from gtalign_jax.learning.algorithm import AlgorithmConfig, resolve_algorithm
from gtalign_jax.learning.state import OptimizerConfig
from gtalign_jax.mesh.sharding import MeshConfig
from gtalign_jax.models.config import ModelConfig, RuntimeConfig
from gtalign_jax.models.lora import LoraConfig
from gtalign_jax.rewards.features import FeatureConfig
from gtalign_jax.rewards.judges.config import JudgeConfig
from gtalign_jax.rewards.mutual_welfare import RewardConfig, component_weights
from gtalign_jax.rewards.normalize import METHODS
from gtalign_jax.rewards.tasks import EMBEDDED, TASKS, resolve_tasks
from gtalign_jax.rewards.tasks.task import Task
from gtalign_jax.rollout.engine import BucketConfig
from gtalign_jax.rollout.generator import EngineConfig
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.run import auto
from gtalign_jax.run.cold_start import SynthesisConfig
from gtalign_jax.run.health import HealthConfig
from gtalign_jax.run.log import MetricsConfig
from gtalign_jax.run.phase import CheckpointConfig


@dataclasses.dataclass(frozen=True)
class StartConfig(RuntimeConfig):
    """The starting model, and how it is computed: the fields of `RuntimeConfig` for a made and a loaded one.

    path: an HF folder or hub name, or "" to make a model from `config.model` here. vocab_size: entries of
    the tokenizer that is then trained on the run's own text. param_dtype: what the weights are held in,
    `float32` or `bfloat16`; "" is float32 whatever type they are stored in. decode_layout: `gathered` decodes
    faster on a mesh where 1 / tensor of the model fits. attention: `splash` needs a TPU, `cudnn` a GPU.
    remat: also `auto`, the least that fits (`planning.choose`).

    warm_up: compile for every bucket of prompts that the run will meet before its first step. These programs
    would all be compiled later, so it costs no time in all; a bucket that does not fit the memory is found at
    once, and no step waits for the compiler. Without it the first step comes sooner.
    """

    path: str = ""
    vocab_size: int = 1024
    param_dtype: str = ""
    warm_up: bool = True

    def __post_init__(self) -> None:
        if self.param_dtype not in ("", "float32", "bfloat16"):
            raise ValueError(f"param_dtype={self.param_dtype!r}: must be float32 or bfloat16")
        in_range(self, vocab_size=(SMALLEST, MAX_COUNT))
        _ = self.runtime  # which refuses a wrong value of the other fields

    @property
    def runtime(self) -> RuntimeConfig:
        """What a ModelConfig holds of it, with a type for the weights."""
        return RuntimeConfig(
            compute_dtype=self.compute_dtype,
            param_dtype=self.param_dtype or "float32",
            remat=self.remat,
            scan_layers=self.scan_layers,
            decode_layout=self.decode_layout,
            attention=self.attention,
        )


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """The cold start: `steps` updates on `chains` demonstrations of each of `prompts` prompts.

    pack: 0, or the length of a row; then a step trains on `prompts` rows with as many chains in each as fit,
    every one with its own prompt. It pays with one chain a prompt, or with short prompts. microbatches:
    parts whose gradients are summed before an update, or `auto`.
    demonstrations: a file of chains (docs/synthesis.md) to learn from, one a prompt, in place of what the
    built-in teacher writes for the training prompts; `chains` is then not asked for. epochs: so many passes
    over the demonstrations in place of `steps`. block_weights: of the tokens of the thinking, payoff, analyze
    and response blocks in the loss, beside 1 for those outside; (): all alike. held_out: so many
    demonstrations are not trained on, and after every epoch metrics say how the model does on them.
    exercises: rows for each demonstration that teach a small model to follow an edited matrix
    (`data.exercises`), in steps of `config.steer.step`; none without a chain. choice_weight: in the loss, of
    the actions that <analyze> settles on, where it is written as `chain.prompt.analysis_text` does.
    """

    steps: int = 0
    epochs: int = 0
    prompts: int = 16
    chains: int = 4
    microbatches: int = 1
    pack: int = 0
    demonstrations: str = ""
    block_weights: tuple[float, ...] = ()
    held_out: int = 0
    exercises: float = 0.0
    choice_weight: float = 1.0

    def __post_init__(self) -> None:
        in_range(self, exercises=(0, 100), choice_weight=(0, INF))
        if self.pack < 0:
            raise ValueError(f"pack={self.pack}: must be 0 or the length of a row")
        in_range(self, epochs=(0, MAX_COUNT), held_out=(0, MAX_COUNT), block_weights=(0, INF))
        if self.block_weights and (len(self.block_weights) != len(BLOCKS) or not any(self.block_weights)):
            raise ValueError(
                f"block_weights={self.block_weights}: give one each of {', '.join(BLOCKS)}, not all 0, or ()"
            )
        in_range(self, steps=(0, MAX_COUNT), pack=(0, MAX_COUNT))
        in_range(self, prompts=(1, MAX_COUNT), chains=(1, 10_000), microbatches=(1, MAX_COUNT))

    @property
    def weighted(self) -> bool:
        """Whether tokens count differently in the loss."""
        return bool(self.block_weights or self.exercises) or self.choice_weight != 1

    @property
    def trains(self) -> bool:
        """Whether there is a cold start; its number of steps may follow from the demonstrations."""
        return bool(self.steps or self.epochs)


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """Alignment: `steps` rollouts of `group_size` samples for each of `prompts` prompts.

    algorithm: a preset of `learning.algorithm` or module:function. normalize: how rewards are made comparable
    between the tasks of a batch, one of `rewards.normalize.METHODS`. untrained_blocks: blocks whose tokens
    earn no advantage, only the KL to the reference; with `analyze` among them the choice goes on following
    the matrix, so the reward is earned by writing the right matrix. rollout_prompts: how many prompts are
    generated at a time, a divisor of `prompts` (0: all; `auto`), for caches that would not fit. overlap:
    generate step k + 1, with the parameters before the update of step k, while step k is judged; a rollout is
    then one update old, which the ratio to the policy that sampled it corrects. dump_every: steps between
    rollout files.
    """

    algorithm: str = "grpo"
    steps: int = 0
    prompts: int = 16
    group_size: int = 8
    normalize: str = "none"
    untrained_blocks: tuple[str, ...] = ()
    rollout_prompts: int = 0
    overlap: bool = False
    dump_every: int = 10

    def __post_init__(self) -> None:
        in_range(self, steps=(0, MAX_COUNT), prompts=(1, MAX_COUNT), group_size=(1, MAX_COUNT))
        in_range(self, rollout_prompts=(0, MAX_COUNT), dump_every=(1, MAX_COUNT))
        if self.prompts % self.prompts_at_once:
            raise ValueError(f"rollout_prompts={self.rollout_prompts}: must divide prompts={self.prompts}")
        if self.normalize not in METHODS:
            raise ValueError(f"normalize={self.normalize!r}: use one of {', '.join(METHODS)}")
        for block in self.untrained_blocks:
            if block not in BLOCKS:
                raise ValueError(f"untrained_blocks: {block!r} is not one of {', '.join(BLOCKS)}")

    @property
    def prompts_at_once(self) -> int:
        return self.rollout_prompts or self.prompts


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation: `samples` completions of each test prompt, `prompts` at a time."""

    samples: int = 2
    prompts: int = 64
    temperature: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or positive")
        in_range(self, samples=(1, MAX_COUNT), prompts=(1, MAX_COUNT), seed=(0, MAX_SEED))
        SamplingConfig(temperature=self.temperature)  # which refuses one too small


@dataclasses.dataclass(frozen=True)
class SteerConfig:
    """Steered examples of the report: the pricing policy, its price, and prompts tried per task.

    step: what payoffs are rounded to that a price is put on, as finely as the model was taught to read.
    """

    policy: str = "per_token"
    price: float = 6.0
    tries: int = 6
    step: float = STEP

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy!r}: must be one of {', '.join(POLICIES)}")
        check_step(self.step)
        in_range(self, price=(0, INF), tries=(0, MAX_COUNT))


@dataclasses.dataclass(frozen=True)
class Settings:
    """The frozen parts of a config; one field a section."""

    seed: int
    max_new_tokens: int
    mesh: MeshConfig
    data: DataConfig
    start: StartConfig
    lora: LoraConfig
    sft: SftConfig
    align: AlignConfig
    algorithm: AlgorithmConfig
    sft_optimizer: OptimizerConfig
    policy_optimizer: OptimizerConfig
    critic_optimizer: OptimizerConfig
    engine: EngineConfig
    sampling: SamplingConfig
    buckets: BucketConfig
    reward: RewardConfig
    features: FeatureConfig
    judge: JudgeConfig
    evaluate: EvalConfig
    steer: SteerConfig
    checkpoint: CheckpointConfig
    metrics: MetricsConfig
    health: HealthConfig
    synthesis: SynthesisConfig


# Config section → the dataclass it becomes; `algorithm`, `reward` and `model` are built apart.
SECTIONS = {
    "mesh": MeshConfig,
    "data": DataConfig,
    "start": StartConfig,
    "lora": LoraConfig,
    "sft": SftConfig,
    "align": AlignConfig,
    "sft_optimizer": OptimizerConfig,
    "policy_optimizer": OptimizerConfig,
    "critic_optimizer": OptimizerConfig,
    "engine": EngineConfig,
    "sampling": SamplingConfig,
    "buckets": BucketConfig,
    "features": FeatureConfig,
    "judge": JudgeConfig,
    "evaluate": EvalConfig,
    "steer": SteerConfig,
    "checkpoint": CheckpointConfig,
    "metrics": MetricsConfig,
    "health": HealthConfig,
    "synthesis": SynthesisConfig,
}


ALL_SECTIONS = SECTIONS | {"algorithm": AlgorithmConfig, "reward": RewardConfig, "model": ModelConfig}


def make_settings(config: ml_collections.ConfigDict) -> Settings:
    """Every section of the config as its frozen dataclass; UserError names a field that is wrong.

    Fields that say `auto` have their cheapest value.
    """
    _check_fields(config)
    config = auto.until_chosen(config)
    chosen = resolve_algorithm(config.align.algorithm)
    overrides = {k: v for k, v in config.algorithm.items() if v is not None}
    if not chosen.max_tokens:  # a length is measured against the budget, not against the width of a bucket
        overrides.setdefault("max_tokens", config.max_new_tokens)
    # A run recorded before a section existed has its defaults.
    parts: dict[str, Any] = {
        name: config_lib.build(cls, config.get(name, {}), name) for name, cls in SECTIONS.items()
    }
    reward = {k: v for k, v in config.reward.items() if k != "fn"}
    settings = Settings(
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        algorithm=config_lib.build(AlgorithmConfig, dataclasses.asdict(chosen) | overrides, "algorithm"),
        reward=config_lib.build(RewardConfig, reward, "reward"),
        **parts,
    )
    # An export does without the modules of others.
    run_tasks(settings.data, [name for name in settings.data.tasks if ":" not in name])
    _check_together(settings)
    if ":" not in config.reward.fn:  # the parts of another's reward are known once it has run
        _check_components(settings.algorithm, settings.reward)
    return settings


def run_tasks(data: DataConfig, names: Sequence[str] | None = None) -> dict[str, Task]:
    """The tasks of a run by name, in the order of the config; UserError for one that there is not.

    names: only these of them.
    """
    registry = EMBEDDED if data.embedded else TASKS
    return resolve_tasks(data.tasks if names is None else names, registry)


def _check_fields(config: ml_collections.ConfigDict) -> None:
    """Refuse a field at the top that nothing reads, and the lack of one that has no default."""
    known = {*ALL_SECTIONS, "seed", "max_new_tokens"}
    for name in sorted(set(config) - known):
        raise UserError(f"config.{name}: no such field; known: {', '.join(sorted(known))}")
    for name in ("seed", "max_new_tokens", "align", "algorithm", "reward", "model"):
        if name not in config:
            raise UserError(f"config.{name}: is missing; start from configs/base.py, which has it")


def _check_together(settings: Settings) -> None:
    """Refuse values that are right one by one and wrong together. UserError names the field to change."""
    if type(settings.seed) is not int or not 0 <= settings.seed <= MAX_SEED:
        raise UserError(f"config.seed={settings.seed}: must be a whole number from 0 to {MAX_SEED}")
    if type(settings.max_new_tokens) is not int or not 1 <= settings.max_new_tokens <= MAX_COUNT:
        raise UserError(f"config.max_new_tokens={settings.max_new_tokens}: must be a whole number, 1 or more")
    if settings.align.overlap and settings.algorithm.dynamic_sampling:
        raise UserError(
            "config.align.overlap: dynamic_sampling refills after judging; switch one of them off"
        )
    if settings.features.plain and settings.engine.grammar:
        raise UserError(
            "config.engine.grammar: holds to the chain, which config.features.chain=plain has not"
        )
    updates = settings.align.steps * settings.algorithm.epochs * settings.algorithm.minibatches
    if not settings.sft.epochs:
        check_warmup(settings.sft_optimizer, "sft_optimizer", settings.sft.steps)
    check_warmup(settings.policy_optimizer, "policy_optimizer", updates)
    if settings.algorithm.needs_critic:
        check_warmup(settings.critic_optimizer, "critic_optimizer", updates)
    if settings.align.steps:
        _check_sampling(settings.align, settings.algorithm, settings.sampling)


def check_warmup(optimizer: OptimizerConfig, section: str, updates: int) -> None:
    """A phase that ends before its learning rate has reached the peak is no phase that anybody wants."""
    if 0 < updates <= optimizer.warmup:
        raise UserError(
            f"config.{section}.warmup={optimizer.warmup}: must be below the {updates} updates of its phase"
        )


def _check_sampling(align: AlignConfig, algorithm: AlgorithmConfig, sampling: SamplingConfig) -> None:
    """What an algorithm needs of the samples it learns from."""
    if sampling.greedy:
        raise UserError("config.sampling.temperature=0: all samples of a prompt would be equal; raise it")
    if align.group_size == 1 and algorithm.advantage == "group":
        raise UserError(
            "config.align.group_size=1: a group of one has no baseline and no gradient; raise it, or choose "
            "an algorithm with a critic"
        )
    if sampling.repetition_penalty != 1:
        raise UserError(
            f"config.sampling.repetition_penalty={sampling.repetition_penalty}: draws from another "
            "distribution than the trainer's; set it to 1, or align.steps to 0"
        )


def _check_components(algorithm: AlgorithmConfig, reward: RewardConfig) -> None:
    """The parts that GDPO normalises, of a reward of ours."""
    known = ("user", "llm", "welfare", *component_weights(reward))
    if algorithm.needs_components and not algorithm.components:
        raise UserError(f"config.algorithm.components: names none of {', '.join(known)}")
    for name in algorithm.components:
        if algorithm.needs_components and name not in known:
            raise UserError(f"config.algorithm.components: {name!r} is not one of {', '.join(known)}")


def check_batches(settings: Settings, shards: int) -> None:
    """Refuse prompts of a phase that its updates, and `shards` devices in each, cannot share evenly."""
    algorithm = settings.algorithm
    parts = {"sft": settings.sft.microbatches, "align": algorithm.minibatches * algorithm.microbatches}
    for name, count in parts.items():
        section = getattr(settings, name)
        trains = section.trains if isinstance(section, SftConfig) else section.steps
        if trains and section.prompts % (count * shards):
            raise UserError(
                f"config.{name}.prompts={section.prompts}: must be a multiple of {count} (mini- and "
                f"micro-batches) times {shards} (devices that split the batch); lower them or "
                "config.mesh.fsdp"
            )
