"""Evaluate a Hugging Face folder, or a run's checkpoints, on the held-out split of a config's datasets:

    python -m experiments.evaluate --config=configs/quickstart.py --model=runs/quickstart/hf \\
        --workdir=runs/evaluation

Writes the rollouts, summary.json, figures and report.html, and prints the table. The same command again
reads the recorded rollouts instead of generating them.
"""

import logging
import sys

from experiments.fields import explain
from gtalign_jax.config import parse_command, writable_directory
from gtalign_jax.errors import exit_on_user_error, naming
from gtalign_jax.files import paths
from gtalign_jax.mesh import cluster
from gtalign_jax.run.rollouts import check_split


@exit_on_user_error
def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    required = {"model": "HF folder or checkpoints folder", "workdir": "folder for the results"}
    optional = {"name": "the model's name in the table", **cluster.FLAGS}
    config, flags = parse_command(argv, required, optional, explain)
    with naming("--name="):
        check_split(flags["name"] or "model")
    workdir = writable_directory(flags["workdir"], "workdir")
    cluster.initialize_from(flags)
    from gtalign_jax.train import evaluate_model

    model = paths.path(flags["model"])
    if model.name == "checkpoints" and model.is_dir():
        from gtalign_jax.run.export import export_checkpoint

        export_checkpoint(model, workdir / "model")
        model = workdir / "model"
    evaluate_model(config, str(model), workdir, flags["name"] or "model")


if __name__ == "__main__":
    main(sys.argv)
