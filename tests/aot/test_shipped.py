"""Every shipped config, compiled ahead for chips that are not there: it fits, spills nothing, uses the matrix unit."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from prunekern_triton.ahead import COUNTED, Compiled, compile_ahead
from prunekern_triton.catalogue import Case, faults, shipped
from prunekern_triton.configs import ARCHITECTURES, SHARED, UNITS, candidates, ranked
from prunekern_triton.launch import Config

pytestmark = pytest.mark.aot

CASES = [(arch, case) for arch in (80, 90) for case in shipped(arch)]


@pytest.mark.parametrize(("arch", "case"), CASES, ids=[f"sm_{arch} {case}" for arch, case in CASES])
def test_shipped(arch: int, case: Case) -> None:
    assert faults(case, compile_ahead(case.launch, arch)) == []


def test_the_checks_see_what_is_wrong() -> None:
    """A tile that needs more registers and memory than there are."""
    case = next(case for case in shipped(90) if case.title == "gemm" and case.kind == "fp16")
    large = next(iter(_with(case, Config(256, 256, 64, 4, 5))))
    found = " ".join(faults(large, compile_ahead(large.launch, 90)))
    assert "shared memory" in found
    assert "spill" in found
    good = Compiled("k", 90, 64, 0, 1000, dict.fromkeys(COUNTED, 0))
    assert faults(case, good) == ["no HGMMA"]
    tma = next(case for case in shipped(90) if case.tma)
    assert faults(tma, good) == ["no HGMMA", "no UTMALDG"]


def _with(case: Case, config: Config) -> list[Case]:
    from dataclasses import replace
    constants = {**case.launch.constants, "BM": config.m, "BN": config.n, "BK": config.k}
    launch = replace(case.launch, constants=constants, warps=config.warps, stages=config.stages)
    return [replace(case, config=config, launch=launch)]


def test_the_table_knows_every_chip() -> None:
    for arch in ARCHITECTURES:
        assert arch in SHARED
        assert arch in UNITS
        for kind in ("half", "tf32", "ieee"):
            assert any(c.m == 16 for c in candidates(kind, arch)), "small batches"
            for m, n, k in ((1, 10, 13), (64, 1000, 512), (100352, 64, 147), (50176, 13, 117)):
                assert ranked(kind, arch, m, n, k, UNITS[arch])
