"""The bridge from pip to CMake: configure, build, put ``_C`` where setuptools expects it.

CMakeLists.txt is the build definition. Its options are read from the environment (FASTUNLEARN_CUDA,
FASTUNLEARN_CUDA_ARCHS), and CMAKE_BUILD_PARALLEL_LEVEL limits the jobs as everywhere else.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPTIONS = ("FASTUNLEARN_CUDA", "FASTUNLEARN_CUDA_ARCHS")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # One build folder per Python, kept between builds: only what changed is compiled again.
        build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            *(f"-D{name}={os.environ[name]}" for name in OPTIONS if name in os.environ),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[Extension("fastunlearn._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
