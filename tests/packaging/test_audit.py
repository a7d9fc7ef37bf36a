"""The audit fails on a known hole, and tells where the advisories cannot be reached."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[2] / ".ci" / "audit.py"
CLEAN = {"name": "torch", "version": "2.13.0", "vulns": []}
HOLE = {"name": "jinja2", "version": "3.1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1.6"]}]}
UNKNOWN = {"name": "peft", "skip_reason": "Dependency not found on PyPI and could not be audited: peft (0.21.2)"}
pytestmark = pytest.mark.skipif(not AUDIT.is_file(), reason="no checkout: .ci is not here")


@pytest.fixture
def audit(tmp_path):
    """Runs the audit with a pip-audit that reports what it is given."""

    def run(packages=None, *, code=0, said=""):
        fake = tmp_path / "pip-audit"
        report = None if packages is None else json.dumps({"dependencies": packages})
        fake.write_text(
            f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\nreport = {report!r}\n"
            "if report: Path(sys.argv[sys.argv.index('--output') + 1]).write_text(report)\n"
            f"sys.stderr.write({said!r})\nsys.exit({code})\n"
        )
        fake.chmod(0o755)
        command = [sys.executable, str(AUDIT), str(fake), "constraints.txt"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.strip()

    return run


def test_no_hole_is_well(audit):
    assert audit([CLEAN]) == (0, "no known holes in 1 packages")


@pytest.mark.parametrize("others", [[CLEAN], [UNKNOWN], []])
def test_a_known_hole_fails(audit, others):
    code, said = audit([*others, HOLE], code=1)
    assert code == 1
    assert "known hole: jinja2 3.1.0: PYSEC-1 -> 3.1.6" in said


@pytest.mark.parametrize("error", ["ConnectionError: Max retries exceeded", "ProxyError: no proxy", "ReadTimeout: 5 s"])
def test_no_connection_is_told_and_does_not_fail(audit, error):
    code, said = audit(code=1, said=f"Traceback ...\nrequests.exceptions.{error}\n")
    assert code == 0
    assert said.startswith("audit not done: PyPI's advisories cannot be reached: requests.exceptions.")


def test_a_registry_without_advisories_is_told(audit):
    code, said = audit([UNKNOWN])
    assert code == 0
    assert said.startswith("audit not done: no advisories are to be had here: Dependency not found")
    assert audit([UNKNOWN, CLEAN])[1].startswith("audit not done for 1 of 2 packages: peft")


def test_what_else_goes_wrong_fails(audit):
    error = "ERROR: invalid requirements input"
    assert audit(code=1, said=f"{error}\n") == (1, f"audit failed: {error}")
