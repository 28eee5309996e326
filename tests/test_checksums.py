"""Folders that bring their digests along: a flipped bit is found, and the list itself may be wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from branchtree.errors import ModelError, RewardError
from branchtree.files.checksums import MANIFEST, SUMS, verify_checksums, write_checksums
from branchtree.run.manifest import write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/weights").write_bytes(bytes(range(256)))
    (tmp_path / "config").write_text("text")
    (tmp_path / "README.md").write_text("a card")
    return tmp_path


def flip(file: Path, position: int = 7) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(bytes(content))


def test_what_is_written_is_what_sha256sum_writes_and_checks(folder: Path) -> None:
    write_checksums(folder)
    verify_checksums(folder, ModelError)
    command = shutil.which("sha256sum")
    if command is None:
        pytest.skip("sha256sum is not installed")
    names = ["README.md", "config", "vae/weights"]
    written = subprocess.run([command, *names], cwd=folder, check=True, capture_output=True).stdout
    assert (folder / SUMS).read_bytes() == written
    subprocess.run([command, "--check", "--strict", SUMS], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize("list_files", [write_checksums, write_manifest])
def test_a_flipped_bit_and_a_missing_file_are_refused_by_name(folder: Path, list_files: object) -> None:
    assert callable(list_files)
    list_files(folder)
    verify_checksums(folder, RewardError)
    flip(folder / "vae/weights")
    with pytest.raises(RewardError, match=r"vae/weights: is damaged or was changed"):
        verify_checksums(folder, RewardError)
    verify_checksums(folder, RewardError, read=["config"])
    (folder / "vae/weights").unlink()
    with pytest.raises(ModelError, match=r"vae/weights: is missing"):
        verify_checksums(folder, ModelError, read=["vae"])


@pytest.mark.parametrize("list_files", [write_checksums, write_manifest])
def test_a_card_may_be_edited(folder: Path, list_files: Callable[[Path], None]) -> None:
    list_files(folder)
    flip(folder / "README.md", 0)
    verify_checksums(folder, ModelError)


def test_lists_of_other_hands_are_understood(folder: Path) -> None:
    write_checksums(folder)
    _, digest, other = (line.split()[0] for line in (folder / SUMS).read_text().splitlines())
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    text = f"\ufeff{digest.upper()} *./config\r\n\r\n{other}  ./vae/weights\r\n{empty}  ./{SUMS}\r\n"
    (folder / SUMS).write_bytes(text.encode())
    verify_checksums(folder, ModelError)
    flip(folder / "config", 0)
    with pytest.raises(ModelError, match="config"):
        verify_checksums(folder, ModelError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lists no file"),
        (b"\0" * 80, "NUL"),
        (b"12ab  vae/weights\n", r"SHA256SUMS:1: '12ab  vae/weights' is no digest"),
        (b"\n" + b"0" * 64 + b"  ../outside\n", r"SHA256SUMS:2: '../outside' is no path inside"),
        (b"0" * 64 + b"  /etc/hostname\n", "is no path inside"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / SUMS).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        verify_checksums(folder, ModelError)


def test_a_folder_without_a_list_and_another_manifest_are_let_through(folder: Path) -> None:
    verify_checksums(folder, ModelError)
    for content in ([], {"files": ["a"]}, {"name": "an app", "files": {"a": 1}}):
        (folder / MANIFEST).write_text(json.dumps(content))
        verify_checksums(folder, ModelError)
    (folder / MANIFEST).write_text('{"format": 1, "fil')
    with pytest.raises(ModelError, match=r"manifest.json: not valid JSON"):
        verify_checksums(folder, ModelError)
