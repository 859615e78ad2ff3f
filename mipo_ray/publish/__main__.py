"""The command that publishes a run's model on the Hugging Face Hub.

    python -m mipo_ray.publish RUN --to ORG/NAME --dry-run             writes the folder, and sends nothing
    python -m mipo_ray.publish RUN --to ORG/NAME --upload              a private repository
    python -m mipo_ray.publish RUN --to ORG/NAME --upload --public
    python -m mipo_ray.publish RUN --to ORG/NAME --dry-run --adapter   of a run with LoRA: the adapter alone
    python -m mipo_ray.publish RUN --to ORG/NAME --dry-run --pairs --results   its pairs, results.json, evaluation.json

The folder holds the policy of the newest round that the guard did not find bad, with tokenizer and chat template, and a
model card made of the run. The card tells neither paths of this machine nor secrets. The token is huggingface_hub's
own: HF_TOKEN, or `hf auth login`.
Exit codes are those of mipo_ray.run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mipo_ray.command import run_command
from mipo_ray.errors import UserError
from mipo_ray.models.hub import HUB_ID
from mipo_ray.pairs.export import make_empty
from mipo_ray.publish.folder import Publication, write_folder
from mipo_ray.publish.policy import find_policy
from mipo_ray.publish.upload import check_target, upload
from mipo_ray.storage.run_directory import open_run
from mipo_ray.terminal import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = _parse(arguments)

    def work() -> int:
        if not HUB_ID.fullmatch(options.to):
            raise UserError(f"--to {options.to}: expected a name of the Hub, ORG/NAME")
        if options.public and not options.upload:
            raise UserError("--public: says how --upload makes the repository; with --dry-run nothing is sent")
        if options.output is not None and options.upload:
            raise UserError("--output: says where --dry-run writes; with --upload nothing stays on this machine")
        run = open_run(options.run)
        publication = Publication(
            find_policy(run, options.round), options.to, options.adapter, options.pairs, options.results
        )
        return _write(publication, options.output) if options.dry_run else _upload(publication, options.public)

    return run_command(work, resumes=False)


def _write(publication: Publication, output: Path | None) -> int:
    folder = output or Path("published") / publication.to
    make_empty(folder)
    for name, size in write_folder(publication, folder, copies=True).items():
        say(f"{folder / name}: {size:,} bytes")
    say(f"dry run: nothing was sent; --upload sends these files to {publication.to}")
    return 0


def _upload(publication: Publication, public: bool) -> int:
    check_target(publication.to, public=public)  # before the work: weights may have to be brought here first
    with tempfile.TemporaryDirectory(prefix="mipo-ray-publish-") as place:
        folder = Path(place)
        files = write_folder(publication, folder, copies=False)
        address = upload(folder, publication.to, public=public)
    say(f"{address}: {len(files)} files, {sum(files.values()):,} bytes, {'public' if public else 'private'}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mipo_ray.publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="run directory: a local path or a URL")
    parser.add_argument("--to", required=True, metavar="ORG/NAME", help="repository of the Hub")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--dry-run", action="store_true", help="write the folder, send nothing")
    mode.add_argument("--upload", action="store_true", help="send it; a repository that is not there is made, private")
    parser.add_argument("--public", action="store_true", help="make the repository for everybody to see")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of a dry run (default: published/ORG/NAME)")
    parser.add_argument(
        "--round",
        type=int,
        metavar="N",
        help="whose policy (default: the newest finished one that the guard did not find bad)",
    )
    parser.add_argument("--adapter", action="store_true", help="a LoRA adapter beside its base, not the whole model")
    parser.add_argument("--pairs", action="store_true", help="with the pairs of every round, in TRL's columns")
    parser.add_argument("--results", action="store_true", help="with results.json and evaluation.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
