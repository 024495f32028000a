"""Paths in a run's YAML: made absolute, from the current folder or else from the YAML's, and checked to exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastpeft.recipes.yaml_file import Settings, shown

ADAPTER_CONFIGS = ("adapter_config.json", "fastpeft_adapter.json")  # the second is a bottleneck adapter's
RUN_FOLDER = "a folder for the run, such as runs/first"


def is_adapter_folder(path: str | Path) -> bool:
    """Whether an adapter of any kind was saved there."""
    return any((Path(path) / name).is_file() for name in ADAPTER_CONFIGS)


def found(settings: Settings, path: Path) -> Path | None:
    """A path made absolute: from the current folder, else from the YAML's; None if it is in neither."""
    folders = [Path.cwd(), Path(settings.name).resolve().parent]
    return next((full for folder in folders if (full := folder / path.expanduser()).exists()), None)


def resolve_adapters(settings: Settings, peft: dict[str, Any], reward: dict[str, Any], problems: list[str]) -> None:
    """Make the paths of adapters and of the reward function's file absolute; they have to exist."""
    for section, values in (("peft", peft), ("reward", reward)):
        if isinstance(path := values.get("adapter"), Path):
            where = settings.origin(section, "adapter")
            full = found(settings, path)
            if full is None:
                problems.append(f"{where}: {section}.adapter: there is no folder {path}")
            elif not is_adapter_folder(full):
                problems.append(
                    f"{where}: {section}.adapter: {path} is no adapter: there is no adapter_config.json in it"
                )
            values["adapter"] = full
    function = reward.get("function")
    if isinstance(function, str):
        where = settings.origin("reward", "function")
        file, _, name = function.rpartition(":")
        full = found(settings, Path(file)) if file else None
        if not name.isidentifier() or not file.endswith(".py"):
            problems.append(
                f"{where}: reward.function is {function!r}; give the file and the function, as rules.py:brief"
            )
        elif full is None:
            problems.append(f"{where}: reward.function: there is no file {file}")
        else:
            reward["function"] = f"{full}:{name}"


def resolve_paths(settings: Settings, model: dict[str, Any], data: dict[str, Any], problems: list[str]) -> None:
    """Make paths absolute; data files have to exist."""
    for key in ("train", "eval"):
        if isinstance(path := data.get(key), Path):
            full = found(settings, path)
            if full is None:
                beside = f" or beside {settings.name}" if not path.expanduser().is_absolute() else ""
                here = " in the current folder" if beside else ""
                problems.append(f"{settings.origin('data', key)}: data.{key}: there is no file {path}{here}{beside}")
            elif not full.is_file():
                problems.append(f"{settings.origin('data', key)}: data.{key}: {path} is a folder; give a JSONL file")
            data[key] = full
    if isinstance(data.get("train"), list):
        data["train"] = _resolve_files(settings, data["train"], problems)
    if isinstance(path := model.get("path"), str) and not path.startswith("package:"):
        model["path"] = str(found(settings, Path(path)) or path)


def _resolve_files(settings: Settings, files: list[Any], problems: list[str]) -> list[dict[str, Any]]:
    """The entries of a list of files with absolute paths; each is checked."""
    where = settings.origin("data", "train")
    resolved: list[dict[str, Any]] = []
    for number, given in enumerate(files):
        place = f"{where}: data.train[{number}]"
        file = dict(given) if isinstance(given, dict) else {"path": str(given)}
        unknown = next((key for key in file if key not in ("path", "weight")), None)
        weight = file.get("weight")
        full = found(settings, Path(file["path"])) if isinstance(file.get("path"), str) else None
        if unknown is not None or "path" not in file:
            problems.append(f"{place} is {given}; it takes a path, or path and weight")
        elif full is None or not full.is_file():
            problems.append(f"{place}: there is no file {file['path']}")
        elif weight is not None and (
            isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf")
        ):
            problems.append(f"{place}: weight is {shown(weight)}; it must be a number above 0")
        else:
            file["path"] = str(full)
        resolved.append(file)
    if not files:
        problems.append(f"{where}: data.train is an empty list; give it a JSONL file")
    elif 0 < sum(file.get("weight") is not None for file in resolved) < len(resolved):
        problems.append(f"{where}: some files of data.train have a weight and some have none; give each one, or none")
    return resolved


def resolve_output_dir(settings: Settings, train: dict[str, Any], problems: list[str]) -> None:
    """Make the run folder's path absolute; whether it can be made is for the run to find out."""
    given = train["output_dir"]
    where = settings.origin("train", "output_dir")
    if given is None or not given.strip():
        problems.append(f"{where}: train.output_dir is {'null' if given is None else 'empty'}; give it {RUN_FOLDER}")
        return
    try:
        train["output_dir"] = str(Path(given).expanduser().resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, the home of nobody, a zero byte
        problems.append(f"{where}: train.output_dir {given}: it cannot be a folder: {error}")
