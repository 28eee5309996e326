"""What a run wrote into its folder, so that nothing else in it is ever deleted or replaced.

A process remembers the files and folders that it made, and takes back just those if it fails before anything is
learnt. Whole folders, which later processes of the run replace or delete, are recorded in ``.branchtree.json`` by the
digest of their manifest, which names every file in them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from branchtree.errors import CheckpointError, OutputError
from branchtree.files.checksums import MANIFEST
from branchtree.files.writing import synchronise, write_atomically
from branchtree.run.lock import LOCK
from branchtree.run.manifest import extended_manifest, first_foreign, remove_listed, require_digest, write_manifest

log = logging.getLogger("branchtree")

LEDGER = ".branchtree.json"
FORMAT = 1
TEMPORARY = re.compile(r"([\w-]+/)?\.[^/]+\.[0-9a-f]{8}\.(partial|old)")
"""What a folder is called while it is filled or deleted."""

Identity = tuple[int, ...]
"""A file's number, size and time of change: the same only while nobody else changes it. None stands for a folder."""


class Ledger:
    """The record of one folder. Several threads may use it, but only one process at a time."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.RLock()
        self._files: dict[Path, Identity] = {}  # made by this process
        self._made: set[Path] = set()  # folders made by this process
        self._recorded: dict[str, list[str]] | None = None  # digests of manifests, by folder; None: not read
        self._temporary: set[str] = set()  # folders that are being filled or deleted

    @property
    def exists(self) -> bool:
        """Return whether a run has claimed the folder."""
        return (self._root / LEDGER).is_file()

    def make(self, folder: Path) -> None:
        """Make a folder and those above it. Raises OSError."""
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made.update(missing)

    @contextmanager
    def noting(self, path: Path, growing: bool = False) -> Iterator[None]:
        """A block in which files and folders that appear at ``path`` or below it are this process's own.

        ``growing`` files are still written to after the block.
        """
        before = _identities(path)
        try:
            yield
        finally:
            for found, identity in _identities(path).items():
                own = found not in before or self._files.get(found) == before[found]
                if identity is None and found not in before:
                    self._made.add(found)
                elif identity is not None and own:
                    self._files[found] = identity[:1] if growing else identity

    def take_back(self) -> None:
        """Delete the files that this process made, unless they were changed since, and its folders once empty."""
        own = self._files.pop(self._root / LEDGER, None)
        for path, identity in self._files.items():
            with suppress(OSError):
                if _identity(path)[: len(identity)] == identity:
                    path.unlink()
        self._files.clear()
        self.remove_empty()
        left = {path.name for path in self._root.iterdir()} if self._root.is_dir() else set()
        if own is not None and left <= {LEDGER, LOCK}:
            (self._root / LEDGER).unlink(missing_ok=True)

    def remove_empty(self) -> None:
        """Delete the folders that this process made, as far as they are empty."""
        for folder in sorted(self._made, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):
                folder.rmdir()

    def open(self, adopted: Callable[[], list[Path]] = list) -> None:
        """Read the record, or begin it, and delete the unfinished folders that an earlier process left. Raises OSError.

        ``adopted`` gives the folders to record where a run of an earlier version kept no record.
        """
        if not self.exists:
            self._recorded = {self._name(folder): [require_digest(folder / MANIFEST)] for folder in adopted()}
        known = self._known()
        for name in self._temporary:
            shutil.rmtree(self._root / name, ignore_errors=True)
        self._temporary.clear()
        with self.noting(self._root / LEDGER):
            self._save(known)

    def _known(self) -> dict[str, list[str]]:
        """The record, which is read once."""
        if self._recorded is not None:
            return self._recorded
        self._recorded, path = {}, self._root / LEDGER
        if not self.exists:
            return self._recorded
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known = {str(name): list(map(str, digests)) for name, digests in content["folders"].items()}
            self._temporary |= {name for name in map(str, content["temporary"]) if TEMPORARY.fullmatch(name)}
            self._recorded = known
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("%s: cannot be read (%s): folders that it named are left as they are from now on", path, error)
        return self._recorded

    def owns(self, folder: Path) -> bool:
        """Return whether this run wrote a folder of that name."""
        return self._name(folder) in self._known()

    def require_own(self, folder: Path) -> None:
        """Raises OutputError if a folder holds anything that this run did not write, naming the first such file."""
        if not folder.exists() and not folder.is_symlink():
            return
        foreign = first_foreign(folder, self._known().get(self._name(folder), []))
        if foreign is not None:
            raise OutputError(
                f"{foreign}: was not written by this run, or was changed since, and a run replaces only what it "
                f"wrote; move it out of {folder if foreign != folder else folder.parent}"
            )

    def write_folder(self, path: Path, fill: Callable[[Path], None]) -> None:
        """Fill a folder under a temporary name, with a manifest, and rename it; one of that name gives way to it.

        Raises OutputError if that one holds anything that this run did not write, and what ``fill`` raises.
        """
        temporary, before = (path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{end}") for end in ("partial", "old"))
        names = {self._name(temporary), self._name(before)}
        with self._changing():
            self._temporary |= names
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
            write_manifest(temporary)
            synchronise([temporary, *temporary.rglob("*")])
            self.require_own(path)
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            self._forget(names)
            raise
        written = require_digest(temporary / MANIFEST)
        with self._changing() as known:
            known.setdefault(self._name(path), []).append(written)
        if path.exists():
            path.rename(before)
        temporary.replace(path)
        synchronise([path.parent])
        shutil.rmtree(before, ignore_errors=True)
        with self._changing() as known:
            known[self._name(path)] = [written]
            self._temporary -= names

    def add_files(self, folder: Path, files: Mapping[str, bytes]) -> None:
        """Put files into a recorded folder, or in place of those of the same names that the run put there.

        Raises OutputError if the folder holds anything that this run did not write.
        """
        self.require_own(folder)
        manifest = extended_manifest(folder, files)
        written = hashlib.sha256(manifest).hexdigest()
        with self._changing() as known:  # before the files: what is under way is the run's own too
            known[self._name(folder)] = [*known.get(self._name(folder), []), written]
        for name, content in {MANIFEST: manifest, **files}.items():
            write_atomically(folder / name, content)
        with self._changing() as known:
            known[self._name(folder)] = [written]

    def remove_folder(self, folder: Path) -> None:
        """Delete the files of a recorded folder that are as they were written, and with the last of them the folder."""
        try:
            remove_listed(folder, self._known().get(self._name(folder), []))
        except CheckpointError as error:
            log.warning("%s is left where it is: %s", folder, error)
        if not folder.exists():
            with self._changing() as known:
                known.pop(self._name(folder), None)

    def rename(self, folder: Path, target: Path) -> None:
        """Give a folder another name, under which it is no longer the run's to delete."""
        folder.rename(target)
        with self._changing() as known:
            known.pop(self._name(folder), None)

    def _forget(self, names: set[str]) -> None:
        with suppress(OSError), self._changing():  # where nothing can be written, this cannot either
            self._temporary -= names

    @contextmanager
    def _changing(self) -> Iterator[dict[str, list[str]]]:
        """A block that changes the record, which is written after it."""
        with self._lock:
            known = self._known()
            yield known
            self._save(known)

    def _save(self, known: Mapping[str, list[str]]) -> None:
        record = {"format": FORMAT, "folders": known, "temporary": sorted(self._temporary)}
        write_atomically(self._root / LEDGER, json.dumps(record, indent=1).encode())

    def _name(self, folder: Path) -> str:
        return folder.relative_to(self._root).as_posix()


def _identity(path: Path) -> Identity:
    status = path.lstat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _identities(path: Path) -> Mapping[Path, Identity | None]:
    """The identity of every file at a path or below it, and None for every folder."""
    found: dict[Path, Identity | None] = {}
    for entry in [path, *path.rglob("*")]:
        with suppress(OSError):
            found[entry] = None if entry.is_dir() and not entry.is_symlink() else _identity(entry)
    return found
