"""Encoded prompts on disk, by their contents, for the runs to come.

One safetensors file for each encoding, named by a digest of all that it depends on: the condition's texts, metadata and
the bytes of its files, the model's own fingerprint, and the arithmetic of this machine. So an entry is right for
whoever finds it, and several processes may read and write at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from branchtree.files.checksums import file_sha256
from branchtree.files.reading import user_path
from branchtree.plugins.protocols import FingerprintedEncodings, ModelAdapter
from branchtree.plugins.values import Condition

log = logging.getLogger("branchtree")

Encoding = Mapping[str, Tensor]
"""One condition's encoding: named tensors on the CPU, without an axis of prompts."""

USER = "user"
"""What ``run.embeddings`` says for the folder in the user's cache."""

FORMAT = "1"
ENTRY = re.compile(r"[0-9a-f]{64}")
"""How an entry is called: a file of another name is not the store's."""
_DIGEST = "branchtree_digest"


def open_store(folder: str | None, gibibytes: float, model: ModelAdapter, device: torch.device) -> EncodingStore | None:
    """The store that ``run.embeddings`` names, for a loaded model; None where there is none, or nothing may be kept."""
    if folder is None or not isinstance(model, FingerprintedEncodings):
        return None
    fingerprint = model.encoding_fingerprint()
    if fingerprint is None:
        return None
    root = user_folder() if folder == USER else user_path(folder)
    return EncodingStore(root, [FORMAT, fingerprint, *arithmetic(device)], int(gibibytes * 2**30))


def user_folder() -> Path:
    """``branchtree/embeddings`` in the user's cache folder, by the XDG rules."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "branchtree" / "embeddings"


def arithmetic(device: torch.device) -> list[str]:
    """Return what the last bits of a result depend on beside model and input."""
    if device.type == "cuda":
        matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        return [torch.__version__, torch.cuda.get_device_name(device), f"tf32 {matmul} {cudnn}"]
    return [torch.__version__, device.type, torch.backends.cpu.get_cpu_capability(), str(torch.get_num_threads())]


class EncodingStore:
    """A folder of encodings of at most ``limit`` bytes, from which the least recently used give way.

    ``context`` is what all of this run's entries depend on beside their conditions. A folder that cannot be written is
    logged once, and then only read.
    """

    def __init__(self, root: Path, context: list[str], limit: int) -> None:
        self._root = root
        self._context = context
        self._limit = limit
        self._bytes: int | None = None  # in the folder, as far as this process knows
        self._writable = True

    def read(self, condition: Condition) -> Encoding | None:
        """Return the condition's encoding, or None. A damaged entry is logged and removed, and counts as none."""
        try:
            path = self.path(condition)
            content = path.read_bytes()
        except OSError:
            return None
        row = _unpacked(content, path.stem)
        if row is None:
            log.warning("%s: this encoded prompt is damaged; it is encoded again", path)
            path.unlink(missing_ok=True)
            return None
        try:
            os.utime(path)  # used now
        except OSError:
            log.debug("%s: the time of use cannot be set", path)
        return row

    def write(self, condition: Condition, row: Encoding) -> None:
        """Keep an encoding, whole or not at all."""
        if not self._writable:
            return
        try:
            path = self.path(condition)
            content = _packed(row, path.stem)
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, content)
            self._bytes = self._size() if self._bytes is None else self._bytes + len(content)
            if self._bytes > self._limit:
                self._bytes = self._evict()
        except OSError as error:
            self._writable = False
            log.warning("%s: encoded prompts cannot be kept here: %s", self._root, error.strerror or error)

    def path(self, condition: Condition) -> Path:
        """Return where a condition's encoding lies. Raises OSError if one of its files cannot be read."""
        described = [
            self._context,
            condition.prompt,
            condition.negative_prompt,
            [None if file is None else file_sha256(file) for file in condition.files],
            *([condition.metadata_text] if condition.metadata else []),
        ]
        name = hashlib.sha256(json.dumps(described).encode()).hexdigest()
        return self._root / name[:2] / f"{name}.safetensors"

    def _entries(self) -> list[tuple[float, int, Path]]:
        """Time of use, bytes and path of each entry; another process may remove some meanwhile."""
        found = []
        for path in self._root.glob("??/*.safetensors"):
            if not ENTRY.fullmatch(path.stem) or path.stem[:2] != path.parent.name:
                continue  # somebody else's
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime, status.st_size, path))
        return found

    def _size(self) -> int:
        return sum(size for _, size, _ in self._entries())

    def _evict(self) -> int:
        """Remove the entries used longest ago, down to nine tenths of the limit; returns the bytes that stay."""
        entries = sorted(self._entries())
        left = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if left <= 0.9 * self._limit:
                break
            path.unlink(missing_ok=True)
            left -= size
        return left


def _replace(path: Path, content: bytes) -> None:
    """Write a whole file under a name of its own, then rename it: whoever does so last is right too."""
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _packed(row: Encoding, key: str) -> bytes:
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in row.items()}
    content: bytes = save(tensors, {_DIGEST: _digest(tensors, key)})
    return content


def _unpacked(content: bytes, key: str) -> Encoding | None:
    """The tensors of a file's contents; None unless all of them are what was written under that key."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        length = int.from_bytes(content[:8], "little")
        noted = json.loads(content[8 : 8 + length])["__metadata__"][_DIGEST]
        tensors = {name: value.clone() for name, value in load(content).items()}
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None
    return tensors if _digest(tensors, key) == noted else None


def _digest(tensors: Encoding, key: str) -> str:
    digest = hashlib.sha256(key.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
