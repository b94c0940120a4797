"""What a run is made of: settings, data, tokenizer, model folder, judge and engine, set up once.

Everything here is fixed for the life of the process and holds no trained array: the phases in
`train.py` take a `Job` and explicit states.
"""

import dataclasses
import functools
import itertools
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from gtalign_jax import config as config_lib
from gtalign_jax.data import loader, sources
from gtalign_jax.data.item import Item
from gtalign_jax.data.loader import Demonstration, PromptSet
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.errors import UserError
from gtalign_jax.learning.algorithm import check_functions
from gtalign_jax.learning.by_tokens import schedule_sizes
from gtalign_jax.mesh import processes
from gtalign_jax.mesh.memory import LOAD, told
from gtalign_jax.mesh.sharding import batch_shards, make_mesh, shard_tree
from gtalign_jax.models import hf, lora, transformer
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.remote.counters import Counters
from gtalign_jax.rewards.judges.base import ConsistencyJudge, Judge
from gtalign_jax.rewards.judges.http import make_http_consistency_judge, make_http_judge
from gtalign_jax.rewards.judges.rules import check_rules, judge_by_rules
from gtalign_jax.rewards.mutual_welfare import RewardFn, resolve_reward
from gtalign_jax.rewards.tasks.task import Tasks
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.buckets import bucket
from gtalign_jax.rollout.chat import Messages, asks_for_date
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.folder import EngineOptions, folder_engine, generation_fields
from gtalign_jax.rollout.generator import Generator, make_generator
from gtalign_jax.rollout.spans import Tables, engine_tables
from gtalign_jax.run import cautions, feeds
from gtalign_jax.run import shown as shown_lib
from gtalign_jax.run.epochs import divided, with_steps
from gtalign_jax.run.feeds import Feeds
from gtalign_jax.run.mesh_judge import MeshJudge, make_mesh_judge
from gtalign_jax.run.progress import stage
from gtalign_jax.run.record import start_date
from gtalign_jax.run.settings import (
    AlignConfig,
    Settings,
    SftConfig,
    check_batches,
    make_settings,
    run_tasks,
)
from gtalign_jax.types import PyTree

