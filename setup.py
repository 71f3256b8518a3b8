"""Builds the compiled part; all else about the project is in pyproject.toml.

Needs a C++17 compiler and pybind11, nothing of torch. One build fits every processor of its kind: the loops for AVX2
and AVX-512 are compiled beside the plain ones and chosen when the program runs, so there are no machine flags here.
"""

import os
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup


class BuildExtension(build_ext):
    """Hands the project's version to the C++ side, so that it is written in one place."""

    def build_extension(self, extension):
        extension.define_macros.append(("FINF_VERSION", f'"{self.distribution.get_version()}"'))
        super().build_extension(extension)


extension = Pybind11Extension(
    "finf_fast._C",
    sources=sorted(["csrc/bindings.cpp", *glob("csrc/cpu/**/*.cpp", recursive=True)]),
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
    cxx_std=17,
    extra_compile_args=["-O3", "-Wall", "-Wextra"],
)

ParallelCompile(default=min(4, os.cpu_count() or 1)).install()  # four: each compiler takes up to 500 MB
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
