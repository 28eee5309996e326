"""Sources of a reward's files: a hub id, a local folder, a local file, or a small random checkpoint.

`random:small` stands for a tiny checkpoint in the published file layout, which the reward's own builder writes to a
temporary folder and which then takes the same way through the loader as the published one. It scores nonsense; it is
there to try a recipe, and the library, without downloads.
"""

import atexit
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePath
from typing import Any

from branchtree.errors import RewardError, nearest
from branchtree.files.checksums import file_sha256, verify_checksums
from branchtree.files.names import has_hub_form
from branchtree.files.reading import user_path

RANDOM_SMALL = "random:small"


def bundled_text(name: str) -> str:
    """Return the content of a text file in the package's `data` folder, its line ends as they are."""
    return resources.files("branchtree_rewards").joinpath("data", name).read_bytes().decode("utf-8")


def bundled_json(name: str) -> Any:
    """Return the content of a JSON file in the package's `data` folder."""
    return json.loads(bundled_text(name))


def cause(error: Exception) -> str:
    """Return the kind of an error that a library raised, and its message on one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


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
        """Return the first of ``names`` that is there, downloaded if need be; a file given alone stands for any name.

        Raises RewardError that says what was looked for, if none is there.
        """
        found = self.only or self.maybe(*names)
        if found is None:
            looked = " or ".join(f"'{name}'" for name in names)
            have = [path.name for path in self.folder.iterdir()] if self.folder else []
            raise RewardError(f"'{self.name}' holds no {looked}{nearest(names[0], have) if have else ''}")
        return found

    def maybe(self, *names: str) -> Path | None:
        """Return the first of ``names`` that is there, or None. Raises RewardError if the hub cannot be asked."""
        if self.folder is None:
            return next((file for name in names if (file := self._download(name))), None)
        return next((self.folder / name for name in names if (self.folder / name).is_file()), None)

    def _download(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, name, revision=self.revision))
        except Exception as error:  # the hub's client has many exceptions for one matter: it could not be had
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return None
            raise RewardError(
                f"cannot get files of '{self.name}' from the hub ({cause(error)}); check the id, the network and, for "
                "gated files, that you are logged in; or download them and give their folder as 'path'"
            ) from error


def locate_weights(path: str, revision: str | None, write_small: Callable[[Path], None]) -> WeightsSource:
    """Tell a hub id, a folder, a file and ``random:small`` apart.

    Args:
        path: What a setting names. One that exists or begins with ``/``, ``./``, ``../`` or ``~`` is local.
        revision: Branch, tag or commit of a hub id.
        write_small: Fills a folder for ``random:small``, which is removed when the process ends.

    Raises:
        RewardError: a local path is missing, a revision is given of something that is not on the hub, a folder's files
            differ from its SHA256SUMS, or ``path`` is nothing of these.
    """
    local = user_path(path)
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
    if path.startswith(("/", "./", "../", "~")) or not has_hub_form(path):
        raise RewardError(
            f"path '{path}' is no existing file or folder and no hub id; give a folder, a weights file, a hub id such "
            f"as 'org/name', or '{RANDOM_SMALL}'"
        )
    return WeightsSource(path, None, revision=revision)


def locate_local(path: str, revision: str | None, write_small: Callable[[Path], None], advice: str) -> WeightsSource:
    """Do as `locate_weights` for weights that are not on the hub; ``advice`` says where to download them."""
    if path != RANDOM_SMALL and not os.path.exists(user_path(path)):
        raise RewardError(f"'{path}' is no existing file or folder; {advice}, or '{RANDOM_SMALL}'")
    return locate_weights(path, revision, write_small)


def file_at_hand(path: str, revision: str | None, name: str) -> Path | None:
    """Return a file of a local folder, beside a local file, or of a hub id in the local cache; None if not there."""
    local = user_path(path)
    if local.exists():
        file = (local if local.is_dir() else local.parent) / name
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, name, revision=revision)
    except HFValidationError:  # it is a path, of nothing that exists
        return None
    return Path(cached) if isinstance(cached, str) else None


def verify(files: Mapping[str, Path], pin: str | Mapping[str, str] | None) -> None:
    """Compare weight files, by name, with pinned digests by name, or the single one of a checkpoint of one file.

    Raises RewardError that names a file that differs.
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


def refuse_name(path: str, other: str, wanted: str) -> None:
    """Refuse weights whose name says that they are another version, where shapes do not tell.

    Args:
        path: A path or hub id, whose last word is looked at.
        other: A regular expression of names of other versions, in small letters.
        wanted: What the settings ask for, and what to change.

    Raises:
        RewardError: the name matches ``other``.
    """
    if found := re.search(other, PurePath(path).name.lower()):
        raise RewardError(f"'{path}' says by its name that it is another version ('{found[0]}'): {wanted}")


def refuse_file(source: WeightsSource, other: str, wanted: str) -> None:
    """Do as `refuse_name` for a file that was given alone; in a folder the right file is found by its whole name."""
    if source.only is not None:
        refuse_name(source.only.name, other, wanted)
