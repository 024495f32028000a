"""What is installed here, how fastpeft was built, and whether the two fit: the content of ``fastpeft info``."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import fastpeft

_REQUIRED = ("torch", "transformers", "accelerate", "safetensors")
_OPTIONAL = ("bitsandbytes", "datasets", "gguf", "matplotlib", "peft", "tensorboard", "trl", "wandb")


def environment() -> dict[str, Any]:
    """Collect versions, the build of the native core, GPUs and optional packages.

    Returns:
        ``fastpeft``, ``python``, ``platform``; ``packages`` and ``optional_packages`` (name -> version, or None where
        it is not installed); ``native`` (``loaded``, and what ``ops.build_info`` says or the ``error``); ``gpu``
        (``driver``, ``devices``, ``note``). All of it can be written as JSON; nothing raises.
    """
    native = _native_core()
    return {
        "fastpeft": fastpeft.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _REQUIRED},
        "optional_packages": {name: _version(name) for name in _OPTIONAL},
        "native": native,
        "gpu": _gpu(native),
    }


def described(info: dict[str, Any]) -> str:
    """``environment()`` as text for a terminal."""
    native, gpu = info["native"], info["gpu"]
    lines = [("fastpeft", info["fastpeft"]), ("python", f"{info['python']} on {info['platform']}")]
    lines += [(name, version or "not installed") for name, version in info["packages"].items()]
    if native["loaded"]:
        cuda = f"CUDA {native['cuda_version']} for {', '.join(native['cuda_archs'])}" if native["cuda"] else "CPU alone"
        lines.append(("native core", f"{native['version']}, {cuda}, {native['compiler']}"))
        lines.append(("CPU kernels", ", ".join(native["cpu_features"]) or "portable"))
    else:
        lines.append(("native core", f"NOT LOADED: {native['error']}"))
    for device in gpu["devices"]:
        fits = "supported by this build" if device["supported"] else "NOT supported by this build"
        memory = f"{device['memory_bytes'] / 2**30:.0f} GiB"
        lines.append(("GPU", f"{device['name']}, {memory}, compute capability {device['capability']}, {fits}"))
    if gpu["driver"]:
        lines.append(("GPU driver", gpu["driver"]))
    if gpu["note"]:
        lines.append(("GPU", gpu["note"]))
    lines += [(f"{name} (optional)", version or "-") for name, version in info["optional_packages"].items()]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def build_supports(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether CUDA code compiled for ``archs`` runs on a GPU.

    Args:
        archs: as ``ops.build_info()["cuda_archs"]`` has them: "80", "90a" or "ptx90".
        capability: the GPU's, such as ``(9, 0)``.
    Source:
        CUDA C++ Programming Guide, "Application Compatibility": binaries run within a major version, upwards; those
        of an "a" architecture on that one alone; PTX on everything newer.
    """
    number = 10 * capability[0] + capability[1]

    def runs(arch: str) -> bool:
        if arch.startswith("ptx"):
            return number >= int(arch[3:])
        if arch.endswith("a"):
            return number == int(arch[:-1])
        return capability[0] == int(arch) // 10 and number >= int(arch)

    return any(runs(arch) for arch in archs)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _native_core() -> dict[str, Any]:
    try:
        from fastpeft.ops import build_info

        return {"loaded": True, **build_info()}
    except Exception as error:  # whatever stops it from loading is what the reader wants to know
        return {"loaded": False, "error": f"{type(error).__name__}: {error}"}


def _gpu(native: dict[str, Any]) -> dict[str, Any]:
    smi = _nvidia_smi()
    gpu: dict[str, Any] = {"driver": smi[0].rpartition(", ")[2] if smi else None, "devices": [], "note": None}
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for index in range(count):
            device = torch.cuda.get_device_properties(index)
            supported = bool(native.get("cuda")) and build_supports(native["cuda_archs"], (device.major, device.minor))
            gpu["devices"].append(
                {
                    "name": device.name,
                    "memory_bytes": device.total_memory,
                    "capability": f"{device.major}.{device.minor}",
                    "supported": supported,
                }
            )
    except Exception as error:
        gpu["note"] = f"torch cannot tell: {type(error).__name__}: {error}"
        return gpu
    if not gpu["devices"]:
        if not smi:
            gpu["note"] = "none found"
        elif torch.version.cuda is None:
            gpu["note"] = f"{smi[0].rpartition(', ')[0]} is there, but this torch ({torch.__version__}) has no CUDA"
        else:
            gpu["note"] = f"{smi[0].rpartition(', ')[0]} is there, but torch cannot use it (driver too old, or hidden?)"
    elif not all(device["supported"] for device in gpu["devices"]):
        gpu["note"] = (
            "build fastpeft again with FASTPEFT_CUDA_ARCHS=native"
            if native.get("cuda")
            else "this build is for the CPU alone; build fastpeft again with nvcc on PATH"
        )
    return gpu


def _nvidia_smi() -> list[str]:
    """One "name, driver" line a GPU; empty where there is no working nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
