"""The picture of the house cannot rot: top-level names, and imports that point down."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from finf_fast.ops import dispatch

ROOT = Path(__file__).parent.parent
TOP = {"csrc", "finf_fast", "kernels", "tests", "bench", "setup.py", "README.md"}

# A module may import from layers below its own, and inside its own room; rooms of one layer do not know each other.
LAYERS = [
    {"__main__"},
    {"demo"},
    {"pipeline"},
    {"scoring", "steps"},
    {"identity", "engines", "fitting", "regime"},
    {"graphs"},
    {"corpus", "staging", "transfer", "mirrors", "pair", "delta", "dot", "planning", "progress", "scores", "report"},
    {"fold", "order", "ragged"},
    {"calls"},
    {"loss", "update", "skeleton", "topk"},
    {"lowrank", "runs"},
    {"ops"},
    {"reference", "kernels", "_C", "_cuda"},
    {"records", "disk"},
]


def rooms() -> list[Path]:
    return sorted(p for p in (ROOT / "finf_fast").rglob("*.py") if p != ROOT / "finf_fast" / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "finf_fast").parts[0].removesuffix(".py")


def layer_of(room: str) -> int:
    found = [n for n, layer in enumerate(LAYERS) if room in layer]
    assert found, f"{room} has no place in the picture: give it one in tests/test_layout.py"
    return found[0]


def imported_rooms(path: Path, names: set[str]) -> set[str]:
    """Rooms that a module imports, at any depth of the file (a lazy import is an arrow too)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            parts = node.module.split(".")
            if parts[0] == "finf_fast":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("finf_fast.")}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return found & names


def test_the_fixed_names_stand_at_the_top():
    assert {p.name for p in ROOT.iterdir()} >= TOP


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()  # PyPI has another `kernels`
    assert not (ROOT / "bench" / "__init__.py").exists()


@pytest.mark.parametrize("path", rooms(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    names = set().union(*LAYERS)
    mine = room_of(path)
    for other in imported_rooms(path, names):
        allowed = other == mine or layer_of(other) > layer_of(mine)
        assert allowed, f"{path.relative_to(ROOT)} ({mine}) imports {other}: an arrow that points up or sideways"


def test_every_room_has_a_place():
    assert {room_of(p) for p in rooms()} <= set().union(*LAYERS)


COMPILED = [op for op, row in dispatch.TABLE.items() if "cpp" in row]


@pytest.mark.parametrize("op", COMPILED)
def test_an_operation_is_found_by_one_name(op):
    wanted = {
        f"finf_fast/ops/{op}.py",
        f"finf_fast/reference/{op}.py",
        f"csrc/cpu/{op}.cpp",
        f"tests/test_{op}.py",
        f"bench/bench_{op}.py",
        *([f"csrc/cuda/{op}.cu"] if "cuda" in dispatch.TABLE[op] else []),
    }
    if "triton" in dispatch.TABLE[op]:
        wanted.add(f"kernels/{op}.py")
    assert {path for path in wanted if not (ROOT / path).is_file()} == set()


def test_compiled_code_knows_no_torch():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu")]
    assert sources
    assert [str(p) for p in sources if "torch/" in p.read_text() or "ATen" in p.read_text()] == []
    border = {str(p.relative_to(ROOT / "csrc")) for p in sources if "py::" in p.read_text()}
    assert border == {"border.h", "bindings.cpp", "io/bindings.cpp", "cuda/bindings.cpp"}


def test_files_stay_short():
    long = {str(p.relative_to(ROOT)): n for p in rooms() if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}
