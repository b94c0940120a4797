"""Train as the config says: SFT cold start, alignment, evaluation, report and export.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

Running the same command again goes on where it stopped.
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
    config, flags = parse_command(argv, {"workdir": "folder of the run's files"}, cluster.FLAGS, explain)
    workdir = writable_directory(flags["workdir"], "workdir")
    cluster.initialize_from(flags)
    from gtalign_jax.train import train

    train(config, workdir)


if __name__ == "__main__":
    main(sys.argv)
