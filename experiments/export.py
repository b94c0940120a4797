"""Export a run's policy: python -m experiments.export --checkpoint=RUN/checkpoints --out=DIR

The newest one, or with --best the one with the highest `config.checkpoint.best`, or with --step=N the one of
step N; --list tells which there are. DIR becomes a Hugging Face folder: config.json, generation_config.json,
tokenizer and chat template, and sharded safetensors, written whole or not at all. A folder that holds
something is refused; --overwrite replaces an export, nothing else. README.md in it is a model card.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from gtalign_jax.config import writable_directory
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.files import paths
from gtalign_jax.models.folders import check_free
from gtalign_jax.run.export import export_checkpoint, list_checkpoints


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="the checkpoints folder of a run")
    parser.add_argument("--out", help="Hugging Face folder to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--best", action="store_true", help="the checkpoint with the highest config.checkpoint.best"
    )
    which.add_argument("--step", type=int, help="the checkpoint of this step, of the last phase that has it")
    which.add_argument("--list", action="store_true", help="write nothing, tell which checkpoints there are")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="also upload the folder, as HF_TOKEN may")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    if flags.list:
        print("\n".join(list_checkpoints(paths.path(flags.checkpoint))))
        return
    if not flags.out:
        raise UserError("--out is missing: the Hugging Face folder to write, or --list")
    out = paths.absolute(flags.out)
    if flags.push_to_hub:
        check_hub(flags.push_to_hub, out)
    check_free(out, flags.overwrite)
    writable_directory(str(out.parent), "out")
    source = export_checkpoint(
        paths.path(flags.checkpoint), out, flags.best, flags.step, overwrite=flags.overwrite
    )
    print(f"{source} written to {out}", file=sys.stderr)
    if flags.push_to_hub:
        print(push(out, flags.push_to_hub), file=sys.stderr)


def check_hub(name: str, out: pathlib.Path) -> None:
    """UserError for a name that no repository has, or a folder that is not on a disk."""
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise UserError(f"--push_to_hub={name}: {error}") from error
    if paths.on_store(out):
        raise UserError(f"--push_to_hub: uploads from a disk, and --out={out} is on a store; name a folder")


def push(folder: pathlib.Path, name: str) -> str:
    """Upload a folder as a model of the hub; where it then stands. UserError when the hub refuses it."""
    hub = HfApi()
    try:
        hub.create_repo(name, exist_ok=True)
        return str(hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Export"))
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"--push_to_hub={name}: {said}; the model stands in {folder}") from error


if __name__ == "__main__":
    main()
