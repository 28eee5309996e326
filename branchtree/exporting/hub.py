"""A trained model on the hub: its folder ``final/`` with the model card, and files of other formats beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from branchtree.errors import BranchTreeError, OutputError, reason_of
from branchtree.exporting.lora import finished_model
from branchtree.files.checksums import MANIFEST
from branchtree.run.directory import RunDirectory


def push_run(run: Path, repository: str, files: Sequence[Path], private: bool) -> str:
    """Upload a run's model to a repository of the hub, which is made if there is none, and return its address.

    Args:
        run: The run's directory.
        repository: ``ORG/NAME``.
        files: Files to put beside what ``final/`` holds.
        private: Whether only its owner may see it; one that is public already is refused.

    Raises:
        OutputError: The hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    final = finished_model(RunDirectory(run))
    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        if private and not hub.model_info(repository).private:
            raise OutputError(f"{repository}: is public on the hub already; leave out --private, or name another")
        hub.upload_folder(
            repo_id=repository,
            folder_path=final,
            ignore_patterns=[MANIFEST],
            commit_message=f"Upload {run.name}, trained with branchtree",
        )
        for file in files:
            hub.upload_file(path_or_fileobj=file, path_in_repo=file.name, repo_id=repository)
    except BranchTreeError:
        raise
    except Exception as error:  # whose class depends on the hub client's version, and on its HTTP library
        raise OutputError(
            f"{repository}: the hub does not take the model: {reason_of(error)}; log in with 'hf auth login' as "
            "somebody who may write there, and check the name, which is ORG/NAME"
        ) from error
    return str(address)
