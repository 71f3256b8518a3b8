"""Builds the compiled parts; all else about the project is in pyproject.toml.

Needs a C++17 compiler and pybind11, nothing of torch. One build fits every processor of its kind: the loops for AVX2
and AVX-512 are compiled beside the plain ones and chosen when the program runs, so there are no machine flags here.
Where nvcc is found, the CUDA kernels become a second module; FINF_CUDA=0 in the environment leaves them out.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

JOBS = min(8, os.cpu_count() or 1)  # each compiler takes up to 500 MB
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))
KERNELS = sorted(glob("csrc/cuda/*.cu"))
CUDA = "finf_fast._cuda"


class Nvcc:
    """CUDA's compiler."""

    def __init__(self, program):
        self.program = program

    def ask(self, *words):
        answer = subprocess.run([self.program, *words], capture_output=True, text=True, check=True)
        return answer.stdout + answer.stderr

    def libraries(self):
        """Where the toolkit keeps its libraries; the program found may be a link to it or a script that calls it."""
        top = Path(re.search(r"TOP=(.+)", self.ask("--dryrun", "-x", "cu", "-c", os.devnull))[1].strip())
        return [str(path) for path in (top / "lib64", top / "lib") if path.is_dir()]

    def targets(self):
        """Code for A100 and H100/H200. PTX of 9.0 as well as of the newest: what lies between cannot use the latter."""
        newest = max(int(number) for number in re.findall(r"compute_(\d+)\b", self.ask("--list-gpu-arch")))
        pairs = [(80, "sm_80"), (90, "sm_90"), (90, "compute_90"), (newest, f"compute_{newest}")]
        return [f"-gencode=arch=compute_{number},code={code}" for number, code in dict.fromkeys(pairs)]

    def compile(self, source, folder):
        target = Path(folder) / f"{Path(source).stem}.cuda.o"
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-Wall,-Wextra,-Wno-unknown-pragmas", *self.targets()]
        subprocess.run([self.program, "-c", source, "-o", str(target), *flags], check=True)
        return str(target)


class BuildExtension(build_ext):
    """Hands the project's version to the C++ side, so that it is written in one place, and .cu files to nvcc."""

    def build_extension(self, extension):
        extension.define_macros.append(("FINF_VERSION", f'"{self.distribution.get_version()}"'))
        if extension.name == CUDA:
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(JOBS) as pool:
                compiled = pool.map(lambda source: nvcc.compile(source, self.build_temp), KERNELS)
                extension.extra_objects = list(compiled)
        super().build_extension(extension)


# Many a Python was built with -fwrapv and hands it on, under which GCC does not see that x[i + k] are neighbours in
# memory: segment_sum took 9.8 ms instead of 6.6.
OPTIONS = ["-O3", "-fno-wrapv", "-Wall", "-Wextra"]

extensions = [
    Pybind11Extension(
        "finf_fast._C",
        sources=sorted(["csrc/bindings.cpp", *glob("csrc/cpu/**/*.cpp", recursive=True), *glob("csrc/io/*.cpp")]),
        depends=HEADERS,
        cxx_std=17,
        extra_compile_args=OPTIONS,
    )
]

found = shutil.which("nvcc") if os.environ.get("FINF_CUDA") != "0" else None
if found:
    nvcc = Nvcc(found)
    extensions.append(
        Pybind11Extension(
            CUDA,
            sources=["csrc/cuda/bindings.cpp"],
            depends=[*HEADERS, *KERNELS],
            cxx_std=17,
            extra_compile_args=OPTIONS,
            library_dirs=nvcc.libraries(),
            libraries=["cudart_static", "rt", "dl", "pthread"],  # static: a toolkit of another version does no harm
        )
    )

ParallelCompile(default=JOBS).install()
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
