"""nvcc takes every kernel for each architecture we build for: no spills, no stack, 16-byte loads where meant."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ahead import tool

pytestmark = pytest.mark.prove
ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

# Types of a kernel's template, as its name has them, and the 16-byte words of eight numbers or of sixteen decoded ones.
WORDS = {"f": 2, "NS0_4Bf16E": 1, "S3_": 1, "d": 4, "j": 4, "t": 2, "i": 4, "s": 2, "h": 1, "a": 1}


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def architecture(request):
    return request.param


@pytest.fixture(scope="module", params=KERNELS, ids=lambda path: path.stem)
def built(request, architecture, tmp_path_factory):
    """A source's cubin, and what ptxas said of it."""
    nvcc = shutil.which("nvcc") or pytest.skip("no nvcc")
    cubin = tmp_path_factory.mktemp("cuda") / f"{request.param.stem}.cubin"
    flags = [f"-arch={architecture}", "-std=c++17", "-O3", "-Xptxas", "-v", "--Werror", "all-warnings"]
    done = subprocess.run([nvcc, "-cubin", *flags, request.param, "-o", cubin], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cubin, done.stderr


def test_no_spills_and_no_stack(built):
    _, said = built
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert frames and set(frames) == {("0", "0", "0")}, said


def meant(kernel: str, queries: int, words: list[int]) -> dict[str, int]:
    """How many 16-byte accesses a kernel's code should have at the least, by the words of its types."""
    if kernel.startswith("cross_entropy_delta"):
        z, d = words
        # Loads before the first round, ahead of the next one, and at the ends of a row; a large change reads again.
        rounds, again = 3 * (z + queries * d), z + d
        return {"LDG": {"part": rounds, "finish": again}.get(kernel.split("_")[-1], rounds + again)}
    if kernel.startswith("squared_error_delta"):
        p, y, d = words
        return {"LDG": p + y + 4 * d}
    if kernel == "decode_pixels_kernel":
        return {"LDG": 1, "STG": words[0]}
    if kernel == "decode_tokens_kernel":
        return {"LDG": 1, "STG": 8 // words[0]}  # a load holds 16, 8 or 4 numbers, a store 2
    if kernel == "topk_merge_scores":
        return {"LDG": 2 * 4}  # as many at a time before the first round, and ahead of the next one
    return {"noise_kernel": {"STG": 1}, "segment_sum_kernel": {}, "topk_merge_parts": {}}[kernel]


def test_16_byte_loads_and_stores_where_they_are_meant(built):
    pytest.importorskip("triton")  # whose wheel has the tools
    cubin, _ = built
    kernels = tool("cuobjdump", "--dump-sass", str(cubin)).split("Function : ")[1:]
    names = [re.search(rf"\d({cubin.stem}\w*?)(?:I(?:Li(\d)E)?(\w+?)EEv|E)", code.split()[0]) for code in kernels]
    assert names and all(names), [code.split()[0] for code in kernels]
    for code, name in zip(kernels, names, strict=True):
        types = re.findall("|".join(WORDS), name[3] or "")
        for access, least in meant(name[1], int(name[2] or 1), [WORDS[kind] for kind in types]).items():
            found = len(re.findall(rf"\b{access}\.E\.128\b", code))
            assert found >= least, f"{name[0]}: {found} of {access}.E.128, wanted {least}"
