"""Every Triton kernel compiled for GPUs that are not there: nothing spilt, within their memory, on their tensor cores.

What a compiler can show; that the numbers are right is shown by the operations' tests under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

import ahead

KERNELS = Path(__file__).parent.parent / "kernels"
# The two that are to be run, and the tables' other rows, of which one specimen a kernel and type is compiled.
ARCHITECTURES, OTHERS = (80, 90), (89, 100)

pytestmark = [
    pytest.mark.prove,  # Triton is a large download: `make prove` installs it
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted, there is no compiler"
    ),
]


def files_with_specimens() -> list[str]:
    return [path.stem for path in sorted(KERNELS.glob("*.py")) if "\ndef specimens(" in path.read_text()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", files_with_specimens())
def test_compiles_within_its_limits(file, architecture):
    """What each specimen takes is printed: `pytest -rP` shows it."""
    pytest.importorskip("triton")
    from finf_fast.kernels.configurations import SHARED_MEMORY

    module, failures = importlib.import_module(f"finf_fast.kernels.{file}"), []
    for specimen in module.specimens(architecture):
        built = ahead.compile_for(architecture, specimen)
        print(f"sm_{architecture} {file} {specimen.name}: {built}")
        missing = [name for name in specimen.instructions if not built.count(name)]
        if built.stack or built.spills or missing or built.shared > SHARED_MEMORY[architecture]:
            failures.append(f"{specimen.name}: {built}, without {missing}")
    assert not failures


@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.parametrize("file", files_with_specimens())
def test_other_rows_fit_into_memory(file, architecture):
    """One specimen of each kernel and type, the last, of attention the widest; what spills there is not looked for."""
    pytest.importorskip("triton")
    from finf_fast.kernels.configurations import SHARED_MEMORY

    module = importlib.import_module(f"finf_fast.kernels.{file}")
    last = {(one.kernel, "bf16" in str(one.signature)): one for one in module.specimens(architecture)}
    for specimen in last.values():
        built = ahead.compile_for(architecture, specimen)
        assert built.shared <= SHARED_MEMORY[architecture], f"{specimen.name}: {built}"


def test_an_argument_that_is_not_specialized_is_not_taken_for_aligned():
    triton = pytest.importorskip("triton")
    import triton.language as tl

    from finf_fast.kernels.configurations import Specimen

    def add(X, N, D):
        tl.store(X + tl.arange(0, 16), N + D)

    specimen = Specimen("add", triton.jit(do_not_specialize=["N"])(add), dict(X="*i32", N="i32", D="i32"), {}, 1, 1)
    assert ahead._aligned(specimen) == ["X", "D"]


def test_the_harness_sees_spills_stack_and_tensor_cores():
    """A kernel that must spill is caught, and one that cannot is not."""
    triton = pytest.importorskip("triton")
    import triton.language as tl

    from finf_fast.kernels.configurations import Specimen

    @triton.jit
    def crowded(X, Y, SIZE: tl.constexpr):
        offs = tl.arange(0, SIZE)
        x = tl.load(X + offs)
        tl.store(Y + offs, tl.cumsum(x) * x)

    def built(**options):
        signature = {"X": "*fp32", "Y": "*fp32"}
        return ahead.compile_for(90, Specimen("crowded", crowded, signature, {"SIZE": 4096}, 1, 1, options=options))

    assert built().stack == built().spills == 0
    assert built(maxnreg=40).spills > 0
    assert built().count("HGMMA") == 0
