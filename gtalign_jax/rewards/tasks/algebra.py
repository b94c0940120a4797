r"""Algebra on two answers, in a process of its own that may take SECONDS of processor time over a pair.

Computer algebra follows a hostile power for minutes, inside C code that no exception reaches, and its own
time limit works in main threads only. So one child process, without JAX, reads pairs of LaTeX as lines of
JSON and writes a line each; it kills itself at the limit, and the next pair starts another.
"""

import atexit
import json
import os
import pathlib
import re
import select
import subprocess
import sys
import threading
from typing import Any

SECONDS = 3.0  # of the child's processor time, so that a busy machine gives the same verdicts
WALL_SECONDS = 90.0  # of the clock: a child that is stopped or starved
MEMORY = 4 << 30
RELATIVE = 1.000001e-6  # 0.333333 is a third
_ROOT = pathlib.Path(__file__).resolve().parents[3]
_DECIMAL = re.compile(r"[0-9]*\.[0-9]+")


class Worker:
    """The child process: started at the first pair, and again after it died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def same(self, answer: str, truth: str) -> bool:
        """Whether the two are equal; False where that is not known in time. From any thread."""
        line = json.dumps([answer, truth]).encode() + b"\n"
        with self._lock:
            child = self._running()
            assert child.stdin is not None and child.stdout is not None
            try:
                child.stdin.write(line)
                child.stdin.flush()
                ready, _, _ = select.select([child.stdout], [], [], WALL_SECONDS)
                if ready and (said := child.stdout.readline()):
                    return bool(json.loads(said))
            except OSError:  # it died over the pair before this one
                pass
            self.stop()
            return False

    def stop(self) -> None:
        """End the child, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is not None:
            self.stop()
        if self._child is None:
            path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            self._child = subprocess.Popen(
                [sys.executable, "-m", "gtalign_jax.rewards.tasks.algebra"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        return self._child


WORKER = Worker()
atexit.register(WORKER.stop)


def main() -> None:
    """Read pairs from standard input and write verdicts until it closes."""
    import logging
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which closes our input
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    verdicts = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # what the libraries print is no verdict
    compare("1", "2")  # imports and tables take no time of the first pair
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
        try:
            found = compare(*json.loads(line))
        except (Exception, RecursionError):
            found = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        verdicts.write(json.dumps(found) + "\n")
        verdicts.flush()


def compare(answer: str, truth: str) -> bool:
    """Whether two pieces of LaTeX are equal as mathematics; False where one does not parse whole."""
    from math_verify import verify

    mine, true = _parsed(answer), _parsed(truth)
    if not mine or not true or not verify(true, mine, timeout_seconds=None):
        return False
    decimals = [*_DECIMAL.findall(answer), *_DECIMAL.findall(truth)]
    if not decimals and not verify(true, mine, float_rounding=30, numeric_precision=50, timeout_seconds=None):
        return False
    digits = max((len(d.replace(".", "").lstrip("0")) for d in decimals), default=0)
    relative = min(RELATIVE, 10.0 ** (1 - digits)) if decimals else 1e-40
    return _close(mine[0], true[0], relative)


def _parsed(latex: str) -> list[Any]:
    """[the expression, its text]; [] where the text is no formula as a whole."""
    from math_verify import LatexExtractionConfig, parse

    if "$" in latex.replace(r"\$", ""):
        return []
    found = parse(f"${latex}$", [LatexExtractionConfig()], parsing_timeout=None)
    return found if found and not isinstance(found[0], str) else []


def _close(mine: Any, true: Any, relative: float) -> bool:
    """Two numbers within a relative bound; what is not a number was compared already."""
    import sympy

    if not all(isinstance(x, sympy.Expr) and x.is_number for x in (mine, true)):
        return True
    a, b = (sympy.N(x.doit(), 60) for x in (mine, true))
    if not (a.is_finite and b.is_finite):
        return bool(a == b)
    return bool(abs(a - b) <= relative * max(abs(a), abs(b)) or (mine - true).doit().equals(0))


if __name__ == "__main__":
    main()
