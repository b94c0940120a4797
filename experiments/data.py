"""Look at a run's data: rows, lengths, labels, duplicates and leaks:

    python -m experiments.data --config=configs/real_small.py --config.data.root=DIR [--json]

Prints, for each task and split of `config.data`: rows and distinct prompts, empty truths, tokens by bucket of
`config.buckets.prompt` and what those drop, labels and right actions; then what test shares with train:
prompts word for word, questions, near-duplicates. Files are read whole. Records that are wrong are listed.

    python -m experiments.data --config=… --build=NAME[:FOLDER]

writes the data as TFDS data sets in ArrayRecord files instead, one a task, to be read by
`config.data.source=tfds:NAME[:FOLDER]`. FOLDER is TFDS's own (~/tensorflow_datasets) where none is named.
"""

import json
import logging
import sys

from gtalign_jax.config import parse_command
from gtalign_jax.errors import exit_on_user_error


@exit_on_user_error
def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    as_json = "--json" in argv
    build = {"build": "NAME[:FOLDER]: write the data as TFDS data sets, and describe nothing"}
    config, given = parse_command([arg for arg in argv if arg != "--json"], {}, build)
    from gtalign_jax.data.report import text_report
    from gtalign_jax.run.describe import build_data, describe_data
    from gtalign_jax.run.settings import make_settings

    if given["build"]:
        print("\n".join(map(str, build_data(make_settings(config).data, given["build"]))))
        return
    found = describe_data(make_settings(config))
    print(json.dumps(found, indent=1) if as_json else text_report(found))


if __name__ == "__main__":
    main(sys.argv)
