"""Builds the native core with CMake and Ninja. Everything else about the package stands in pyproject.toml.

Environment: FASTPEFT_CUDA=auto|1|0, FASTPEFT_CUDA_ARCHS="80;90a"|native, FASTPEFT_WERROR=1, MAX_JOBS=N, CUDA_HOME.
The build folder is kept (build/<python>), so that a second build compiles only what changed.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str:
    """The tool on PATH, else the one that the PyPI package of this name brings."""
    found = shutil.which(name)
    if found is None:
        beside_python = Path(sys.executable).with_name(name)
        if not beside_python.exists():
            raise SystemExit(f"fastpeft: '{name}' is needed to build from source; run: pip install {name}")
        found = str(beside_python)
    return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError:
            raise SystemExit(
                "fastpeft: building in the current environment needs its tools; run: pip install "
                "setuptools cmake ninja pybind11 (pip install . without --no-build-isolation brings them itself)"
            ) from None

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(folder / "out"),
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "FASTPEFT_VERSION": self.distribution.get_version(),
            "FASTPEFT_CUDA": os.environ.get("FASTPEFT_CUDA", "auto"),
            "FASTPEFT_CUDA_ARCHS": os.environ.get("FASTPEFT_CUDA_ARCHS", "80;86;89;90a").replace(",", ";"),
            "FASTPEFT_WERROR": os.environ.get("FASTPEFT_WERROR", "OFF"),
        }
        configure = [find_tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
        configure += [f"-D{key}={value}" for key, value in options.items()]
        if subprocess.run(configure).returncode != 0:
            # A kept cache can name tools that are gone (an earlier isolated build): once more from nothing.
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([find_tool("cmake"), "--build", str(folder), "--parallel", jobs], check=True)

        built = [path for path in (folder / "out").iterdir() if re.match(r"_C\..*(so|pyd|dylib)$", path.name)]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(max(built, key=lambda path: path.stat().st_mtime), target)


setup(ext_modules=[Extension("fastpeft._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
