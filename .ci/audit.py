"""Runs pip-audit on pinned packages: a known hole fails, a service that does not answer is only told.

python audit.py PIP_AUDIT REQUIREMENTS
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

UNREACHABLE = ("ConnectionError", "ConnectionResetError", "ConnectTimeout", "ReadTimeout", "ProxyError", "SSLError")
"""What the last line of pip-audit's own report of a failed connection names; requests has these errors."""
SHOWN = 5


def audit(pip_audit: str, requirements: str) -> tuple[int, list[str]]:
    """Ask about every pinned package.

    Args:
        pip_audit: the program.
        requirements: file of ``name==version`` lines.

    Returns:
        The exit code, and what to print.
    """
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        done = subprocess.run(
            [pip_audit, *options, "--requirement", requirements, "--output", str(report)],
            capture_output=True,
            text=True,
            check=False,
        )
        if report.is_file():
            return judged(json.loads(report.read_text(encoding="utf-8"))["dependencies"], done)
    reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if any(name in reason for name in UNREACHABLE):
        return 0, [f"audit not done: PyPI's advisories cannot be reached: {reason}"]
    return done.returncode or 1, [f"audit failed: {reason}"]


def judged(packages: list[dict], done: subprocess.CompletedProcess[str]) -> tuple[int, list[str]]:
    """What a report means: exit code and lines."""
    holes = [
        f"{package['name']} {package['version']}: {hole['id']} -> {', '.join(hole['fix_versions']) or 'no fix yet'}"
        for package in packages
        for hole in package.get("vulns", [])
    ]
    skipped = [package for package in packages if "skip_reason" in package]
    answered = len(packages) - len(skipped)
    lines = [f"known hole: {hole}" for hole in holes]
    if packages and not answered:
        lines.append(f"audit not done: no advisories are to be had here: {skipped[0]['skip_reason']}")
    elif skipped:
        names = ", ".join(package["name"] for package in skipped[:SHOWN])
        more = ", ..." if len(skipped) > SHOWN else ""
        lines.append(f"audit not done for {len(skipped)} of {len(packages)} packages: {names}{more}")
    if answered and not holes:
        lines.append(f"no known holes in {answered} packages")
    # Where it fails without a hole, it met something that this does not know.
    return (1 if holes else done.returncode), lines


if __name__ == "__main__":
    code, said = audit(*sys.argv[1:])
    print("\n".join(said))
    sys.exit(code)
