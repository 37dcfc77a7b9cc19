"""The machine that runs CUDA kernels on the host finds what it is there to find: each fault here is planted."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cuda import host

HEAD = """
#include "cuda/ptx.h"
#include "host/streams.h"
using namespace pk::cuda;
struct Sum {
  static void run(const float* x, float* y) {
    PK_SHARED(shared);
    float* const all = reinterpret_cast<float*>(shared);
    const int t = int(threadIdx.x);
    BODY
  }
};
int main() {
  std::vector<float> x(64), y(64, 0.f);
  for (int i = 0; i < 64; ++i) x[size_t(i)] = float(i);
  pk::host::launch(1, 64, 64 * sizeof(float), false, [&] { Sum::run(x.data(), y.data()); });
  for (int i = 0; i < 64; ++i)
    if (!(y[size_t(i)] == float(63 - i))) { std::printf("wrong\\n"); return 3; }
  std::printf("right\\n");
}
"""
RIGHT = "all[t] = x[t]; __syncthreads(); y[t] = all[63 - t];"
COPY = ("if (t < 16) copy_async(all + 4 * t, x + 4 * t, 16); commit_copies(); {before} __syncthreads(); "
        "y[t] = all[63 - t]; {after}")
WAIT = "wait_copies<0>();"


def run(body: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    source, program = folder / "kernel.cpp", folder / "kernel"
    source.write_text(HEAD.replace("BODY", body))
    root = host.ROOT / "csrc"
    subprocess.run([*host.compiler(), "-std=c++17", "-O1", "-g1", *flags, "-include", str(root / "host/cuda_on_host.h"),
                    f"-I{root}", str(source), "-o", str(program)], check=True)
    return subprocess.run([str(program)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("body", [RIGHT, COPY.format(before=WAIT, after="")], ids=["barrier", "copies"])
def test_a_right_kernel_is_right(body: str, tmp_path: Path) -> None:
    assert run(body, tmp_path).stdout == "right\n"


@pytest.mark.parametrize("body", [RIGHT.replace("__syncthreads(); ", ""), COPY.format(before="", after=WAIT)],
                         ids=["no barrier", "no wait"])
def test_a_missing_wait_is_seen(body: str, tmp_path: Path) -> None:
    assert run(body, tmp_path).returncode == 3


@pytest.mark.parametrize(("body", "message"), [
    ("if (t < 32) __syncthreads(); else __syncwarp(); " + RIGHT + " if (t) __syncthreads();", "barrier"),
    (COPY.format(before="", after=""), "asynchronous copies under way")], ids=["not all threads", "copies under way"])
def test_what_would_hang_or_race_ends(body: str, message: str, tmp_path: Path) -> None:
    found = run(body, tmp_path)
    assert found.returncode < 0
    assert message in found.stderr


def test_the_address_sanitizer_sees_inside_kernels(tmp_path: Path) -> None:
    found = run(RIGHT.replace("all[63 - t]", "all[64 - t]"), tmp_path, "-fsanitize=address")
    assert "heap-buffer-overflow" in found.stderr
    assert run(RIGHT, tmp_path, "-fsanitize=address").stdout == "right\n"
