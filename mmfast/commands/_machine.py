"""What identifies a measurement: the GPU, its driver, and the commit of the source."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def commit() -> str:
    """Short hash of the checkout that mmfast runs from, with `-dirty` if files differ; empty outside a checkout."""
    if not (ROOT / ".git").exists():  # an installed copy may sit inside some other repository
        return ""
    found = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{found}-dirty" if found and changed else found


@cache
def driver() -> str:
    """Version of the GPU driver, or empty."""
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0].strip()


@cache
def device_name(device: str) -> str:
    """Name of the GPU, or of the CPU."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "cpu") or "cpu"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
