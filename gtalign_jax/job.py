"""What a run is made of: settings, data, tokenizer, model folder, judge and engine, set up once.

Everything here is fixed for the life of the process and holds no trained array: the phases in
`train.py` take a `Job` and explicit states.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from gtalign_jax import config as config_lib
from gtalign_jax.data import loader, sources, synthetic, teacher
from gtalign_jax.data.item import Item, item_of
from gtalign_jax.data.loader import Demonstration, PromptSet
from gtalign_jax.data.tokenizer import load_tokenizer, train_tokenizer
from gtalign_jax.errors import UserError
from gtalign_jax.health import HealthConfig
from gtalign_jax.metrics import MetricsConfig
from gtalign_jax.models import hf, transformer
from gtalign_jax.models.config import ModelConfig, read_config
from gtalign_jax.rewards.features import FeatureConfig
from gtalign_jax.rewards.judges.base import Judge
from gtalign_jax.rewards.judges.rules import judge_by_rules
from gtalign_jax.rewards.mutual_welfare import RewardConfig, RewardFn, resolve_reward
from gtalign_jax.rl.algorithm import AlgorithmConfig, resolve_algorithm
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.engine import BucketConfig, Engine
from gtalign_jax.rollout.folder import end_tokens
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.state import OptimizerConfig
from gtalign_jax.types import PyTree

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """source: `synthetic` (the embedded tasks) or `gtalign` (parquet files under root).

    train_per_task, test_per_task: items of each task (0: all there are, real data only). seed: of the
    embedded items, the demonstrations and the order of batches.
    """

    source: str = "synthetic"
    root: str = ""
    tasks: tuple[str, ...] = ("math", "medium", "ambig_qa", "wildguard")
    train_per_task: int = 512
    test_per_task: int = 64
    seed: int = 0

    def __post_init__(self):
        if self.source not in ("synthetic", "gtalign"):
            raise UserError(f"config.data.source={self.source!r}: must be synthetic or gtalign")


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """The starting model: an HF folder or hub name, or "" to make one from `config.model` here.

    vocab_size: entries of the tokenizer that is then trained on the run's own text. compute_dtype,
    remat, scan_layers: run-time switches, for loaded models too.
    """

    path: str = ""
    vocab_size: int = 1024
    compute_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """The cold start: `steps` updates on `chains` demonstrations of each of `prompts` prompts."""

    steps: int = 0
    prompts: int = 16
    chains: int = 4
    microbatches: int = 1


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """Alignment: `steps` rollouts of `group_size` samples for each of `prompts` prompts.

    algorithm: a preset of `rl.algorithm` or module:function. dump_every: steps between rollout files.
    """

    algorithm: str = "grpo"
    steps: int = 0
    prompts: int = 16
    group_size: int = 8
    dump_every: int = 10


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation: `samples` completions of each test prompt, `prompts` at a time."""

    samples: int = 2
    prompts: int = 64
    temperature: float = 1.0
    seed: int = 1234


@dataclasses.dataclass(frozen=True)
class SteerConfig:
    """Steered examples of the report: the pricing policy, its price, and prompts tried per task."""

    policy: str = "per_token"
    price: float = 3.0
    tries: int = 6


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every `every` steps and at the end of a phase; the newest `keep` stay."""

    every: int = 50
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """The frozen parts of a config; one field a section."""

    seed: int
    max_new_tokens: int
    data: DataConfig
    start: StartConfig
    sft: SftConfig
    align: AlignConfig
    algorithm: AlgorithmConfig
    sft_optimizer: OptimizerConfig
    policy_optimizer: OptimizerConfig
    critic_optimizer: OptimizerConfig
    sampling: SamplingConfig
    buckets: BucketConfig
    reward: RewardConfig
    features: FeatureConfig
    evaluate: EvalConfig
    steer: SteerConfig
    checkpoint: CheckpointConfig
    metrics: MetricsConfig
    health: HealthConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A run's surroundings. model_folder: the HF folder training starts from."""

    settings: Settings
    workdir: pathlib.Path
    model_folder: pathlib.Path
    engine: Engine
    train: PromptSet
    test: PromptSet
    demonstrations: Sequence[Demonstration]
    judge: Judge
    reward_fn: RewardFn

    @property
    def model(self) -> ModelConfig:
        return self.engine.model_config


def make_settings(config: ml_collections.ConfigDict) -> Settings:
    """Every section of the config as its frozen dataclass; UserError names a field that is wrong."""
    chosen = resolve_algorithm(config.align.algorithm)
    overrides = {k: v for k, v in config.algorithm.items() if v is not None}
    parts = {
        field.name: config_lib.build(cls, config[field.name], field.name)
        for field in dataclasses.fields(Settings)
        if field.name not in ("seed", "max_new_tokens", "algorithm", "reward")
        and (cls := SECTIONS[field.name])
    }
    reward = {k: v for k, v in config.reward.items() if k != "fn"}
    return Settings(
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        algorithm=config_lib.build(AlgorithmConfig, dataclasses.asdict(chosen) | overrides, "algorithm"),
        reward=config_lib.build(RewardConfig, reward, "reward"),
        **parts,
    )


SECTIONS = {
    "data": DataConfig,
    "start": StartConfig,
    "sft": SftConfig,
    "align": AlignConfig,
    "sft_optimizer": OptimizerConfig,
    "policy_optimizer": OptimizerConfig,
    "critic_optimizer": OptimizerConfig,
    "sampling": SamplingConfig,
    "buckets": BucketConfig,
    "features": FeatureConfig,
    "evaluate": EvalConfig,
    "steer": SteerConfig,
    "checkpoint": CheckpointConfig,
    "metrics": MetricsConfig,
    "health": HealthConfig,
}


