"""The teachers that a config names, one a component."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from gtalign_jax.chain.solver import solver_analysis
from gtalign_jax.config import check_call, load_symbol
from gtalign_jax.errors import UserError, naming
from gtalign_jax.mesh.sharding import make_mesh
from gtalign_jax.remote.client import api_key
from gtalign_jax.remote.counters import Counters
from gtalign_jax.remote.pool import Pool
from gtalign_jax.remote.turns import Turns
from gtalign_jax.rewards.judges.cache import TextCache
from gtalign_jax.rewards.tasks.task import Tasks
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.folder import EngineOptions, load_engine
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.run.cold_start import ENGINE, SERVER, SOLVER, TRUTHS, ComponentConfig
from gtalign_jax.run.progress import stage
from gtalign_jax.run.settings import Settings
from gtalign_jax.synthesis import own_engine, servers, truths
from gtalign_jax.synthesis.ask import ANALYSIS, COMPONENTS, Ask, Made, Teacher
from gtalign_jax.synthesis.checks import matrix_of

_SKIP_AFTER, _SKIP_S = 3, 15.0  # a server that failed so often in a row rests so long, where there are others
_KEPT = 1_000_000  # characters of an answer


def make_teachers(settings: Settings, tasks: Tasks, cache: str) -> dict[str, Teacher]:
    """Component → its teacher; what several share is opened once.

    cache: folder for the answers of servers, "" for none. UserError for a teacher that cannot work.
    """
    opening = _Opening(settings, tasks, cache)
    solved = {ANALYSIS: Teacher(SOLVER, "", _solve)} if settings.synthesis.analyze == SOLVER else {}
    return {name: solved.get(name) or opening.teacher(name) for name in COMPONENTS}


class _Opening:
    """Opens what teachers stand on, each thing once."""

    def __init__(self, settings: Settings, tasks: Tasks, cache: str) -> None:
        self._settings, self._config, self._tasks = settings, settings.synthesis, tasks
        self._cache = functools.cache(lambda: _open_cache(cache))
        self._pool = functools.cache(self._open_pool)
        self._engine = functools.cache(self._open_engine)

    def teacher(self, component: str) -> Teacher:
        wanted = self._config.component(component)
        where = f"config.synthesis.{component}"
        if wanted.teacher == TRUTHS:
            return Teacher(
                TRUTHS, "", functools.partial(truths.make, self._tasks, self._config.response_words)
            )
        if wanted.teacher == SERVER:
            return Teacher(SERVER, wanted.model, self._served(wanted, where))
        if wanted.teacher == ENGINE:
            if not wanted.model:
                raise UserError(f"{where}.model is empty: name the folder of the model that writes")
            loaded = self._engine(wanted.model)
            make = functools.partial(own_engine.make, loaded, wanted.max_tokens)
            return Teacher(ENGINE, wanted.model, make, on_mesh=True)
        function = load_symbol(wanted.teacher, f"{where}.teacher")
        return Teacher(
            wanted.teacher, "", functools.partial(_call, function, f"{where}.teacher={wanted.teacher}")
        )

    def _served(self, wanted: ComponentConfig, where: str) -> Callable[[Sequence[Ask]], list[Made]]:
        if not wanted.endpoints or not wanted.model:
            empty = "model" if wanted.endpoints else "endpoints"
            raise UserError(f"{where}.{empty} is empty: a server has a URL, and a name for its model")
        body = {
            "model": wanted.model,
            "temperature": self._config.temperature,
            "top_p": self._config.top_p,
            "max_tokens": wanted.max_tokens,
        }
        served = servers.Served(self._pool(wanted.endpoints), body, self._cache())
        return functools.partial(servers.make, served)

    def _open_pool(self, urls: tuple[str, ...]) -> Pool:
        key = api_key(self._config.api_key_env, "config.synthesis.api_key_env")
        turns = Turns(len(urls), _SKIP_AFTER, _SKIP_S)
        return Pool(urls, self._config.pool, turns, Counters(), key)

    def _open_engine(self, folder: str) -> own_engine.Loaded:
        config, settings = self._config, self._settings
        sizes = {config.component(name).max_tokens for name in COMPONENTS}
        with naming("config.synthesis."):
            sampling = SamplingConfig(temperature=config.temperature, top_p=config.top_p)
        options = EngineOptions(
            sampling=sampling,
            buckets=BucketConfig(settings.buckets.prompt, tuple(sorted(sizes)), (own_engine.ROWS,)),
            mesh=make_mesh(settings.mesh),
            runtime=settings.start.runtime,
        )
        with stage(f"load {folder}"):
            engine, params = load_engine(folder, options)
        return own_engine.Loaded(engine, params, engine_lib.make_ending(engine))


def _open_cache(folder: str) -> TextCache | None:
    return TextCache(folder, kept=_KEPT, field="--workdir") if folder else None


def _solve(asks: Sequence[Ask]) -> list[Made]:
    """The analysis that follows from each matrix."""
    return [Made(solver_analysis(matrix_of(ask.written))) for ask in asks]


def _call(function: Callable[[Ask], Any], where: str, asks: Sequence[Ask]) -> list[Made]:
    """What a user's function gives for each ask: a text, or None for none."""
    found = [check_call(where, functools.partial(function, ask)) for ask in asks]
    for text in found:
        if not isinstance(text, str | None):
            raise UserError(f"{where}: gave {type(text).__name__}; it must give a text, or None for none")
    return [Made(text, "" if text is not None else "was not written") for text in found]
