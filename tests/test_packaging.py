"""What is shipped: every source, every package, no machine flags; and that it installs from itself, each way there is.

The quick tests ask setuptools what it would do. The long ones (`make prove`) do it: source archive, wheel out of the
archive, a fresh environment; an editable install; a build in place; with build isolation, so without torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import setuptools  # noqa: F401  brings distutils where Python no longer does

import finf_fast
from finf_fast import _C

ROOT = Path(__file__).parent.parent
# Folders at the top that are installed inside the package; alone they are no packages and have no __init__.py.
BESIDE = ("bench", "kernels")


@pytest.fixture(scope="module")
def distribution():
    """What setup.py and pyproject.toml together say, nothing being run."""
    from distutils.core import run_setup

    before = Path.cwd()
    os.chdir(ROOT)
    try:
        yield run_setup("setup.py", stop_after="commandline")
    finally:
        os.chdir(before)


def test_every_room_is_a_package(distribution):
    rooms = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "finf_fast").rglob("__init__.py")}
    beside = {f"finf_fast.{name}" for name in BESIDE}
    below = {
        ".".join(("finf_fast", *p.parent.relative_to(ROOT).parts))
        for name in BESIDE
        for p in (ROOT / name).glob("*/**/*.py")
    }
    assert set(distribution.packages) == rooms | beside | below
    assert {name: distribution.package_dir[name] for name in beside} == {f"finf_fast.{n}": n for n in BESIDE}


def test_every_module_lies_in_a_package(distribution):
    folders = {name.replace(".", "/") for name in distribution.packages}
    stray = [p for p in (ROOT / "finf_fast").rglob("*.py") if str(p.parent.relative_to(ROOT)) not in folders]
    assert not stray, f"not shipped: {stray}"


def test_no_file_would_be_left_behind():
    other = [
        p for p in (ROOT / "finf_fast").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc", ".so", ".pyd")
    ]
    assert not other, f"shipped only if pyproject.toml names them as package data: {other}"


def test_one_version(distribution):
    assert distribution.get_version() == finf_fast.__version__ == _C.build_info()["version"]


def test_no_machine_flags(distribution):
    flags = [flag for extension in distribution.ext_modules for flag in extension.extra_compile_args]
    assert flags and not [flag for flag in flags if flag.startswith(("-m", "-ffast"))]


def test_building_needs_no_torch():
    text = (ROOT / "pyproject.toml").read_text()
    build = text[text.index("[build-system]") : text.index("[project]")]
    assert "pybind11" in build
    assert "torch" not in build


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> set[str]:
    """Paths in the source archive, as setuptools lists them."""
    folder = tmp_path_factory.mktemp("egg")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set((folder / "finf_fast.egg-info" / "SOURCES.txt").read_text().splitlines())


def test_the_archive_holds_every_source(shipped):
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    sources += [p for folder in ("finf_fast", "tests", *BESIDE) for p in (ROOT / folder).rglob("*.py")]
    missing = {p.relative_to(ROOT).as_posix() for p in sources} - shipped
    assert not missing
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile"} <= shipped


def test_the_archive_holds_nothing_built(shipped):
    built = [path for path in shipped if path.startswith("build/") or path.endswith((".so", ".o", ".pyc"))]
    assert not built


SMOKE = """
import pathlib, sys, torch
import finf_fast
from finf_fast import _C
from finf_fast.bench import measure
from finf_fast.ops import cross_entropy_delta
where = [pathlib.Path(module.__file__).resolve() for module in (finf_fast, _C, measure)]
home = pathlib.Path(sys.argv[1]).resolve()
assert all(home in path.parents for path in where), where
z, dz, target = torch.randn(5, 100).double(), torch.randn(2, 5, 100).double(), torch.arange(5)
base, delta = cross_entropy_delta(z.float(), dz.float(), target)
want = torch.nn.functional.cross_entropy(z + dz[1], target, reduction="none") - torch.nn.functional.cross_entropy(
    z, target, reduction="none")
assert (delta[1] - want).abs().max() < 1e-4
"""


class Environment:
    """A fresh virtual environment that sees this one's packages (torch is large) but not its finf_fast."""

    def __init__(self, folder: Path):
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        self.folder, self.bin = folder, folder / ("Scripts" if os.name == "nt" else "bin")
        site = self.output("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *filter(os.path.isdir, sys.path)}
        seen = sorted(path for path in here if Path(path, "torch").is_dir() or Path(path, "typer").is_dir())
        Path(site, "zz_borrowed.pth").write_text("\n".join(seen))  # last: what is installed here comes first

    def output(self, *arguments: str, **variables: str) -> str:
        """Standard output of this environment's Python, started outside the checkout."""
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
        command = [str(self.bin / "python"), *arguments]
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout


# Two minutes of compiling, which the archive's wheel takes for all three.
WITHOUT_CUDA = {"FINF_CUDA": "0"}


def copy_of_checkout(folder: Path) -> Path:
    leave = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__", ".*_cache"
    )
    return Path(shutil.copytree(ROOT, folder / "checkout", ignore=leave))


@pytest.mark.prove
def test_archive_to_wheel_to_fresh_environment(tmp_path):
    source = copy_of_checkout(tmp_path)
    subprocess.run([sys.executable, "-m", "build", "--sdist", "--outdir", str(tmp_path), str(source)], check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    fresh = Environment(tmp_path / "env")
    fresh.output("-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(archive))
    (wheel,) = tmp_path.glob("*.whl")
    fresh.output("-m", "pip", "install", "--no-deps", str(wheel))
    fresh.output("-c", SMOKE, str(fresh.folder))
    assert "cross_entropy_delta" in fresh.output("-m", "finf_fast", "info")
    assert (fresh.bin / "finf-fast").exists()


@pytest.mark.prove
def test_editable_install(tmp_path):
    source = copy_of_checkout(tmp_path)
    fresh = Environment(tmp_path / "env")
    fresh.output("-m", "pip", "install", "--no-deps", "--editable", str(source), **WITHOUT_CUDA)
    fresh.output("-c", SMOKE, str(source))


@pytest.mark.prove
def test_build_in_place(tmp_path):
    source = copy_of_checkout(tmp_path)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=source, env={**os.environ, **WITHOUT_CUDA}, check=True)
    code = f"import sys; sys.path.insert(0, {str(source)!r})\n{SMOKE}"
    subprocess.run([sys.executable, "-c", code, str(source)], cwd=tmp_path, check=True)
