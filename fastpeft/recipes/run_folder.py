"""The life of a run folder: may a run start in it, what the start changes, how the result gets in.

    config.yaml      begins with RUN_MARK; names the folder and whether the result is adapter/ or model/
    metrics.jsonl    the trainer's
    loss.png         drawn at the end
    checkpoint-N/    with a manifest (fastpeft.trainers.checkpoint)
    adapter/ model/  the result, of a LoRA or of training all weights

People keep folders of these names too, and ``output_dir: .`` is easily written. So nothing is replaced for its name
alone: a checkpoint has to have its manifest, everything else a marked ``config.yaml`` beside it. And nothing is
replaced before the new run stands at its first step, with its settings checked and its checkpoint loaded.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from fastpeft.data import RowTemplate
from fastpeft.errors import UserError
from fastpeft.methods import PeftModel
from fastpeft.recipes.plot import METRICS_FILE, PLOT_FILE
from fastpeft.recipes.schema import RUN_MARK, ModelConfig, RunConfig, read_model_config, read_row_template
from fastpeft.recipes.sections import WHOLE_MODEL
from fastpeft.recipes.yaml_file import Settings, read_settings
from fastpeft.trainers.checkpoint import checkpoint_path, list_steps, sealed_steps

CONFIG_FILE = "config.yaml"
ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"


def result_folder(config: RunConfig) -> Path:
    """Where the result of a run is saved."""
    return config.output_dir / _result_name(config.peft.method)


def check_run_folder(config: RunConfig) -> bool:
    """Decide whether a run may start in its folder; nothing is changed.

    Args:
        config: the run's.
    Returns:
        Whether it continues from a checkpoint that is there.
    Raises:
        UserError: the folder cannot be made or written to, holds another run or somebody's files under a run's names,
            or what the run would delete is its own model or data.
    """
    folder, where = config.output_dir, config.settings.origin("train", "output_dir")
    try:
        _check_usable(folder, probe=config.train.args.process_index == 0)
        sealed = sealed_steps(folder)
        made = _made_by_runs(folder)
        foreign = [path for path in _named_like_a_run(folder) if path not in made]
    except UserError as error:
        raise UserError(f"{where}: train.output_dir {folder}: {error}") from error
    except OSError as error:
        raise UserError(f"{where}: train.output_dir {folder}: it cannot be used: {error.strerror}") from error
    resume = config.train.resume and bool(sealed)
    if resume:  # broken checkpoints among the whole ones are the loader's business
        replaced = {result_folder(config), *(folder / name for name in (CONFIG_FILE, METRICS_FILE, PLOT_FILE))}
        foreign = [path for path in foreign if path in replaced]
    if foreign:
        raise UserError(
            f"{where}: train.output_dir {folder} holds {_listed(foreign)}, and nothing shows that a fastpeft run made "
            f"{'it' if len(foreign) == 1 else 'them'}, so nothing is replaced; move that away, or name another folder"
        )
    kept = [path for path in made if _is_worth_keeping(path)]
    if config.train.resume and not any(path.is_dir() for path in kept):
        kept = []  # metrics alone: the run died before its first checkpoint, and resuming it is starting it again
    if kept and not resume and not config.train.overwrite:
        advice = "continue it with train.resume=true, " if sealed else ""
        without = ", without a checkpoint to resume from" if config.train.resume else ""
        raise UserError(
            f"{where}: train.output_dir {folder} already holds a run ({_listed(kept)}){without}; {advice}replace it "
            "with train.overwrite=true, or name another folder"
        )
    _spare_inputs(config, made, deleted=not resume)
    return resume


class BeginRunFolder(TrainerCallback):
    """Make the run folder a new run's, or the resumed run's, once everything is checked and loaded.

    Args:
        config: the run's.
        resume: what `check_run_folder` said.
    """

    def __init__(self, config: RunConfig, resume: bool) -> None:
        self._config = config
        self._resume = resume

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Delete what an earlier run made, unless that is continued, and note the settings."""
        if not state.is_world_process_zero:
            return
        folder = self._config.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        # The marked config.yaml stays until the new one takes its place: a start that is cut short here can be redone.
        for path in [] if self._resume else _made_by_runs(folder):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != CONFIG_FILE:
                path.unlink()
        partial = folder / f".{CONFIG_FILE}.partial"
        partial.write_text(self._config.to_yaml(), encoding="utf-8")
        os.replace(partial, folder / CONFIG_FILE)


@contextmanager
def no_empty_folders_left(folder: Path) -> Iterator[None]:
    """Remove the folder again, and parents made for it, if the block fails before anything is in them."""
    new = _missing(folder)
    try:
        yield
    except BaseException:
        for path in new:
            with suppress(OSError):  # not empty: the run had begun
                path.rmdir()
        raise


def run_sources(run: Path, command: str, *, tuned: bool = True) -> tuple[ModelConfig, Path | None]:
    """What a run's model is made of.

    Args:
        run: a run folder.
        command: for whom, which begins a complaint.
        tuned: what the run trained is wanted, and its absence an error.
    Returns:
        The base model as the run held it and the adapter's folder; after training all weights, the run's model folder
        and None.
    Raises:
        UserError: it is no run folder, or has no result.
    """
    model = read_model_config(_settings(run, command))
    if (run / ADAPTER_FOLDER).is_dir():
        return model, run / ADAPTER_FOLDER
    if (run / MODEL_FOLDER).is_dir() and tuned:
        return replace(model, path=str(run / MODEL_FOLDER), gguf_file=None, quantize="none"), None
    if tuned:
        checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        hint = f"; it has {checkpoints[-1].name}: give --adapter {checkpoints[-1]}" if checkpoints else ""
        raise UserError(f"{command}: {run} has no adapter yet{hint}")
    return model, None


