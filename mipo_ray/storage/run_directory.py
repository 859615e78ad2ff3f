"""The run directory: where everything lies, which stages are finished, and who may write.

The only module that knows paths. Works on any filesystem that fsspec opens. A stage is finished when its manifest
is there: the manifest is written last, in one object write, and lists every file of the stage with its size.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import posixpath
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from glob import has_magic

import fsspec
import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem

from mipo_ray.config.recipe import config_hash
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError, brief
from mipo_ray.paths import files_below, open_path
from mipo_ray.redaction import secret_in
from mipo_ray.storage.arrow_files import NamedFaults, is_in_bucket
from mipo_ray.storage.faults import StorageError, StorageFault, advice_on, is_bucket_gone, named
from mipo_ray.storage.local_files import WRITING, new_file, where_to_make, write_whole
from mipo_ray.storage.manifests import MANIFEST, AnyFacts, Manifest, Work, kind_of, read_manifest
from mipo_ray.storage.rounds import Round

MINIMUM_FREE_BYTES = 64 * 1024**2
PROBE = ".probe-"
# Files with the configuration, which might hold a secret that is not known as one: for their owner alone.
PRIVATE = ("config.yaml", "report.html")
LOGS = "logs"  # what libraries print, and what failed runs leave; private as well


@dataclass(frozen=True)
class RunDirectory:
    """A run directory on any filesystem. `url` as the user gave it (local paths made absolute)."""

    url: str

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        return open_path(self.url)[0]

    @property
    def root(self) -> str:
        return open_path(self.url)[1].rstrip("/")

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    def arrow_filesystem(self) -> pyarrow.fs.FileSystem:
        """The same filesystem as pyarrow and Ray Data take it."""
        if self.is_local:
            return pyarrow.fs.LocalFileSystem()
        return pyarrow.fs.PyFileSystem(NamedFaults(self.filesystem))

    def path(self, *parts: str) -> str:
        """Path on `filesystem` (no scheme)."""
        return posixpath.join(self.root, *parts)

    def stage(self, round: Round, stage: str) -> str:
        """Name of a stage's directory below the run directory."""
        return f"{round.directory}/{stage}"

    def read_text(self, name: str) -> str | None:
        """The text of a file below the run directory; None when it does not exist.

        Raises StorageError for a file that holds no text, for what is no file, and where it cannot be told.
        """
        try:
            with named(self.path(name), "read"):
                return self.filesystem.cat_file(self.path(name)).decode("utf-8")
        except FileNotFoundError:
            self._check_bucket(name)
            return None
        except UnicodeDecodeError as error:
            raise StorageError(f"{self.path(name)}: expected text (UTF-8), found: {error}") from None
        except IsADirectoryError:
            raise StorageError(f"{self.path(name)}: expected a file, found a directory") from None

    def write_text(self, name: str, text: str) -> None:
        """Writes a file in one go: on a local disk through a temporary file, on an object store in one object write."""
        with named(self.path(name), "written"):
            if not self.is_local:
                self.filesystem.pipe_file(self.path(name), text.encode("utf-8"))
                return
            write_whole(self.path(name), text, 0o600 if name in PRIVATE or name.startswith(f"{LOGS}/") else 0o666)

    def modified(self, name: str) -> datetime.datetime | None:
        """When a file below the run directory was last written; None when it does not exist."""
        try:
            with named(self.path(name), "looked at"):
                self.filesystem.invalidate_cache()
                return self.filesystem.modified(self.path(name))
        except FileNotFoundError:
            self._check_bucket(name)
            return None

    def list_files(self, name: str) -> dict[str, int]:
        """Files below a directory of the run: path relative to that directory -> bytes."""
        base = self.path(name)
        with named(base, "listed"):
            if self.is_local:
                return files_below(base)
            self.filesystem.invalidate_cache()
            found = self.filesystem.find(base, detail=True)
        return {posixpath.relpath(path, base): int(info["size"]) for path, info in sorted(found.items())}

    def list_parquet(self, name: str) -> list[str]:
        """The Parquet files that lie in a directory of the run itself, not below it, by name."""
        return [file for file in self.list_files(name) if file.endswith(".parquet") and "/" not in file]

    def remove(self, name: str) -> None:
        """Removes a directory below the run directory, if it is there."""
        with contextlib.suppress(FileNotFoundError), named(self.path(name), "removed"):
            if self.is_local or not has_magic(self.path(name)):
                self.filesystem.rm(self.path(name), recursive=True)
                return
            # The clients of object stores would take the path for a pattern, and remove what else it fits.
            for file in self.list_files(name):
                self.filesystem.rm_file(self.path(name, file))

    def upload(self, local_directory: str, name: str) -> None:
        """Copies a local directory to `name` below the run directory."""
        for directory, _, files in os.walk(local_directory):
            for file in files:
                source = os.path.join(directory, file)
                target = self.path(name, os.path.relpath(source, local_directory).replace(os.sep, "/"))
                with named(target, "written"):
                    self._make_directory(posixpath.dirname(target))
                    self.filesystem.put_file(source, target)

    def take(self, local_directory: str, name: str) -> None:
        """Moves the files of a directory on the run's own disk to `name` below the run directory."""
        for file in files_below(local_directory):
            target = self.path(name, file)
            with named(target, "written"):
                os.makedirs(posixpath.dirname(target), exist_ok=True)
                os.replace(os.path.join(local_directory, file), target)

    def copy_stage(self, source: RunDirectory, stage: str) -> None:
        """Copies a finished stage of another run on the same filesystem, with its manifest last, unless it is here."""
        if self.is_finished(stage):
            return
        self.remove(stage)
        for name in source.list_files(stage):
            if name != MANIFEST:
                target = self.path(stage, name)
                with named(target, "written"):
                    self._make_directory(posixpath.dirname(target))
                    self.filesystem.cp_file(source.path(stage, name), target)
        self.write_text(f"{stage}/{MANIFEST}", str(source.read_text(f"{stage}/{MANIFEST}")))

    @contextlib.contextmanager
    def local_output(self, name: str) -> Iterator[str]:
        """A local directory whose content is `name` below the run directory once the block ends.

        On a local disk it is that directory itself; elsewhere a temporary one that is uploaded.
        """
        if self.is_local:
            yield self.path(name)
        else:
            with tempfile.TemporaryDirectory(prefix="mipo-ray-") as temporary:
                yield temporary
                self.upload(temporary, name)

    def model_path(self, name: str) -> str:
        """How `source.local_model_directory` names a model below the run directory: a local path or a URL."""
        return self.path(name) if self.is_local else f"{self.url.rstrip('/')}/{name}"

    def is_finished(self, stage: str) -> bool:
        """Whether a stage is finished; raises as `read_manifest` does."""
        return self.read_manifest(stage, kind_of(stage)) is not None

    def read_manifest(self, stage: str, kind: type[AnyFacts]) -> Manifest[AnyFacts] | None:
        """The manifest of a finished stage, with the facts of its kind; None while it is unfinished.

        Raises StorageError when the file there is no manifest of that kind, and when a file that the manifest lists is
        missing or of another size.
        """
        name, again = f"{stage}/{MANIFEST}", f"Remove {self.path(stage)} to run the stage again."
        try:
            text = self.read_text(name)
            manifest = None if text is None else read_manifest(kind, text, self.path(name))
        except StorageFault:  # nothing is damaged
            raise
        except UserError as error:
            raise StorageError(f"{error}. {again}") from None
        if manifest is None:
            return None
        present = self.list_files(stage)
        for file, size in manifest.files.items():
            if present.get(file) != size:
                found = "nothing" if file not in present else f"{present[file]} bytes"
                raise StorageError(
                    f"{self.path(stage, file)}: the finished stage {stage} is damaged: expected {size} bytes, found "
                    f"{found}. {again}"
                )
        return manifest

    def commit(self, stage: str, config: Config, work: Work[AnyFacts]) -> Manifest[AnyFacts]:
        """Writes the manifest that makes a stage finished: `work`, beside the seed, the config hash and the file list
        with sizes in bytes."""
        sizes, files = self.list_files(stage), work.files
        if files is None:  # without what a kill in the middle of a write left behind
            files = [name for name in sizes if name != MANIFEST and not name.endswith(WRITING)]
        manifest = Manifest(
            stage=stage,
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            seed=config.seed,
            config_hash=config_hash(config),
            round=work.round,
            seconds=work.seconds,
            facts=work.facts,
            files={name: sizes[name] for name in files},
        )
        self.write_text(f"{stage}/{MANIFEST}", manifest.to_text())
        return manifest

    def _make_directory(self, path: str) -> None:
        """Makes a directory, but no bucket: one that is gone must not be taken for a new one."""
        if not is_in_bucket(self.filesystem):
            self.filesystem.makedirs(path, exist_ok=True)

    def _check_bucket(self, name: str) -> None:
        """Raises StorageError where a file is not there since its bucket is not, which an answer without a body, as to
        a look at one file, does not tell apart."""
        if not is_in_bucket(self.filesystem):
            return
        try:
            self.filesystem.info(self.root.partition("/")[0])
        except Exception as error:  # the bucket itself may be nothing that one may ask for
            if is_bucket_gone(error):
                with named(self.path(name), "read"):
                    raise

    def check_writable(self) -> None:
        """Makes the directory; raises StorageError when it cannot be written or its disk is full."""
        probe = self.path(f"{PROBE}{secrets.token_hex(8)}")
        try:
            self._make_directory(self.root)
            if self.is_local:
                with new_file(probe) as file:
                    file.write(b"\0" * 4096)
            else:
                self.filesystem.pipe_file(probe, b"\0" * 4096)
            self.filesystem.rm_file(probe)
        except Exception as error:  # each backend has its own exceptions; all mean the same to the user
            with contextlib.suppress(Exception):
                self.filesystem.rm_file(probe)
            raise StorageError(
                f"{self.url}: cannot write to the run directory: {type(error).__name__}: {error}{advice_on(error)}"
            ) from None
        if self.is_local:
            self._check_disk(self.root)

    def check_place(self) -> None:
        """What `check_writable` tells that can be told without writing anything, as a dry run must not.

        Of an object store that is nothing.
        """
        if not self.is_local:
            return
        place, problem = where_to_make(self.root)
        if problem:
            raise StorageError(f"{self.url}: cannot write to the run directory: {place}: {problem}")
        self._check_disk(place)

    def _check_disk(self, place: str) -> None:
        if (free := shutil.disk_usage(place).free) < MINIMUM_FREE_BYTES:
            raise StorageError(
                f"{self.url}: the disk is full: expected at least {MINIMUM_FREE_BYTES:,} free bytes, found {free:,}"
            )


def open_run(url: str) -> RunDirectory:
    """The run directory at a local path or a URL.

    Raises StorageError when no filesystem serves the URL, for one with a secret, and for a name that cannot be read
    back.
    """
    if (secret := secret_in(url)) is not None:
        raise StorageError(f"run_dir {url}: found {secret}; credentials come from the environment of every node")
    if "://" not in url:
        url = os.path.abspath(os.path.expanduser(url))
        _check_name(url)
        return RunDirectory(url)
    try:
        open_path(url)
    except Exception as error:  # an unknown scheme, a client that is not installed, or one that cannot connect
        raise StorageError(f"{url}: no filesystem for this URL: {type(error).__name__}: {error}") from None
    run = RunDirectory(url)
    _check_name(run.root)
    return run


def _check_name(path: str) -> None:
    """Raises StorageError for a character that Ray Data, which takes every path for a URL, would lose."""
    for character in path:
        if character == "?" or not character.isprintable():
            raise StorageError(
                f"run_dir {brief(path)}: expected a name without question mark and control characters, found "
                f"{character!r}; Ray Data would not find what the run writes there"
            )
