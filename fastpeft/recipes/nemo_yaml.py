"""``fastpeft finetune CONFIG.yaml``: a tuning file of NeMo 1 or NeMo-Aligner as a run of ours.

The keys are translated into the sections of a run (`nemo_keys` has the table), which are then checked as any other;
complaints name the line and the key of the NeMo file. What is meant a little otherwise here, and which keys change
nothing, is said in notes.

    trainer.sft | rm | dpo | ppo   the kind of run; without one, NeMo 1's tuning is supervised
    fastpeft: {train: {...}}       settings of the run in their own spelling, for what NeMo has no key for
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fastpeft.errors import UserError
from fastpeft.recipes.nemo_data import translate_data
from fastpeft.recipes.nemo_peft import translate_peft
from fastpeft.recipes.nemo_settings import NemoSettings
from fastpeft.recipes.nemo_train import translate_train
from fastpeft.recipes.schema import check_settings
from fastpeft.recipes.sections import RunConfig
from fastpeft.recipes.yaml_file import Settings, read_settings

# Functions that NeMo-Aligner's files call in their references.
_RESOLVERS = {
    "multiply": lambda x, y: x * y,
    "int_div": lambda x, y: x // y,
    "subtract": lambda x, y: x - y,
    "not": lambda x: not x,
}
_PATH = "model.restore_from_path"


@dataclass(frozen=True)
class NemoRun:
    """A translated file.

    Args:
        config: the run.
        notes: lines for the user.
    """

    config: RunConfig
    notes: list[str]


def load_nemo(path: str | Path, overrides: Iterable[str] = ()) -> NemoRun:
    """Read a NeMo file and translate it.

    Args:
        path: the YAML.
        overrides: ``"a.b=c"``, also in Hydra's forms ``"+a.b=c"`` and ``"~a.b"``, which takes a key out.
    Returns:
        The run, and what there is to say about it. Nothing is written and no model is opened.
    Raises:
        UserError: a key is unknown, asks for what there is not, or is needed and missing.
    """
    given = [override.strip() for override in overrides]
    removed = [override[1:].partition("=")[0] for override in given if override.startswith("~")]
    set_to = [override.lstrip("+") for override in given if not override.startswith("~")]
    with _resolvers():
        settings = read_settings(path, set_to, lenient=True)
    for dotted in removed:
        _remove(settings.values, dotted)
    return translate(settings)


def translate(settings: Settings) -> NemoRun:
    """Translate NeMo's settings.

    Args:
        settings: as the file has them; `Unfilled` where a value could not be had.
    Raises:
        UserError: as `load_nemo`.
    """
    nemo = NemoSettings(settings)
    nemo.check_keys()
    _translate_model(nemo)
    nemo.translate_table()
    translate_peft(nemo)
    translate_data(nemo)
    translate_train(nemo)
    return NemoRun(check_settings(nemo.run_settings(), nemo.kind), nemo.notes)


def _translate_model(nemo: NemoSettings) -> None:
    """The model's path, and what is recomputed in backward."""
    path = nemo.get(_PATH)
    if path is None:
        raise UserError(f"{nemo.where(_PATH)}: {nemo.spelt(_PATH)} is missing; give it a model folder or hub id")
    if not isinstance(path, str):
        raise nemo.refusal(_PATH, "it takes a model folder or hub id")
    try:
        settings = model_settings(path)
    except UserError as error:
        raise nemo.refusal(_PATH, str(error)) from None
    for name, value in settings.items():
        nemo.put(f"model.{name}", value, _PATH)
    key = "model.activations_checkpoint_granularity"
    if nemo.has(key):
        mode = nemo.choice(key, ("full", "selective"), "full")
        if mode == "full":
            nemo.put("train.gradient_checkpointing", True, key)
        else:
            nemo.put("model.checkpointing", mode, key)


def model_settings(path: str) -> dict[str, str]:
    """Keys of the section ``model`` for where NeMo's users name a model: a folder, a hub id, or a GGUF file.

    Args:
        path: where.
    Raises:
        UserError: it is NeMo's own archive.
    """
    if path.endswith(".nemo") or (Path(path).expanduser() / "model_weights").is_dir():
        raise UserError(
            "a .nemo archive is of another layout (and may be a pickle); give the folder of the same model in the "
            "Hugging Face layout, or convert it with NeMo's scripts/checkpoint_converters (convert_*_nemo_to_hf.py)"
        )
    if path.endswith(".gguf"):
        folder, _, file = path.rpartition("/")
        return {"path": folder or ".", "gguf_file": file}
    return {"path": path}


def _remove(values: dict[str, Any], dotted: str) -> None:
    *sections, last = dotted.split(".")
    for name in sections:
        inner = values.get(name)
        if not isinstance(inner, dict):
            break
        values = inner
    else:
        if last in values:
            del values[last]
            return
    raise UserError(f"override '~{dotted}': there is no such key to take out")


@contextmanager
def _resolvers() -> Iterator[None]:
    """OmegaConf knows the functions within the block; those that somebody else registered stay."""
    ours = [name for name in _RESOLVERS if not OmegaConf.has_resolver(name)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # versions of OmegaConf each call the others' way of registering old
        for name in ours:
            OmegaConf.register_new_resolver(name, _RESOLVERS[name])
    try:
        yield
    finally:
        for name in ours:
            OmegaConf.clear_resolver(name)
