"""Uploads that fail: the export is on disk, and the message says so."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HTTPError

from qmemtune.config.export import ExportConfig
from qmemtune.errors import RunFailed
from qmemtune.export.hub import push

HTTP = sys.modules[HTTPError.__module__.partition(".")[0]]
"""The library that the hub's client speaks through: httpx or httpx2."""


class Unreachable:
    """A hub's client whose calls fail."""

    def __init__(self, error: Exception, *, made: bool) -> None:
        self.error, self.made = error, made

    def create_repo(self, repo_id: str, **options: object) -> SimpleNamespace:
        if not self.made:
            raise self.error
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, **options: object) -> None:
        raise self.error


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (HTTP.ConnectError("[Errno -3] Temporary failure in\nname resolution"), "failure in name resolution"),
        (HTTP.ReadTimeout(""), "ReadTimeout"),
        (RuntimeError("Error while uploading 'README.md' to the Hub."), "Error while uploading"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "Network is unreachable"),
    ],
)
def test_a_failed_upload_says_that_the_export_is_on_disk(error: Exception, said: str, made: bool) -> None:
    with pytest.raises(RunFailed, match="on disk, but was not uploaded") as caught:
        push(Path("made/live"), ExportConfig(push_to_hub="tuned"), Unreachable(error, made=made))
    finding = caught.value.findings[0]
    assert said in finding.problem
    assert "\n" not in str(caught.value)
    assert finding.fix is not None
    assert finding.fix.endswith("hf upload tuned made/live --private")


def test_a_public_upload_stays_public_by_hand() -> None:
    config = ExportConfig(push_to_hub="tuned", push_public=True)
    with pytest.raises(RunFailed, match=r"hf upload tuned made/live$"):
        push(Path("made/live"), config, Unreachable(HTTP.ConnectError("no"), made=False))
