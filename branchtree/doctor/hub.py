"""The hub: whether it answers, who is logged in, and how much of a repository is still to be downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchtree.doctor.check import Check
from branchtree.errors import reason_of, shortened
from branchtree.files.names import has_hub_form
from branchtree.files.reading import user_path

TIMEOUT = 4.0
"""Seconds that the hub has to answer."""
LOG_IN = "log in with 'hf auth login', by a token of huggingface.co/settings/tokens"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
VARIANT = re.compile(r"\.(fp16|bf16|ema|non_ema)[.-]|flax|onnx|openvino", re.IGNORECASE)
GB = 1e9


@dataclass(frozen=True)
class Hub:
    """What is known of the hub."""

    answers: bool
    offline: bool  # by HF_HUB_OFFLINE
    logged_in: bool
    reason: str = ""  # why it does not answer


@dataclass(frozen=True)
class Repository:
    """A repository that a recipe reads."""

    name: str
    size: int  # bytes that the recipe reads
    cached: int  # bytes in the local cache
    gated: bool = False
    open_to_us: bool = True  # whether its files may be downloaded; of a gated one, with who is logged in
    licence: str | None = None  # by its card; None where the hub was not asked

    @property
    def missing(self) -> int:
        """Bytes that are still to be downloaded."""
        return max(0, self.size - self.cached)


def ask_hub() -> Hub:
    """Ask whether the hub answers, and whether it knows the token. Takes some seconds at most."""
    from huggingface_hub import constants, get_session, get_token

    if constants.HF_HUB_OFFLINE:
        return Hub(answers=False, offline=True, logged_in=get_token() is not None)
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # the client has many exceptions for one matter
        return Hub(answers=False, offline=False, logged_in=get_token() is not None, reason=reason_of(error))
    return Hub(answers=True, offline=False, logged_in=get_token() is not None and _is_known())


def _is_known() -> bool:
    """Return whether the hub knows the token."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().whoami()
    except HfHubHTTPError:
        return False
    return True


def check_hub(hub: Hub) -> Iterator[Check]:
    """Say whether the hub can be used, and by whom."""
    from huggingface_hub import constants, get_token

    if hub.offline:
        remedy = "unset HF_HUB_OFFLINE to download; what is in the cache is used all the same"
        yield Check("hub", "warn", "HF_HUB_OFFLINE is set: nothing is downloaded", remedy)
        return
    if not hub.answers:
        text = f"{constants.ENDPOINT} does not answer within {TIMEOUT:.0f} s ({shortened(hub.reason)})"
        remedy = "check the network, HTTPS_PROXY and HF_ENDPOINT; with all files in the cache, set HF_HUB_OFFLINE=1"
        yield Check("hub", "warn", text, remedy)
        return
    if get_token() is not None and not hub.logged_in:
        yield Check("hub", "fail", f"{constants.ENDPOINT} does not know the token that is set", LOG_IN)
        return
    who = "logged in" if hub.logged_in else "not logged in, which gated models alone need"
    yield Check("hub", "ok", f"{constants.ENDPOINT} answers; {who}")


def is_hub_id(path: object) -> bool:
    """Return whether a setting names a repository of the hub, not a folder or file that exists here."""
    return isinstance(path, str) and has_hub_form(path) and not os.path.exists(user_path(path))


def look_up(hub: Hub, name: str, revision: str | None, estimate: int, whole: bool) -> Repository:
    """Return what is known of a repository, by the hub where it answers.

    Args:
        hub: What is known of the hub.
        name: The repository's id.
        revision: A branch, tag or commit of it.
        estimate: Bytes that a recipe reads, as far as is known here.
        whole: Whether all components of a pipeline are read; else the estimate is kept.
    """
    cached = cached_bytes(name)
    if not hub.answers:
        return Repository(name, estimate, cached)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = HfApi().model_info(name, revision=revision, files_metadata=whole, timeout=TIMEOUT)
    except RepositoryNotFoundError:
        return Repository(name, estimate, cached, open_to_us=False)
    except Exception:  # the hub answered before, and is asked again when the run starts
        return Repository(name, estimate, cached)
    size = sum(file.size or 0 for file in found.siblings or () if _is_read(file.rfilename)) if whole else 0
    card: Any = found.card_data
    licence = None if card is None else card.get("license_name") or card.get("license")
    gated = bool(found.gated)
    return Repository(name, size or estimate, cached, gated, not gated or _may_read(name), licence)


def _may_read(name: str) -> bool:
    """Return whether who is logged in may download a gated repository's files."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError

    try:
        HfApi().auth_check(name)
    except GatedRepoError:
        return False
    return True


def _is_read(file: str) -> bool:
    """Return whether loading a pipeline reads a file: those in components' folders, weights as safetensors alone."""
    if file.endswith(WEIGHTS):
        return "/" in file and file.endswith(".safetensors") and not VARIANT.search(file)
    return file.endswith((".json", ".txt", ".model"))


def cached_bytes(name: str) -> int:
    """Return the bytes of a repository that the local cache holds."""
    folder = cache_folder() / f"models--{name.replace('/', '--')}" / "blobs"
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) if folder.is_dir() else 0


def cache_folder() -> Path:
    """Return the folder that the hub's client downloads to."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def check_repository(hub: Hub, repository: Repository) -> Check:
    """Say how much of a repository is still to be downloaded, and whether it can be."""
    text = f"{repository.name}: {repository.cached / GB:.1f} of about {repository.size / GB:.1f} GB are in the cache"
    if repository.licence:
        text += f"; licence {shortened(str(repository.licence))}"
    if not repository.open_to_us:
        if not repository.gated:
            return Check("downloads", "fail", f"{text}, and the hub shows no such repository", LOG_IN)
        page = f"accept its licence on huggingface.co/{repository.name}"
        return Check("downloads", "fail", f"{text}, and it is gated", f"{page}, and {LOG_IN}")
    if repository.missing and not hub.answers:
        remedy = "download it where there is a network, and give its folder as 'path' or copy the cache"
        return Check("downloads", "warn", f"{text}, and the hub cannot be asked for the others", remedy)
    forbids = "non-commercial" in str(repository.licence).lower()
    return Check("downloads", "warn" if forbids else "ok", text, "do not use it commercially" if forbids else "")
