"""Write cold-start chains, component by component, and keep the best of each prompt: docs/synthesis.md

    python -m experiments.synthesize --config=configs/real_small.py --workdir=runs/chains

Running the same command again goes on where it stopped. `--config.synthesis.*` says who teaches.
"""

import logging
import sys

from experiments.fields import explain
from gtalign_jax.config import parse_command, writable_directory
from gtalign_jax.errors import exit_on_user_error
from gtalign_jax.mesh import cluster


@exit_on_user_error
def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    config, flags = parse_command(argv, {"workdir": "folder of the chains"}, cluster.FLAGS, explain)
    workdir = writable_directory(flags["workdir"], "workdir")
    cluster.initialize_from(flags)
    from gtalign_jax.synthesis.job import synthesize

    synthesize(config, workdir)


if __name__ == "__main__":
    main(sys.argv)
