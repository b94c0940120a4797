"""A page about several runs, or one run's report again: python -m experiments.report RUNS… [--out=DIR]

    python -m experiments.report runs/grpo runs/ppo    # runs/runs.html
    python -m experiments.report runs/grpo             # runs/grpo/report.html and its figures

A run may still go on: the page shows what it has recorded. `--out` names the folder of `runs.html`; without
it that is the folder in which all the runs lie.
"""

from __future__ import annotations

import argparse

from gtalign_jax.errors import exit_on_user_error
from gtalign_jax.files import drafts


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="work directory of a run or an evaluation")
    parser.add_argument("--out", help="folder for runs.html; default: the one in which all the runs lie")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    # Imported here, for it loads jax.
    from gtalign_jax.evaluation.report.index import common_folder, load_runs, write_index
    from gtalign_jax.evaluation.report.write import write_page

    runs = load_runs(flags.runs)  # refused before a folder is made
    if flags.out is None and len(runs) == 1:
        (run,) = runs.values()
        print(f"report  {write_page(run)}")
    else:
        out = drafts.make_folder(flags.out or common_folder(runs), "out")
        print(f"report  {write_index(runs, out)}")


if __name__ == "__main__":
    main()
