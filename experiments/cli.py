"""The jobs as one command: `gtalign JOB FLAGS` is `python -m experiments.JOB FLAGS`.

    gtalign train --config=configs/quickstart.py --workdir=runs/quickstart

`gtalign` alone lists the jobs. A job is a module of this folder with a `main`; none of them is imported to be
listed, so the list needs no jax.
"""

from __future__ import annotations

import ast
import difflib
import pathlib
import runpy
import sys

from gtalign_jax import __version__
from gtalign_jax.errors import UserError, exit_on_user_error

FOLDER = pathlib.Path(__file__).resolve().parent


def jobs() -> dict[str, str]:
    """Name to what it does, the first line of its docstring without the command; by name."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        defined = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
        if "main" in defined and path.stem != "cli":
            first = (ast.get_docstring(module) or "").partition("\n")[0]
            found[path.stem] = first.partition(": python -m")[0].rstrip(".:")
    return found


def listing() -> str:
    """What `gtalign` alone prints."""
    known = jobs()
    width = max(map(len, known))
    lines = [f"  {name:{width}}  {about}" for name, about in known.items()]
    return "\n".join(["usage: gtalign JOB [flags]; gtalign JOB --help tells a job's flags", "", *lines])


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Run the job that `argv` names, by default the command line's. An unknown one is a UserError."""
    job, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if job in ("-h", "--help"):
        print(listing())
    elif job == "--version":
        print(__version__)
    elif job in (known := jobs()):
        if "" not in sys.path and not sys.flags.safe_path:
            sys.path.insert(0, "")  # as `python -m` does: a reward of one's own may lie where one stands
        sys.argv = [job, *rest]
        runpy.run_module(f"{__package__}.{job}", run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(job, known, n=3, cutoff=0.5)
        hint = f"the nearest: {', '.join(near)}" if near else "`gtalign` alone lists them"
        raise UserError(f"gtalign {job}: no such job; {hint}")


if __name__ == "__main__":
    main()
