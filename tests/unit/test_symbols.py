"""Objects of one instruction set share no code with the others: the linker keeps one copy of a weak symbol, and if that
is one compiled for AVX-512, every other machine that calls it crashes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OBJECTS = sorted(path for isa in ("avx512", "avx2", "portable") for path in ROOT.glob(f"build/temp*/{isa}/**/*.o"))
CODE_AND_DATA = "TDBRVWuw"      # nm's letters of what an object defines for others, weak or not


def defined(objects: list[Path]) -> list[tuple[str, str, str]]:
    """(object, nm's letter, demangled name) of every symbol that others can see."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    command = ["nm", "-C", "-A", "--defined-only", "--extern-only", *objects]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split(":", 1) for line in out.splitlines()]
    return [(file, *rest.split(maxsplit=2)[1:]) for file, rest in rows]  # type: ignore[misc]


@pytest.mark.skipif(not OBJECTS, reason="the extension was not built in this checkout")
def test_kernel_units_define_nothing_but_their_own() -> None:
    """Whatever they define is in the namespace of their instruction set (or is an address of the C++ runtime's)."""
    found = defined(OBJECTS)
    assert any("make_gemm" in name for _, _, name in found)
    strays = [(Path(file).relative_to(ROOT), letter, name) for file, letter, name in found if letter in CODE_AND_DATA
              and f"pk::{isa_of(file)}::" not in name and not name.startswith("DW.ref.")]
    assert not strays


def isa_of(file: str) -> str:
    return next(part for part in Path(file).relative_to(ROOT).parts if part in ("avx512", "avx2", "portable"))


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("nm") is None, reason="no g++")
def test_what_it_is_about(tmp_path: Path) -> None:
    """A standard template does leave such a symbol."""
    source, target = tmp_path / "unit.cpp", tmp_path / "unit.o"
    source.write_text("#include <vector>\nint f(std::vector<int>& v) { v.push_back(1); return v.back(); }\n")
    subprocess.run(["g++", "-O0", "-c", source, "-o", target], check=True, timeout=120)
    assert any(letter in "Wuv" and name.startswith("std::") for _, letter, name in defined([target]))
