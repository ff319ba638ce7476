"""Uploads a folder to the Hugging Face Hub.

Knows the Hub. Invariant: a repository that it creates is private unless the caller said otherwise, and whatever can
be known to fail fails in `check_push`, before the folder is made.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id

from qlora_cli.errors import MachineError
from qlora_cli.hub import hub_reachable

KEPT_HERE = ["*/.tmp-*", ".tmp-*"]


def check_push(repository: str) -> None:
    """Raises `MachineError` when `repository` is no Hub id, the Hub is out of reach, or nobody is logged in."""
    try:
        validate_repo_id(repository)
    except hub_errors.HFValidationError as error:
        raise MachineError(f"--push {repository}: not a Hub id: {error}", fix="name it as USER/NAME") from error
    if not hub_reachable():
        raise MachineError(
            f"--push {repository}: the Hub cannot be reached", fix="go online, or leave --push out and upload later"
        )
    try:
        huggingface_hub.HfApi().whoami()
    except (hub_errors.HfHubHTTPError, hub_errors.LocalTokenNotFoundError, OSError) as error:
        raise MachineError(
            f"--push {repository}: the Hub does not know who you are",
            why=_reason(error),
            fix="run `hf auth login`, or set HF_TOKEN",
        ) from error


def push(folder: Path, repository: str, public: bool) -> str:
    """Uploads the files of `folder` in one commit; returns the address. A repository that exists stays as visible."""
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=KEPT_HERE)
    except (hub_errors.HfHubHTTPError, OSError, ValueError) as error:
        raise MachineError(
            f"--push {repository}: the upload failed; {folder} is whole",
            why=_reason(error),
            fix=f"check that you may write there, then run `hf upload {repository} {folder}`",
        ) from error
    return str(address)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
