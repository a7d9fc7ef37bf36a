"""Uploading an exported folder to the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError

from qmemtune.config.export import ExportConfig
from qmemtune.errors import RunFailed


def push(folder: Path, config: ExportConfig, api: HfApi | None = None) -> str:
    """Upload a folder to ``export.push_to_hub``; a repository that is made for it is private unless told otherwise.

    Args:
        folder: a whole export.
        api: the client; the token is where the client looks for it, and is written nowhere.

    Returns:
        The repository's address.

    Raises:
        RunFailed: the hub refused, or cannot be reached; the folder on disk stays.
    """
    assert config.push_to_hub is not None
    api = api or HfApi()
    try:
        repository = api.create_repo(config.push_to_hub, private=not config.push_public, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=str(folder), commit_message=f"qmemtune: {config.format}"
        )
    # RuntimeError is what the client makes of any failure while it sends a file.
    except (HTTPError, HFValidationError, RuntimeError, OSError) as error:
        private = "" if config.push_public else " --private"
        raise RunFailed(
            f"the export is on disk, but was not uploaded: {' '.join(str(error).split()) or type(error).__name__}",
            where=f"export.push_to_hub={config.push_to_hub}",
            fix="see that the hub can be reached and that you are logged in (`hf auth login`), then: "
            f"hf upload {config.push_to_hub} {folder}{private}",
        ) from error
    return str(repository)
