"""Where a reward's files come from: a hub id, a local folder, a local file, or a small random checkpoint.

`random:small` stands for a tiny checkpoint in the published file layout, which the reward's own builder writes to a
temporary folder and which then takes the same way through the loader as the published one. It scores nonsense; it is
there to try a recipe, and the library, without downloads.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from branchtree.errors import RewardError, nearest
from branchtree.files.checksums import file_sha256, verify_checksums

RANDOM_SMALL = "random:small"


@dataclass(frozen=True)
class WeightsSource:
    """Files by name, of one folder or one hub repository."""

    name: str
    folder: Path | None  # None: the hub
    only: Path | None = None  # the one file that was given instead of a folder
    revision: str | None = None

    @property
    def location(self) -> str:
        """What ``from_pretrained`` is given."""
        return self.name if self.folder is None else str(self.folder)

    def find(self, *names: str) -> Path:
        """The first of ``names`` that is there, downloaded if need be; a file that was given stands for any name.

        Raises RewardError that says what was looked for.
        """
        found = self.only or self.maybe(*names)
        if found is None:
            looked = " or ".join(f"'{name}'" for name in names)
            have = [path.name for path in self.folder.iterdir()] if self.folder else []
            raise RewardError(f"'{self.name}' holds no {looked}{nearest(names[0], have) if have else ''}")
        return found

    def maybe(self, *names: str) -> Path | None:
        """The first of ``names`` that is there, or None. Raises RewardError if the hub cannot be asked."""
        if self.folder is None:
            return next((file for name in names if (file := self._download(name))), None)
        return next((self.folder / name for name in names if (self.folder / name).is_file()), None)

    def _download(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, name, revision=self.revision))
        except LocalEntryNotFoundError as error:
            raise _unreachable(self.name, error) from error
        except EntryNotFoundError:
            return None
        except Exception as error:  # the hub's client has many exceptions for one matter: it could not be had
            raise _unreachable(self.name, error) from error


def _unreachable(name: str, error: Exception) -> RewardError:
    reason = " ".join(str(error).split())[:300]
    return RewardError(
        f"cannot get files of '{name}' from the hub ({type(error).__name__}: {reason}); check the id, the network and, "
        "for gated files, that you are logged in; or download them and give their folder as 'path'"
    )


def locate_weights(path: str, revision: str | None, write_small: Callable[[Path], None]) -> WeightsSource:
    """Tell a hub id, a folder, a file and ``random:small`` apart; ``write_small`` fills a folder for the last.

    That folder is removed when the process ends.

    A path that exists or begins with ``/``, ``./``, ``../`` or ``~`` is local. Raises RewardError for a missing one,
    for a revision of something that is not on the hub, for a folder whose files differ from its SHA256SUMS, and for
    anything else.
    """
    local = Path(os.path.expanduser(path))  # which leaves an unknown "~user" as it is
    if revision is not None and (path == RANDOM_SMALL or os.path.exists(local)):
        raise RewardError(f"revision '{revision}' belongs to a hub id, and '{path}' is none; remove it")
    if path == RANDOM_SMALL:
        folder = Path(tempfile.mkdtemp(prefix="branchtree-small-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)  # a fingerprint reads the files long after loading
        write_small(folder)
        return WeightsSource(path, folder)
    if path and os.path.isdir(local):
        verify_checksums(local, RewardError)
        return WeightsSource(path, local)
    if os.path.isfile(local):
        return WeightsSource(path, local.parent, only=local)
    if path.startswith(("/", "./", "../", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise RewardError(
            f"path '{path}' is no existing file or folder and no hub id; give a folder, a weights file, a hub id such "
            f"as 'org/name', or '{RANDOM_SMALL}'"
        )
    return WeightsSource(path, None, revision=revision)


def verify(files: Mapping[str, Path], pin: str | Mapping[str, str] | None) -> None:
    """Compare weight files, by name, with pinned digests. Raises RewardError naming the file that differs.

    A single digest pins a checkpoint of one file.
    """
    if pin is None:
        return
    if isinstance(pin, str):
        if len(files) != 1:
            raise RewardError(
                f"sha256 is one digest, but the weights are in {', '.join(files)}; give one for each name"
            )
        pin = dict.fromkeys(files, pin)
    for name, wanted in pin.items():
        if name not in files:
            raise RewardError(f"sha256 names '{name}', which is no weights file here{nearest(name, files)}")
        found = file_sha256(files[name])
        if found != wanted.lower():
            raise RewardError(f"'{files[name]}' has sha256 {found}, not the pinned {wanted}; it is another checkpoint")
