"""Lists of digests in a folder: ``SHA256SUMS`` as sha256sum writes it, or the ``manifest.json`` of a run.

A flipped bit in weights can be detected only by such a list.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from branchtree.errors import BranchTreeError, shown
from branchtree.files.json_lines import parse_json
from branchtree.files.reading import failure_reason, read_text

SUMS, MANIFEST = "SHA256SUMS", "manifest.json"
CARD = "README.md"
"""A model's card is not compared: no model is read from it, and a person may edit it."""
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


def verify_checksums(folder: Path, kind: type[BranchTreeError], read: Collection[str] | None = None) -> None:
    """Compare the files of ``folder``, but its card, with the digests listed in it; without a list nothing is compared.

    Args:
        folder: A folder with ``SHA256SUMS``, or with the ``manifest.json`` that a run writes.
        kind: The error to raise.
        read: Files and folders, relative to ``folder``, that are compared; all by default.

    Raises:
        kind: A listed file is missing or its content differs, or the list itself cannot be used.
    """
    listing = folder / SUMS if (folder / SUMS).is_file() else folder / MANIFEST
    if not listing.is_file():
        return
    text = read_text(listing, kind)
    digests = _from_sums(listing, text, kind) if listing.name == SUMS else _from_manifest(listing, text, kind)
    for name, wanted in digests.items():
        if name == CARD:
            continue
        if read is not None and not any(PurePosixPath(name).is_relative_to(one) for one in read):
            continue
        file = folder / name
        try:
            found = file_sha256(file)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            reason = "is missing" if missing else f"cannot be read: {failure_reason(error)}"
            raise kind(f"{file}: {reason}, and {listing.name} lists it; complete the folder") from None
        if found != wanted:
            raise kind(
                f"{file}: is damaged or was changed: its SHA-256 is {found[:12]}..., and {listing.name} says "
                f"{wanted[:12]}...; get the file again, or, if the change was meant, correct {listing}"
            )


def write_checksums(folder: Path) -> None:
    """Write the ``SHA256SUMS`` of all files below ``folder``, in the order of their paths."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)
    lines = [f"{file_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits. Raises OSError."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _from_sums(listing: Path, text: str, kind: type[BranchTreeError]) -> Mapping[str, str]:
    digests: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise kind(
                f"{listing}:{number}: {shown(line)} is no digest of 64 digits, two spaces and a path; the list is "
                "damaged: write it again with sha256sum, or remove it"
            )
        name = _inside(match[2])
        if name is None:
            raise kind(f"{listing}:{number}: {shown(match[2])} is no path inside the folder; write relative paths")
        if name != SUMS:  # a list made of all files contains itself, unfinished
            digests[name] = match[1].lower()
    if not digests:
        raise kind(f"{listing}: lists no file; write it again with sha256sum, or remove it")
    return digests


def _from_manifest(listing: Path, text: str, kind: type[BranchTreeError]) -> Mapping[str, str]:
    """Return the digests of a run's manifest; none if the file of that name is something else."""
    content = parse_json(text, str(listing), kind)
    try:
        digests = {str(name): str(entry["sha256"]) for name, entry in content["files"].items()}
    except (KeyError, TypeError, AttributeError):
        return {}
    return {name: digest for name, digest in digests.items() if _inside(name) == name}


def _inside(name: str) -> str | None:
    """Return a relative path in its plain form, or None if it leads out of the folder."""
    path = PurePosixPath(name)
    return None if path.is_absolute() or ".." in path.parts or not path.parts else path.as_posix()