log = logging.getLogger(__name__)
Encode = Callable[[str | Messages], list[int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A run's surroundings. model_folder: the HF folder training starts from. tasks: of `config.data.tasks`.

    judge: as `config.judge.kind` says; judge_stats counts it.
    consistency: decides P when `config.features.frontier` says `judge`.
    untrained: where the tokens of `config.align.untrained_blocks` are, see `rollout.spans`; response: where
    those of the response are, () where all are, or where no reference reads them.
    generator: who writes rollouts (`config.engine`). train, demonstrations: those that are in memory, and
    held_out: demonstrations that are not trained on; feeds: what each step trains on.
    """

    settings: Settings
    workdir: pathlib.Path
    model_folder: pathlib.Path
    tasks: Tasks
    engine: Engine
    train: PromptSet
    test: PromptSet
    demonstrations: Sequence[Demonstration]
    feeds: Feeds
    judge: Judge
    consistency: ConsistencyJudge | None
    judge_stats: Counters
    reward_fn: RewardFn
    untrained: tuple[Tables, ...]
    response: tuple[Tables, ...]
    generator: Generator
    held_out: Sequence[Demonstration] = ()

    @property
    def model(self) -> ModelConfig:
        return self.engine.model_config

    @property
    def mesh_judge(self) -> MeshJudge | None:
        """The judge, where it is a model on the mesh: it runs in turn with the policy, on all processes."""
        return self.judge if isinstance(self.judge, MeshJudge) else None

    @property
    def mesh(self) -> Mesh:
        assert self.engine.mesh is not None  # a job's engine has one
        return self.engine.mesh


def make_job(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Job:
    """Read the data, make or find the starting model, and prepare prompts and demonstrations."""
    settings = make_settings(config)
    mesh = make_mesh(settings.mesh)
    check_batches(settings, batch_shards(mesh))
    cautions.of_settings(settings)
    cautions.of_mesh(mesh)
    reward_fn = resolve_reward(config.reward.fn)
    check_functions(settings.algorithm)
    _check_attention(settings.start.attention)
    stats = Counters()
    tasks = run_tasks(settings.data)
    judge, consistency = make_judges(settings, stats, tasks, workdir)
    trains = settings.sft.trains or settings.align.steps
    streamed = trains and settings.data.streamed
    with stage("read the data"):
        train_items = _train_items(settings, tasks) if trains else []
        test_items = sources.load_items(settings.data, tasks, sources.TEST)
        shown, chains = shown_lib.cold_start(train_items, test_items, tasks, settings)
    folder = start_folder(settings, workdir)
    if not settings.start.path:
        _make_model(folder, config.model, settings, _together(train_items, shown), chains)
    engine = load_folder_engine(folder, settings, mesh)
    if asks_for_date(engine.tokenizer):
        engine = dataclasses.replace(engine, date=start_date(workdir))
    cautions.of_start(folder, engine)
    if streamed:  # what was read made a tokenizer, and is read again when its turn has come
        train_items = []
        if not (settings.sft.trains and settings.sft.demonstrations):
            shown, chains = train_items, {}
    train, test, taught = _tokenised(engine, settings, (train_items, test_items, shown), chains)
    demonstrations, held_out = divided(taught, settings)
    demonstrations = [*demonstrations, *shown_lib.write_exercises(engine, demonstrations, settings)]
    settings = with_steps(settings, demonstrations)
    make = feeds.streamed if streamed else feeds.in_memory
    fed = make(settings, tasks, engine, train, demonstrations)
    _check_rows("align", settings.align, fed.prompt_rows)
    _check_rows("sft", settings.sft, fed.demonstration_rows)
    _check_budget(settings, train, batch_shards(mesh))
    return Job(
        settings=settings,
        workdir=workdir,
        model_folder=folder,
        tasks=tasks,
        engine=engine,
        train=train,
        test=test,
        demonstrations=demonstrations,
        held_out=held_out,
        feeds=fed,
        judge=judge,
        consistency=consistency,
        judge_stats=stats,
        reward_fn=reward_fn,
        **_tags(engine, settings),
        generator=make_generator(settings.engine, engine, workdir),
    )


def _train_items(settings: Settings, tasks: Tasks) -> list[Item]:
    """The training items; of a streamed source those that a tokenizer is made from, if one is."""
    if not settings.data.streamed:
        return sources.load_items(settings.data, tasks, sources.TRAIN)
    return [] if settings.start.path else feeds.sample(settings, tasks)


def _tokenised(
    engine: Engine,
    settings: Settings,
    items: tuple[Sequence[Item], Sequence[Item], Sequence[Item]],
    chains: dict[int, list[str]],
) -> tuple[PromptSet, PromptSet, list[Demonstration]]:
    """(training prompts, test prompts, demonstrations) of (training, test, demonstrated) items."""
    train_items, test_items, shown = items
    fits, asked = functools.partial(engine_lib.fits, engine), len(train_items) + len(test_items)
    with stage(f"tokenise {asked} prompts", asked) as advance:
        encode = _counted(functools.partial(engine_lib.encode, engine), advance)
        test = loader.encode_prompts(test_items, encode, fits, settings.data)
        train = PromptSet([], [])
        if train_items:
            train = loader.encode_prompts(train_items, encode, fits, settings.data)
        taught = train
        if shown is not train_items:
            taught = loader.encode_prompts(shown, encode, fits, settings.data)
            cautions.of_prompts("demonstrated", taught, settings)
        demonstrations = shown_lib.demonstrations(engine, taught, chains, settings)
    for name, part in (("train", train), ("test", test)):
        cautions.of_prompts(name, part, settings)
    return train, test, demonstrations


def with_settings(job: Job, settings: Settings) -> Job:
    """The job under settings that differ in how much is computed at a time, and how."""
    sft = dataclasses.replace(settings.sft, steps=job.settings.sft.steps)  # which may follow from its epochs
    settings = dataclasses.replace(settings, sft=sft)
    model = dataclasses.replace(job.model, runtime=settings.start.runtime)
    return dataclasses.replace(
        job, settings=settings, engine=dataclasses.replace(job.engine, model_config=model)
    )


def make_judges(
    settings: Settings, stats: Counters, tasks: Tasks, workdir: pathlib.Path
) -> tuple[Judge, ConsistencyJudge | None]:
    """The judge of answers, and the one of Pareto consistency where one is wanted."""
    kind, wanted = settings.judge.chosen, settings.features.frontier == "judge"
    if kind != "http" and wanted:
        raise UserError("config.features.frontier='judge' needs a server; set config.judge.endpoints")
    if kind == "http":
        consistency = make_http_consistency_judge(settings.judge, stats) if wanted else None
        return make_http_judge(settings.judge, stats, tasks), consistency
    if kind == "model":
        options = EngineOptions(mesh=make_mesh(settings.mesh), runtime=settings.start.runtime)
        date = functools.partial(start_date, workdir)
        return make_mesh_judge(settings.judge, options, tasks, stats, date), None
    check_rules(tasks)
    return functools.partial(judge_by_rules, tasks=tasks), None


def _tags(engine: Engine, settings: Settings) -> dict[str, tuple[Tables, ...]]:
    """Field of `Job` → where the tokens of some blocks are."""
    blocks: dict[str, Sequence[str]] = {"untrained": (), "response": ()}
    if settings.align.steps and not settings.features.plain:
        blocks["untrained"] = settings.align.untrained_blocks
        blocks["response"] = ("response",) if settings.algorithm.needs_reference else ()
    with stage("find the tags in tokens"):
        return {name: engine_tables(engine, found) for name, found in blocks.items()}


def _counted(encode: Encode, advance: Callable[[int], None]) -> Encode:
    """`encode` that tells how often it was called."""
    count = itertools.count(1)

    def counting(prompt: str | Messages) -> list[int]:
        advance(next(count))
        return encode(prompt)

    return counting


def _check_attention(name: str) -> None:
    """Refuse an attention that the devices here do not have."""
    needs = {"splash": "tpu", "cudnn": "gpu"}.get(name)
    if needs is not None and needs != jax.default_backend():
        raise UserError(f"config.start.attention={name!r}: needs a {needs.upper()}; use auto or xla")


def _check_rows(section: str, phase: SftConfig | AlignConfig, rows: int) -> None:
    """A batch that holds a prompt twice is no batch that anybody wants; packed rows hold no prompt each."""
    packed = isinstance(phase, SftConfig) and phase.pack
    if phase.steps and not packed and rows < phase.prompts:
        raise UserError(
            f"config.{section}.prompts={phase.prompts}: there are only {rows} training prompts; lower it or "
            "give more"
        )


def _check_budget(settings: Settings, train: PromptSet, shards: int) -> None:
    """A micro-batch by token count holds the longest prompt and completions on every device."""
    algorithm, align = settings.algorithm, settings.align
    if not (algorithm.microbatch_tokens and align.steps):
        return
    longest = max(map(len, train.tokens), default=settings.buckets.prompt[-1])
    slots = bucket(longest, settings.buckets.prompt, "prompt", "a prompt")
    width = bucket(settings.max_new_tokens, settings.buckets.completion, "completion", "max_new_tokens")
    schedule_sizes(algorithm, (align.prompts, slots, align.group_size, width), shards).check()


def load_start(job: Job) -> PyTree:
    """The parameters training starts from, on the mesh."""
    axes, shapes = transformer.logical_axes(job.model), hf.abstract_params(job.model)
    shardings = shard_tree(axes, job.mesh, shapes)
    with stage("load the model", len(jax.tree.leaves(shapes))) as advance, told(LOAD):
        return hf.load_params(job.model_folder, job.model, shardings, advance)


def load_folder_engine(folder: pathlib.Path, settings: Settings, mesh: Mesh) -> Engine:
    """An engine for an HF folder at the run's sampling and buckets; parameters are loaded apart."""
    options = EngineOptions(
        sampling=settings.sampling,
        buckets=settings.buckets,
        mesh=mesh,
        compact_every=settings.engine.compact_every,
        rows=settings.engine.rows,
        runtime=settings.start.runtime,
    )
    return folder_engine(folder, options, chat=True)


def start_folder(settings: Settings, workdir: pathlib.Path) -> pathlib.Path:
    """The HF folder a run starts from: the one it was given, or the one it makes in its workdir."""
    return hf.resolve_folder(settings.start.path) if settings.start.path else workdir / "init"


def _together(train: Sequence[Item], shown: Sequence[Item]) -> Sequence[Item]:
    """All whose text the tokenizer of a model that is made here learns."""
    return train if shown is train else [*train, *shown]


def _make_model(
    folder: pathlib.Path,
    model: ml_collections.ConfigDict,
    settings: Settings,
    items: Sequence[Item],
    chains: dict[int, list[str]],
) -> None:
    """Write a random model and a tokenizer trained on the run's text as an HF folder, once."""
    if processes.from_main((folder / "config.json").is_file):
        return
    with stage("make the starting model"):
        tokenizer = make_tokenizer(settings, items, chains)
        config = config_lib.build(ModelConfig, {**model, "vocab_size": len(tokenizer)}, "model")
        params = jax.jit(transformer.init_params, static_argnums=1)(jax.random.key(settings.seed), config)
    save_model(params, config, folder, tokenizer, folder)


def make_tokenizer(
    settings: Settings, items: Sequence[Item], chains: dict[int, list[str]]
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that is made here, trained on the run's text."""
    texts = [message["content"] for item in items for message in item.messages]
    texts += [chain for group in chains.values() for chain in group]
    return train_tokenizer(texts, settings.start.vocab_size)


def save_model(
    params: PyTree, config: ModelConfig, folder: pathlib.Path, tokenizer: Any, start: pathlib.Path
) -> None:
    """An HF folder with its tokenizer and the generation config of `start`, the folder the model came from.

    Adapters are merged into it.
    """
    generation = generation_fields(start, tokenizer, config.vocab_size)
    with stage(f"write the model to {folder}"):
        hf.save_params(lora.merged(params), config, folder, tokenizer=tokenizer, generation=generation)