def make_job(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Job:
    """Read the data, make or find the starting model, and prepare prompts and demonstrations."""
    settings = make_settings(config)
    reward_fn = resolve_reward(config.reward.fn)
    train_items = load_items(settings.data, "train")
    test_items = load_items(settings.data, "test")
    chains = _write_chains(train_items, settings)
    if settings.start.path:
        folder = hf.resolve_folder(settings.start.path)
    else:
        folder = workdir / "init"
        _make_model(folder, config.model, settings, train_items, chains)
    engine = load_folder_engine(folder, settings)
    encode = lambda messages: engine_lib.encode(engine, messages)
    fits = lambda tokens: engine_lib.fits(engine, tokens)
    train, test = (loader.encode_prompts(items, encode, fits) for items in (train_items, test_items))
    for name, part in (("train", train), ("test", test)):
        if part.dropped:
            longest = settings.buckets.prompt[-1]
            log.warning("%d %s prompts have over %d tokens and are dropped", part.dropped, name, longest)
    return Job(
        settings=settings,
        workdir=workdir,
        model_folder=folder,
        engine=engine,
        train=train,
        test=test,
        demonstrations=_demonstrations(engine, train, chains, settings),
        judge=judge_by_rules,
        reward_fn=reward_fn,
    )


def load_items(config: DataConfig, split: str) -> list[Item]:
    """The items of a split, `*_per_task` of each task."""
    limit = config.train_per_task if split == "train" else config.test_per_task
    if config.source == "synthetic":
        records = synthetic.make_records(config.tasks, split, limit, config.seed)
        return [item for i, r in enumerate(records) if (item := item_of(r, i, "embedded tasks"))]
    loaded = sources.read_split(config.root, config.tasks, split)
    if loaded.empty:
        log.warning("%d rows of %s have an empty last message and are dropped", loaded.empty, split)
    if not limit:
        return loaded.items
    kept: list[Item] = []
    for task in config.tasks:
        kept += [item for item in loaded.items if item.task == task][:limit]
    return kept


def load_folder_engine(folder: pathlib.Path, settings: Settings) -> Engine:
    """An engine for an HF folder at the run's sampling and buckets; parameters are loaded apart."""
    switches = {k: getattr(settings.start, k) for k in ("compute_dtype", "remat", "scan_layers")}
    tokenizer = load_tokenizer(folder)
    return Engine(
        tokenizer=tokenizer,
        model_config=read_config(folder, **switches),
        eos_ids=end_tokens(folder, tokenizer.eos_token_id),
        sampling=settings.sampling,
        buckets=settings.buckets,
    )


def _write_chains(items: Sequence[Item], settings: Settings) -> dict[int, list[str]]:
    """Item id → its cold-start chains; none when there is no SFT phase."""
    if not settings.sft.steps:
        return {}
    rng = np.random.default_rng([settings.data.seed, 11])
    return {item.id: [teacher.write_chain(item, rng) for _ in range(settings.sft.chains)] for item in items}


def _make_model(
    folder: pathlib.Path,
    model: ml_collections.ConfigDict,
    settings: Settings,
    items: Sequence[Item],
    chains: dict[int, list[str]],
) -> None:
    """Write a random model and a tokenizer trained on the run's text as an HF folder, once."""
    if (folder / "config.json").is_file():
        return
    texts = [message["content"] for item in items for message in item.messages]
    texts += [chain for group in chains.values() for chain in group]
    tokenizer = train_tokenizer(texts, settings.start.vocab_size)
    config = config_lib.build(ModelConfig, {**model, "vocab_size": len(tokenizer)}, "model")
    params = jax.jit(transformer.init_params, static_argnums=1)(jax.random.key(settings.seed), config)
    save_model(params, config, folder, tokenizer)


def save_model(params: PyTree, config: ModelConfig, folder: pathlib.Path, tokenizer) -> None:
    """An HF folder with its tokenizer and end and padding tokens in the generation config."""
    generation = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    hf.save_params(params, config, folder, tokenizer=tokenizer, generation=generation)


def _demonstrations(
    engine: Engine, train: PromptSet, chains: dict[int, list[str]], settings: Settings
) -> list[Demonstration]:
    """Tokenised chains of every training prompt; those over max_new_tokens are dropped with a count."""
    if not chains:
        return []
    end = engine.eos_ids[0]
    kept, dropped = [], 0
    for item, prompt in zip(train.items, train.tokens, strict=True):
        rows = [ids + [end] for ids in engine.tokenizer(chains[item.id])["input_ids"]]
        if all(len(row) <= settings.max_new_tokens for row in rows):
            kept.append(Demonstration(prompt, rows))
        else:
            dropped += 1
    if dropped:
        log.warning("%d demonstrations have over %d tokens and are dropped", dropped, settings.max_new_tokens)
    if not kept:
        raise UserError(f"config.max_new_tokens={settings.max_new_tokens}: no demonstration fits; raise it")
    return kept


def write_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Record the config of a run; a workdir that holds another run's is refused, untouched."""
    path, text = workdir / "config.json", config_lib.to_json(config)
    if not path.is_file():
        path.write_text(text)
    elif path.read_text() != text:
        old, new = json.loads(path.read_text()), json.loads(text)
        field = next(_differences(old, new))
        raise UserError(f"{path}: holds a run with another {field}; name a new --workdir or remove this one")


def _differences(old: dict, new: dict, prefix: str = "config"):
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}.{key}")
        elif a != b:
            yield f"{prefix}.{key} ({a!r}, now {b!r})"


def read_config_json(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The config a run was started with."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; this is no work directory of a run")
    return ml_collections.ConfigDict(json.loads(path.read_text()))
