"""Run a command again in a process of its own, where an environment variable must be set before imports."""

from __future__ import annotations

import os
import subprocess
import sys


def run_again(command: str, arguments: list[str], **environment: str) -> int:
    """Run `mmfast COMMAND ARGUMENTS` in a new process with these variables set; return its exit code."""
    line = [sys.executable, "-m", "mmfast.cli", command, *arguments]
    return subprocess.run(line, env={**os.environ, **environment}).returncode
