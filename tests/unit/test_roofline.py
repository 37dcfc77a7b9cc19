"""The machine's roof: the loops that measure it do the work that they are credited with."""

from __future__ import annotations

import pytest
import torch

from prunekern.backends.cpu import native
from prunekern.backends.roofline import CHAINS, READ, SIZES, Roof, measure_roof
from prunekern.kernels import unavailable

CPU = torch.device("cpu")
SETS = native.instruction_sets()


def run(isa: str, threads: int, op: str, fields: dict[str, int]) -> None:
    network = native.Network(native.Recipe(isa, threads, 0, (native.NativeOp(op, op, fields),)), ())
    network.run(network.handle, 0, 1, 0)


def test_least_time() -> None:
    roof = Roof(100.0, ((10, 50.0), (1000, 5.0)))
    assert roof.seconds(200, 0) == 2.0
    assert roof.seconds(0, 10) == 0.2
    assert roof.seconds(0, 11) == 2.2
    assert roof.seconds(0, 5000) == 1000.0
    assert roof.seconds(200, 5) == 2.0


@pytest.mark.parametrize("isa", SETS)
def test_multiply_adds_are_done(isa: str) -> None:
    """x -> x/2 + 1/4 from task + chain: r rounds leave 1/2 + (x - 1/2) / 2^r, in every lane of every chain."""
    tasks, rounds, lanes = 3, 4, native.extension().lanes(isa)
    sink = torch.zeros(tasks)
    run(isa, 2, "fma_peak", {"tasks": tasks, "rounds": rounds, "sink": sink.data_ptr()})
    wanted = [lanes * sum(0.5 + (task + chain - 0.5) / 2 ** rounds for chain in range(CHAINS))
              for task in range(tasks)]
    assert sink.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("isa", SETS)
def test_everything_is_read_every_round(isa: str) -> None:
    tasks, rounds, count = 2, 3, 5 * READ
    source, sink = torch.randint(-8, 8, (tasks, count)).float(), torch.zeros(tasks)
    run(isa, 2, "read_peak", {"tasks": tasks, "rounds": rounds, "count": count, "from": source.data_ptr(),
                              "sink": sink.data_ptr()})
    assert torch.equal(sink, rounds * source.sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_measured(dtype: torch.dtype) -> None:
    roof = measure_roof(CPU, dtype, 1)
    assert roof.macs > 1e8
    assert [size for size, _ in roof.bandwidth] == list(SIZES)
    assert all(speed > 1e8 for _, speed in roof.bandwidth)
    assert measure_roof(CPU, dtype, 1) is roof
    native_loops = dtype == torch.float32 and unavailable() is None
    assert roof.how.startswith("multiply-adds on registers" if native_loops else "torch's GEMM")
    assert torch.get_num_threads() >= 1


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    measure_roof(CPU, torch.float64, before + 1)
    assert torch.get_num_threads() == before
