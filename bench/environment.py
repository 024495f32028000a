"""Where a figure was taken: device, driver, versions, commit. Every result carries all of it."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastpeft
from bench.case import l2_bytes
from fastpeft.ops import build_info

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "bitsandbytes", "peft", "liger_kernel", "transformers", "triton")


@dataclass(frozen=True)
class Environment:
    """The conditions of a run.

    Attributes:
        date: UTC, ISO 8601.
        commit: git commit, ``+dirty`` when files differ from it, ``unknown`` outside a checkout.
        device: name of the GPU or the processor.
        driver: of the GPU; empty on a CPU.
        cuda: version torch was built with; empty on a CPU.
        l2_bytes: of the GPU; 0 on a CPU.
        threads: torch's CPU threads.
        fastpeft: version.
        build: how fastpeft's native core was built.
        python: version.
        packages: installed versions, ``not installed`` for the others.
    """

    date: str
    commit: str
    device: str
    driver: str
    cuda: str
    l2_bytes: int
    threads: int
    fastpeft: str
    build: dict[str, Any]
    python: str
    packages: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)

    def header(self) -> str:
        """Three lines for the top of a run."""
        where = [self.device]
        if self.driver:
            where += [f"driver {self.driver}", f"CUDA {self.cuda}", f"L2 {self.l2_bytes / 1e6:.0f} MB"]
        else:
            where += [f"{self.threads} threads"]
        versions = [f"fastpeft {self.fastpeft}", f"python {self.python}"]
        versions += [f"{name} {version}" for name, version in self.packages.items()]
        return "\n".join(
            [
                f"bench     {self.date}  commit {self.commit}",
                "device    " + ", ".join(where),
                "versions  " + ", ".join(versions),
            ]
        )


def environment(device: torch.device) -> Environment:
    """Read the conditions a run on ``device`` has."""
    cuda = device.type == "cuda"
    return Environment(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=_commit(),
        device=torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        driver=_run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") if cuda else "",
        cuda=(torch.version.cuda or "") if cuda else "",
        l2_bytes=l2_bytes(device) if cuda else 0,
        threads=torch.get_num_threads(),
        fastpeft=fastpeft.__version__,
        build=build_info(),
        python=platform.python_version(),
        packages={name: _version(name) for name in _PACKAGES},
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    commit = _run("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if commit == "unknown":
        return commit
    return commit + ("+dirty" if _run("git", "-C", str(ROOT), "status", "--porcelain", empty="") else "")


def _run(*command: str, empty: str = "unknown") -> str:
    """First line a command prints, ``unknown`` when it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines else empty


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
