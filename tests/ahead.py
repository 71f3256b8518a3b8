"""Compiles a Triton kernel for a GPU that is not there, and reads its machine code."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from finf_fast.kernels.configurations import OPTIONS, Specimen

TOLD = ("HGMMA", "HMMA", "UTCHMMA", "UTMALDG", "LDGSTS", "MUFU")
# ptxas gives up registers for local memory by these.
SPILLS = ("LDL", "STL")


@dataclass(frozen=True)
class Compiled:
    """What came out for one specimen."""

    registers: int  # of a thread
    stack: int  # bytes of a thread
    shared: int  # bytes of a program
    threads: int
    ptx: str
    sass: str

    def count(self, instruction: str) -> int:
        """How often an instruction stands in the machine code, under any of its modifiers."""
        return len(re.findall(rf"\b{re.escape(instruction)}\b", self.sass))

    @property
    def spills(self) -> int:
        return sum(self.count(instruction) for instruction in SPILLS)

    def __str__(self) -> str:
        seen = {name: n for name in TOLD if (n := self.count(name))}
        return f"{self.registers} registers, stack {self.stack}, spills {self.spills}, shared {self.shared}, {seen}"


def compile_for(architecture: int, specimen: Specimen) -> Compiled:
    """The specimen's kernel for compute capability `architecture`; needs neither a GPU nor its driver."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = specimen.kernel
    names = kernel.arg_names
    unknown = set(names) ^ (specimen.signature.keys() | specimen.constexprs.keys())
    assert not unknown, f"{specimen.name}: arguments and those described differ by {sorted(unknown)}"
    source = ASTSource(
        fn=kernel,
        signature={name: specimen.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in specimen.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in _aligned(specimen)},
    )
    options = {**OPTIONS, "num_warps": specimen.num_warps, "num_stages": specimen.num_stages, **specimen.options}
    done = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return _look_into(done)


def _aligned(specimen: Specimen) -> list[str]:
    """Arguments that Triton would find to be multiples of 16 at a launch, of those that it looks at."""
    whole = [name for name, kind in specimen.signature.items() if kind.startswith(("*", "i", "u"))]
    unseen = {param.name for param in specimen.kernel.params if param.do_not_specialize}
    return [name for name in whole if name not in specimen.unaligned and name not in unseen]


def _look_into(done) -> Compiled:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    warps = done.metadata.num_warps
    return Compiled(found["REG"], found["STACK"], done.metadata.shared, 32 * warps, done.asm["ptx"], sass)


def tool(name: str, *arguments: str) -> str:
    """Output of one of the CUDA tools inside Triton's wheel."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout
