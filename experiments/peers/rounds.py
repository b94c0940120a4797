"""The talk between a benchmark and a peer's process: a line in starts a round, a JSON line out ends it.

Imported by the scripts beside it, which run in environments without this project; standard library only.
"""

import json
import os
import sys


class Rounds:
    """stdout is kept for the talk; what libraries print to it goes to stderr."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> None:
        """Until a round is asked for; the process ends when nobody will ask any more."""
        if not sys.stdin.readline():
            os._exit(0)  # from whatever thread of the library we are in

    def done(self, **fields) -> None:
        """Tell that the round is over, and what it made."""
        print(json.dumps(fields), file=self._answers, flush=True)


def read_spec() -> dict:
    """The spec that `launch.Peer` wrote; see `launch.spec`."""
    with open(sys.argv[1]) as file:
        return json.load(file)
