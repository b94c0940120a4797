"""Plan a run on a TPU pod without one: memory, work, collectives and roofline times of every program.

    python -m experiments.plan --config=configs/qwen2_5_3b/full.py --topology=v5e:16x16 [--json]

Needs libtpu (`pip install libtpu`), and neither a TPU, nor weights, nor a network. The table goes to
stdout; progress goes to stderr.
"""

import json
import os
import sys

from experiments.fields import explain
from gtalign_jax.config import parse_command
from gtalign_jax.errors import exit_on_user_error


@exit_on_user_error
def main(argv: list[str]) -> None:
    as_json = "--json" in argv
    config, flags = parse_command(
        [arg for arg in argv if arg != "--json"],
        {"topology": "TPU chips to plan for, such as v5e:16x16 or v5p:4x4x4"},
        explain=explain,
    )
    os.environ["JAX_PLATFORMS"] = "cpu"  # plans are made on the host, also where there is a TPU
    from gtalign_jax.planning.plan import make_plan
    from gtalign_jax.planning.table import format_plan

    plan = make_plan(config, flags["topology"], say=lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(plan, indent=1) if as_json else format_plan(plan))


if __name__ == "__main__":
    main(sys.argv)
