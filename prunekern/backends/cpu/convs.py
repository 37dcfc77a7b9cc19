"""Convolutions as ops of the engine: which algorithms there are, and which one runs.

An algorithm says what it takes, in which form it reads and writes (with which halo), and emits its ops. Which one
runs is the tuner's choice (tuner.py), or that of ``favourite`` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from prunekern.backends.cpu import bands, bf16, depthwise, gemm, planar, winograd
from prunekern.backends.cpu.builder import Builder
from prunekern.backends.cpu.geometry import Geometry
from prunekern.backends.cpu.layout import Need
from prunekern.backends.cpu.place import Form, Halo
from prunekern.core.program import Step


@dataclass(frozen=True)
class Algorithm:
    """A way to run a `conv` Step. form: of its output; of its input too unless ``reads`` says otherwise. takes: why it
    cannot run a geometry, or None. error: its row in ``lower/tolerance.py``."""

    name: str
    form: Form
    takes: Callable[[Geometry], str | None]
    emit: Callable[[Builder, Step, Geometry], None]
    halo: Callable[[Geometry], Halo] = Geometry.halo
    error: str = "direct"
    reads: Form | None = None


def _any(geometry: Geometry) -> str | None:
    return None


def _windowed(geometry: Geometry) -> str | None:
    if math.prod(geometry.kernel) == 1:
        return "a 1x1 window is a row already"
    return "it takes one group" if geometry.groups > 1 else None


GEMM = Algorithm("implicit GEMM", Form.LAST, _any, gemm.emit)
BF16 = Algorithm(bf16.GEMM, Form.LAST, bf16.takes, partial(gemm.emit, form=Form.PAIRS), error=bf16.ROW,
                 reads=Form.PAIRS)
IM2COL = Algorithm("im2col", Form.LAST, _windowed, gemm.emit_im2col)
DEPTHWISE = Algorithm("depthwise", Form.LAST, depthwise.takes, depthwise.emit)
PLANAR = [Algorithm("planar", Form.PLANAR, planar.takes, planar.emit),
          Algorithm("planar by images", Form.IMAGES, planar.takes_images, planar.emit_images)]
BANDS = Algorithm("in bands", Form.LAST, bands.takes, bands.emit)
BF16_BANDS = Algorithm("bf16 in bands", Form.LAST, bands.takes, partial(bands.emit, form=Form.PAIRS), error=bf16.ROW,
                       reads=Form.PAIRS)
WINOGRAD = {m: Algorithm(f"winograd {m}x{m}", Form.LAST, winograd.takes, partial(winograd.emit, m),
                         error=f"winograd {m}x{m}") for m in winograd.POINTS}


# ---- which one -------------------------------------------------------------------------------------------------


def algorithms(dtype: str = "fp32") -> dict[str, Algorithm]:
    """Every way to run a convolution, by name; the last resort first. dtype: of products, as a user allows it."""
    rounding = (BF16, BF16_BANDS) if dtype == "bf16" else ()
    return {each.name: each for each in (GEMM, IM2COL, DEPTHWISE, BANDS, *WINOGRAD.values(), *PLANAR, *rounding)}


FEW_TILES = 8           # of Winograd: below, its weights (4 times the layer's) take longer to read than it saves
LARGE = 1 << 20         # floats of them that no cache near the core holds
WASTE = 1.4             # lanes that registers of output channels have over what is used, from which pixels suit better


def favourite(builder: Builder, geometry: Geometry) -> Algorithm:
    """A sound guess, where nothing was measured: what the benchmarks favour for geometries of this kind."""
    if geometry.is_depthwise:
        return DEPTHWISE
    if builder.settings.dtype == "bf16" and BF16.takes(geometry) is None:
        return BF16_BANDS if bands.pays(geometry) else BF16
    if bands.pays(geometry):
        return BANDS
    if winograd.takes(geometry) is None and min(geometry.channels, geometry.outputs) >= 8 \
            and min(geometry.out) >= 4:
        tiles = geometry.batch * math.prod(-(-size // 4) for size in geometry.out)
        return WINOGRAD[4] if tiles >= FEW_TILES or 36 * geometry.channels * geometry.outputs < LARGE else GEMM
    wasteful = builder.isa.padded(geometry.outputs) > WASTE * geometry.outputs
    dense = geometry.groups == 1 and math.prod(geometry.kernel) > 1 and set(geometry.stride) == {1}
    return PLANAR[0] if wasteful and dense and planar.takes(geometry) is None else GEMM


def chosen(builder: Builder, step: Step) -> tuple[Algorithm, Geometry]:
    """The algorithm of a step: what was asked for where it can, else a guess."""
    geometry = Geometry.of(builder, step)
    wanted = algorithms(builder.settings.dtype).get(builder.settings.choices.get(step.name, ""))
    if wanted is not None and wanted.takes(geometry) is None:
        return wanted, geometry
    return favourite(builder, geometry), geometry


class Conv:
    """See ``builder.Compiler``."""

    def takes(self, builder: Builder, step: Step) -> str | None:
        return "more than three spatial axes" if len(step.output.shape) > 5 else None

    def needs(self, builder: Builder, step: Step) -> Iterable[Need]:
        algorithm, geometry = chosen(builder, step)
        yield Need(step.inputs[0], algorithm.reads or algorithm.form, algorithm.halo(geometry))
        if step.epilogue.residual is not None:
            yield Need(step.epilogue.residual, algorithm.form)

    def gives(self, builder: Builder, step: Step) -> Form:
        return chosen(builder, step)[0].form

    def emit(self, builder: Builder, step: Step) -> None:
        algorithm, geometry = chosen(builder, step)
        builder.algorithms[step.name] = gemm.POINTWISE if algorithm is GEMM and math.prod(geometry.kernel) == 1 \
            else algorithm.name
        builder.rows[step.name] = algorithm.error
        algorithm.emit(builder, step, geometry)
