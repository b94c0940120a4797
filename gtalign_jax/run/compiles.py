"""How many XLA programs were compiled: after the first step of a phase, the answer must stay zero."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCount:
    """Programs compiled (or read from the compilation cache) since the count was last taken."""

    def __init__(self) -> None:
        self._seen = 0

    def add(self, event: str, duration_secs: float, **_: str | int) -> None:
        self._seen += event == _EVENT

    def take(self) -> int:
        """The count, which starts again at zero."""
        seen, self._seen = self._seen, 0
        return seen


@contextmanager
def counting_compiles() -> Iterator[CompileCount]:
    """A `CompileCount` that listens to JAX while the context is open."""
    count = CompileCount()
    jax.monitoring.register_event_duration_secs_listener(count.add)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(count.add)
