"""What several benchmarks say of themselves and of attention's shapes; imports nothing that starts a device."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """A call of attention. `segment` is the mean length of the sequences in a packed row; 0 for a uniform one."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    segment: int = 0

    def __str__(self):
        kind = f"packed, mean {self.segment}" if self.segment else "causal" if self.causal else "full"
        return f"{self.batch} x {self.length}, {self.heads} over {self.kv_heads} heads of {self.head_dim}, {kind}"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
