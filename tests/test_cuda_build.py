"""nvcc takes every kernel for each architecture we build for: no spills, no stack, 16-byte loads."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.prove
ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_no_spills_and_no_stack(source, architecture, tmp_path):
    nvcc = shutil.which("nvcc") or pytest.skip("no nvcc")
    flags = [f"-arch={architecture}", "-std=c++17", "-O3", "-Xptxas", "-v", "--Werror", "all-warnings"]
    command = [nvcc, "-cubin", *flags, str(source), "-o", str(tmp_path / "out.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert frames and set(frames) == {("0", "0", "0")}, done.stderr