def run_template(run: Path, command: str) -> RowTemplate | None:
    """How a run read rows that have columns of their own; None for rows in a known form.

    Raises:
        UserError: it is no run folder.
    """
    return read_row_template(_settings(run, command))


def _settings(run: Path, command: str) -> Settings:
    config_file = run / CONFIG_FILE
    if not config_file.is_file():
        raise UserError(f"{command}: {run} is not a run folder: there is no {CONFIG_FILE} in it")
    return read_settings(config_file)


def save_result(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Save under another name and rename, so that a folder of this name is always complete.

    Args:
        model: with adapters, of which the one named "default" alone is saved, or without.
        tokenizer: saved too, where there is one.
        folder: the run's `result_folder`.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    chosen = {"selected_adapters": ["default"]} if isinstance(model, PeftModel) else {}
    model.save_pretrained(str(partial), **chosen)  # type: ignore[operator]  # both kinds of model have it
    if tokenizer is not None:
        tokenizer.save_pretrained(str(partial))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _result_name(method: str) -> str:
    return MODEL_FOLDER if method in WHOLE_MODEL else ADAPTER_FOLDER


def _missing(folder: Path) -> list[Path]:
    """The folder and its parents, as far as they do not exist; the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _check_usable(folder: Path, *, probe: bool) -> None:
    """Raise UserError or OSError unless the folder can be written to.

    Args:
        folder: the run folder.
        probe: make the folder and remove it again, which tells more than asking (lengths of names, quotas, /proc);
            by one process alone, or they would get in each other's way.
    """
    new = _missing(folder)
    there = next(path for path in (folder, *folder.parents) if path not in new)
    if not there.is_dir():
        raise UserError(f"{there if new else 'it'} is a file, and a folder is needed")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there} cannot be written to")
    if probe:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        finally:
            for path in new:
                with suppress(OSError):
                    path.rmdir()


def _named_like_a_run(folder: Path) -> list[Path]:
    """What is in the folder under names that runs use."""
    results = [folder / ADAPTER_FOLDER, folder / MODEL_FOLDER]
    checkpoints = [checkpoint_path(folder, step) for step in list_steps(folder)]
    files = [folder / METRICS_FILE, folder / CONFIG_FILE, folder / PLOT_FILE]
    return [path for path in (*results, *checkpoints, *files) if path.exists() or path.is_symlink()]


def _made_by_runs(folder: Path) -> list[Path]:
    """Those of `_named_like_a_run` that a run of fastpeft made."""
    sealed = [checkpoint_path(folder, step) for step in sealed_steps(folder)]
    settings = _run_settings(folder)
    made = {*sealed}
    if sealed or settings is not None:  # SFTTrainer without a YAML leaves metrics and checkpoints
        made |= {folder / METRICS_FILE, folder / PLOT_FILE}
    if settings is not None:
        made.add(folder / CONFIG_FILE)
        # A config.yaml copied from elsewhere says nothing about what is here; one of a run that was moved does.
        if sealed or settings["output_dir"] == str(folder):
            made.add(folder / _result_name(settings["method"]))
    files = {METRICS_FILE, CONFIG_FILE, PLOT_FILE}
    return [
        path
        for path in _named_like_a_run(folder)
        if path in made and not path.is_symlink() and path.is_file() == (path.name in files)
    ]


def _run_settings(folder: Path) -> dict[str, Any] | None:
    """``output_dir`` and ``method`` as the folder's config.yaml has them, if a run wrote it."""
    try:
        text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
        if not text.startswith(f"{RUN_MARK}\n"):
            return None
        settings = yaml.safe_load(text)
        return {"output_dir": settings["train"]["output_dir"], "method": settings["peft"]["method"]}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _is_worth_keeping(path: Path) -> bool:
    """Results, checkpoints, and metrics with a line in them; not what a run leaves that fails in its first step."""
    return path.is_dir() or (path.name == METRICS_FILE and path.stat().st_size > 0)


def _spare_inputs(config: RunConfig, made: Iterable[Path], *, deleted: bool) -> None:
    """Raise UserError where the run's own model or data would be deleted or replaced with what earlier runs made.

    Args:
        config: the run's.
        made: what earlier runs made.
        deleted: whether all of it is to be deleted, which is refused inside of the model's folder too.
    """
    inputs: dict[str, str | Path | None] = {
        "model.path": config.model.path,
        **{f"data.train ({path.name})": path for path, _ in config.data.train_files},
        "data.eval": config.data.eval,
        "peft.adapter": config.peft.adapter,
        "reward.adapter": config.reward.adapter,
    }
    where = config.settings.origin("train", "output_dir")
    for key, given in inputs.items():
        if given is None or not Path(given).expanduser().exists():  # no evaluation; a hub id, an installed package
            continue
        own = Path(given).expanduser().resolve()
        for path in made:
            holds = path == own or path in own.parents
            if holds or (deleted and own in path.parents):
                raise UserError(
                    f"{where}: train.output_dir: this run would replace {path}, which "
                    f"{'is or holds' if holds else 'is part of'} {key} {given}; name another folder"
                )


def _listed(paths: list[Path]) -> str:
    names = [path.name for path in paths]
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
