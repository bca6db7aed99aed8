"""A model's name on the Hugging Face Hub → the directory its files were downloaded to."""

import errno
import os
import re
from pathlib import Path

from unisd_jax.errors import UserError

# One repository, at its newest revision or at the branch, tag or commit after the "@".
HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Some repositories hold their weights a second time, in their makers' own format.
NOT_NEEDED = ["*/*", "consolidated*"]
ELSEWHERE = "or download it elsewhere and give the directory"


def local_checkpoint(name: str) -> Path:
    """The directory `name`, or the local copy of the hub's `organisation/model[@revision]`, downloaded if need be.

    Raises:
      UserError: neither of the two, or the hub does not hand it out; the message says what to do.
    """
    if Path(name).is_dir():
        return Path(name)
    hub_id = HUB_ID.fullmatch(name)
    if hub_id is None or Path(name).exists():
        raise UserError(
            f"model.path: {name} is not a directory, nor a Hugging Face Hub id such as Qwen/Qwen2.5-0.5B-Instruct"
        )
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            hub_id["repository"], revision=hub_id["revision"], allow_patterns=NEEDED, ignore_patterns=NOT_NEEDED
        )
    except Exception as error:  # the hub's errors, the file system's and the HTTP client's have no parent in common
        raise UserError(f"model.path: {name} is not a directory here, and {_reason(hub_id, error)}") from None
    return Path(found)


def _reason(hub_id: re.Match, error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "the Hugging Face Hub gives it only to accepted users: accept its terms there and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hugging Face Hub has no such public model: correct the name, or set HF_TOKEN if it is private"
    if isinstance(error, RevisionNotFoundError):
        return f"the Hugging Face Hub has no revision {hub_id['revision']!r} of it"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError):
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
            return f"HF_HUB_OFFLINE forbids to download it: unset that, {ELSEWHERE}"
        return f"the Hugging Face Hub cannot be reached: connect, {ELSEWHERE}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "there is no room to download it: free some, or set HF_HOME to a larger disk"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"downloading it from the Hugging Face Hub failed ({text}): try again, {ELSEWHERE}"
