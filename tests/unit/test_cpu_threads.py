"""The CPU engine called from many threads, in children of a fork, with as many threads as asked for; and what happens
when memory runs out in one of its own."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekern.backends import Lowered, lower
from prunekern.backends.cpu.native import Network, Recipe, instruction_sets, isa

if not instruction_sets():
    pytest.skip("the extension is not built", allow_module_level=True)

ROOT = Path(__file__).parents[2]
FLAGS = os.environ.get("PRUNEKERN_CXXFLAGS", "")


def network(width: int = 24) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Flatten(), nn.Linear(width * 36, 10)).eval()


def lowered_with(threads: int, width: int = 24) -> Lowered:
    return lower(network(width), torch.randn(2, 3, 12, 12), backend="cpu", num_threads=threads, tune="off",
                 verify=False)


# ---- many callers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [(3,), tuple(range(1, 20))], ids=["one size", "more sizes than are kept"])
@pytest.mark.parametrize("threads", [1, 3])
def test_many_callers(batches: tuple[int, ...], threads: int) -> None:
    """More of them than jobs the pool takes at a time; placements come and go while others run."""
    lowered = lowered_with(threads)
    inputs = [torch.randn(batches[i % len(batches)], 3, 12, 12) for i in range(240)]
    expected = [lowered(x) for x in inputs]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(24) as pool:
            found = list(pool.map(lowered, inputs))
    finally:
        sys.setswitchinterval(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_other_python_threads_go_on() -> None:
    """The GIL is released during a call."""
    lowered = lowered_with(1, width=64)
    x = torch.randn(192, 3, 12, 12)
    lowered(x)
    done, ticks = threading.Event(), 0

    def call() -> None:
        for _ in range(3):
            lowered(x)
        done.set()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)                            # nobody is asked to give the GIL away
    try:
        worker = threading.Thread(target=call)
        worker.start()
        while not done.is_set():
            ticks += 1
            time.sleep(1e-4)
        worker.join()
    finally:
        sys.setswitchinterval(before)
    assert ticks > 10


def test_a_network_that_is_forgotten_while_it_runs() -> None:
    """What a call reads lives until it ends."""
    lowered = lowered_with(2)
    x = torch.randn(64, 3, 12, 12)
    expected = lowered(x)
    direct = lowered._direct
    assert direct is not None
    del lowered
    noise = [torch.full((1000,), float("nan")) for _ in range(1000)]     # takes what was freed
    found = direct(x)
    assert len(noise) == 1000
    assert found is not None
    assert torch.equal(found, expected)


# ---- how many threads --------------------------------------------------------------------------------------------


COUNT = """
    import os, sys, torch
    torch.set_num_threads(1)
    sys.path.insert(0, {root!r})
    from tests.unit.test_cpu_threads import lowered_with
    x = torch.randn(64, 3, 12, 12)
    counts = []
    for threads in (1, 2, 5, 3):
        lowered = lowered_with(threads)
        before = len(os.listdir("/proc/self/task"))
        for _ in range(5):
            lowered(x)
        counts.append(len(os.listdir("/proc/self/task")) - before)
    print(counts)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_as_many_threads_as_asked_for() -> None:
    """The caller is one of them; they are kept for later calls."""
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(COUNT.format(root=str(ROOT)))], capture_output=True,
                         text=True, cwd=ROOT, timeout=120, check=True).stdout
    assert out.strip() == "[0, 1, 3, 0]"


# ---- fork --------------------------------------------------------------------------------------------------------


def _in_child(lowered: Lowered, x: Tensor, expected: Tensor) -> None:
    good = all(torch.equal(lowered(x), expected) for _ in range(3))
    os._exit(0 if good else 3)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_children_of_a_fork() -> None:
    """A child has none of the parent's threads, and starts its own."""
    lowered, x = lowered_with(3), torch.randn(32, 3, 12, 12)
    expected = lowered(x)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_in_child, args=(lowered, x, expected)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        stuck = child.is_alive()
        child.kill()
        assert not stuck
        assert child.exitcode == 0
    assert torch.equal(lowered(x), expected)


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slices", [1, 8])
def test_no_memory_is_an_exception(slices: int) -> None:
    """Wherever it happens: in the caller's thread and in the pool's; later calls are well."""
    lowered, x = lowered_with(3), torch.randn(32, 3, 12, 12)
    expected = lowered(x)
    huge = Network(Recipe(isa().name, 3, 1 << 60, (), slices), [])
    for _ in range(20):
        with pytest.raises(MemoryError):
            huge.run(huge.handle, 0, 0, 0)
    assert torch.equal(lowered(x), expected)


def test_wrong_numbers_of_addresses_are_refused() -> None:
    network = Network(Recipe(isa().name, 1, 64, (), 1, (0, 0)), [])
    with pytest.raises(ValueError, match="number of addresses"):
        network.run(network.handle, 0, 0, 0, 1)


def built(tmp_path: Path, sanitizer: str) -> Path:
    """The pool's stress test, compiled with a sanitizer; skips where the compiler has none."""
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no {compiler[0]}")
    program = tmp_path / "stress"
    sources = [ROOT / "tests" / "native" / "pool_stress.cpp", ROOT / "csrc" / "cpu" / "pool.cpp"]
    command: list[Any] = [*compiler, "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-pthread",
                          f"-I{ROOT / 'csrc' / 'cpu'}", *sources, "-o", program]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if made.returncode and ("cannot find" in made.stderr or "unsupported option" in made.stderr):
        pytest.skip(f"the compiler has no {sanitizer} sanitizer")
    assert made.returncode == 0, made.stderr
    return program


@pytest.mark.skipif("address" in FLAGS, reason="two sanitizers do not go together")
def test_pool_under_the_thread_sanitizer(tmp_path: Path) -> None:
    """Every task is done once, exceptions reach their caller, nothing races (tests/native/pool_stress.cpp)."""
    run = subprocess.run([built(tmp_path, "thread")], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("the thread sanitizer does not run on this kernel")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip() == "good"
