"""The house: imports go one way, and only ops touches the native core."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastpeft

PACKAGE = Path(__file__).parents[1] / "fastpeft"
# A room may import rooms of a smaller floor, and itself.
FLOORS = {"errors": 0, "ops": 1, "nn": 2, "optim": 2, "methods": 3, "models": 3, "data": 4, "trainers": 5, "recipes": 6}
FLOORS |= {"nemo": 7, "cli": 7, "__main__": 8, "__init__": 9}
LAZY_NAMES = set(fastpeft.__all__) - set(FLOORS) - {"__version__"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported_names(path: Path) -> list[tuple[int, str]]:
    names: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write fastpeft.<room> out"
            module = node.module or ""
            names += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in FLOORS, f"{path} is in no room of the design"
    for line, name in imported_names(path):
        parts = name.split(".")
        if parts[0] != "fastpeft" or len(parts) == 1:
            continue
        assert parts[1] not in LAZY_NAMES, f"{path}:{line} imports {name}; name the room it lives in"
        if parts[1] == "_C":
            assert path.relative_to(PACKAGE).as_posix() == "ops/native.py", f"{path}:{line} imports the native core"
        elif parts[1] != room and parts[1] in FLOORS:
            assert FLOORS[parts[1]] < FLOORS[room], f"{path}:{line} imports {parts[1]}, which is above or beside {room}"


def test_the_core_knows_neither_torch_nor_python() -> None:
    csrc = PACKAGE.parent / "csrc"
    for path in sorted(csrc.rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh") or path.is_relative_to(csrc / "bindings"):
            continue
        for line in path.read_text().splitlines():
            if line.startswith("#include"):
                assert not any(word in line for word in ("torch", "ATen", "Python.h", "pybind11")), f"{path}: {line}"


def test_optional_packages_are_not_imported_at_import() -> None:
    """Importing fastpeft and its command line must work without the optional packages, and without torch for --help."""
    import subprocess
    import sys

    script = (
        "import sys, fastpeft, fastpeft.cli; print([m for m in ('torch', 'peft', 'bitsandbytes') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(("is_source", "advice"), [(True, "start in another folder"), (False, "--force-reinstall")])
def test_a_package_without_its_native_core_says_why(is_source: bool, advice: str, tmp_path: Path) -> None:
    """In the source folder the unbuilt package hides an installed one, and installing again did not help."""
    shutil.copytree(PACKAGE, tmp_path / "fastpeft", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    (tmp_path / "fastpeft" / "_C.py").write_text("raise ImportError('not built')")
    if is_source:
        (tmp_path / "csrc").mkdir()
    command = [sys.executable, "-c", "import fastpeft.ops"]
    failed = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert failed.returncode == 1
    assert "native core could not be loaded" in failed.stderr and advice in failed.stderr
