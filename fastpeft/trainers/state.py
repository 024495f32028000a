"""Training state on disk without pickle: structure in JSON, tensors in safetensors.

A tree of dicts, lists, tuples, numbers, strings and tensors becomes ``NAME.json`` and, where it holds tensors,
``NAME.safetensors``. JSON has neither tuples nor dicts with integer keys, and an optimizer's state has both, so
everything but lists and scalars is written as an object with one key that says what it is::

    {"dict": [[key, value], ...]}    {"tuple": [...]}    {"tensor": "name in the safetensors file"}
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def save_state(tree: Any, folder: Path, name: str) -> None:
    """Write a tree as ``folder/name.json`` and ``folder/name.safetensors``.

    Args:
        tree: dicts, lists, tuples, None, bools, numbers, strings and tensors, nested as they like.
        folder: an existing folder.
        name: stem of the files.
    Raises:
        TypeError: the tree holds something else; the message says where.
    """
    tensors: dict[str, Tensor] = {}
    encoded = _encode(tree, tensors, {}, name)
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(encoded), encoding="utf-8")


def load_state(folder: Path, name: str) -> Any:
    """Read what `save_state` wrote; tensors come on the CPU."""
    encoded = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    file = folder / f"{name}.safetensors"
    return _decode(encoded, load_file(file) if file.exists() else {})


def capture_rng() -> dict[str, Any]:
    """The state of every generator that training draws from: Python's, NumPy's, torch's, and the current GPU's."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put back what `capture_rng` took; a GPU's state is passed over on a machine without one."""
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _encode(tree: Any, tensors: dict[str, Tensor], keys: dict[int, str], place: str) -> Any:
    """Give a tree as JSON; a tensor that stands in several places (bitsandbytes' maps do) is stored once."""
    if isinstance(tree, Tensor):
        if id(tree) not in keys:
            keys[id(tree)] = str(len(tensors))
            tensors[keys[id(tree)]] = _storable(tree)
        return {"tensor": keys[id(tree)]}
    if isinstance(tree, dict):
        return {
            "dict": [
                [_encode(key, tensors, keys, f"{place} (a key)"), _encode(value, tensors, keys, f"{place}[{key!r}]")]
                for key, value in tree.items()
            ]
        }
    if isinstance(tree, (list, tuple)):
        items = [_encode(item, tensors, keys, f"{place}[{index}]") for index, item in enumerate(tree)]
        return {"tuple": items} if isinstance(tree, tuple) else items
    if isinstance(tree, np.generic):
        tree = tree.item()
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(
        f"save_state: {place} is a {type(tree).__name__}; checkpoints hold dicts, lists, tuples, numbers, strings and "
        "tensors only"
    )


def _decode(encoded: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(encoded, list):
        return [_decode(item, tensors) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    ((kind, content),) = encoded.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return {_decode(key, tensors): _decode(value, tensors) for key, value in content}


def _storable(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and alone in its storage, as safetensors wants it; copied only where it is not."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
