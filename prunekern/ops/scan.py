"""Operators that look at all positions of some axes: orders and running values, norms, windows, Fourier transforms,
sampling. Channels on other axes pass; those on the axes looked at stay."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional

from prunekern.core.arguments import by_name
from prunekern.core.graph import ShapeOf
from prunekern.core.labels import Tape, spread
from prunekern.core.rule import OpRule, Sample, aten, numel
from prunekern.ops.elementwise import MAP, sample
from prunekern.ops.spatial import give_reduced, without


def axes_of(value: Any, rank: int) -> set[int]:
    """Axis numbers from an argument; None and an empty list are all axes."""
    if value is None or value == []:
        return set(range(rank))
    return {axis % max(1, rank) for axis in (value if isinstance(value, (list, tuple)) else [value])}


class Scan(OpRule):
    """Along one axis: running values and orders (all keep the axis), ranks and medians (which drop it)."""

    matches = aten("cumprod", "cumprod_", "cummax", "cummin", "logcumsumexp", "argsort", "msort", "kthvalue",
                   "median.dim", "nanmedian.dim", "mode", "diff", "renorm")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: x.cumprod(2), "cumprod over positions", MAP),
        sample(lambda x: x.cummax(3)[0], "cummax over positions", MAP),
        sample(lambda x: x.logcumsumexp(3), "logcumsumexp over positions", MAP),
        sample(lambda x: x.cumprod(1), "cumprod over channels", MAP, prunable=False),
        sample(lambda x: x.kthvalue(2, 3)[0], "kthvalue over positions", MAP),
        sample(lambda x: x.median(2, keepdim=True)[0], "median over positions", MAP),
        sample(lambda x: x.diff(dim=2), "differences of rows", MAP),
    )
    reason = "it looks along these channels"

    def axis(self, node: fx.Node, rank: int) -> int:
        default = 0 if "msort" in str(node.target) else -1
        axis: int = by_name(node).get("dim", default)
        return axis % max(1, rank)

    def label(self, node: fx.Node, tape: Tape) -> None:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        if any(isinstance(arg, fx.Node) for arg in (*node.args[1:], *node.kwargs.values())):
            raise NotImplementedError("more than one tensor, or a size from the graph")
        axis = self.axis(node, len(tape.shape(x)))
        planes = tape.across(node, tape.planes(x), (axis,), self.reason)
        give_reduced(node, tape, planes, {axis})

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """One operation per element of the input."""
        return numel(shape(node.args[0]))  # type: ignore[arg-type]


class Norm(OpRule):
    """Norms and other summaries over axes that leave no exact restriction to fewer channels."""

    matches = aten("norm.Scalar", "norm.ScalarOpt_dim_dtype", "frobenius_norm.dim", "linalg_norm", "nansum",
                   "nanmean", "aminmax", "count_nonzero", "median.default", "std.default", "var.default",
                   "std_mean.correction", "std_mean.dim", "var_mean.dim")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: torch.linalg.norm(x.flatten(2), dim=2), "norm over positions", MAP),
        sample(lambda x: x / torch.linalg.norm(x, dim=1, keepdim=True), "norm over channels", MAP, prunable=False),
        sample(lambda x: torch.std_mean(x, dim=(2, 3))[0], "std_mean over positions", MAP),
        sample(lambda x: x.nanmean((2, 3)), "nanmean over positions", MAP),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        axes = axes_of(by_name(node).get("dim"), len(tape.shape(x)))
        planes = tape.across(node, tape.planes(x), axes, "it reduces across these channels")
        give_reduced(node, tape, planes, axes)

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """One operation per element of the input."""
        return numel(shape(node.args[0]))  # type: ignore[arg-type]


class Fourier(OpRule):
    """Fourier transforms: linear over the axes they run along, each channel on another axis for itself."""

    matches = aten("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft", "fft_fft2", "fft_ifft2",
                   "fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn", "fft_fftshift",
                   "fft_ifftshift")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: torch.fft.fft(x, dim=2).real, "fft over positions", MAP),
        sample(lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=(5, 5)), "rfft2 and back", MAP),
        sample(lambda x: torch.fft.fft(x, dim=1).real, "fft over channels", MAP, prunable=False),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        rank, shape = len(tape.shape(x)), tape.shape(node)
        two = [-2, -1] if "fft2" in str(node.target) else None
        last = None if "fftn" in str(node.target) or "shift" in str(node.target) else -1
        axes = axes_of(by_name(node).get("dim", two or last), rank)
        planes = tape.across(node, tape.planes(x), axes, "a Fourier transform mixes these channels")
        tape.give(node, [without(plane, axes, shape) for plane in planes])

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """n log2 n over all elements. Source: Cooley, Tukey, "An Algorithm for the Machine Calculation of Complex
        Fourier Series" (1965)."""
        count = numel(shape(node.args[0]))  # type: ignore[arg-type]
        return 0 if "shift" in str(node.target) else count * max(1, (count - 1).bit_length())


class Complex(OpRule):
    """Complex numbers as such and as pairs of real ones."""

    matches = aten("view_as_real", "view_as_complex", "real", "imag", "conj", "_conj", "resolve_conj", "conj_physical",
                   "angle")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: torch.view_as_real(torch.view_as_complex(torch.stack((x, 2 * x), -1))).sum(-1),
               "complex and back", MAP),
        sample(lambda x: torch.fft.fft(x, dim=2).conj().imag, "conj, imag", MAP),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        planes, shape = list(tape.planes(x)), tape.shape(node)
        if "as_complex" in str(node.target):
            last = len(shape)
            planes = [plane.select(last, 0) for plane in tape.across(node, tuple(planes), (last,), "")]   # both halves
        elif "as_real" in str(node.target):
            planes = [plane.unsqueeze(-1).expand(shape) for plane in planes]
        tape.give(node, planes)


class Windows(OpRule):
    """im2col and col2im: the positions of a window, channel by channel, make the channels of a column; unfold."""

    matches = aten("im2col", "col2im", "unfold")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: functional.unfold(x, 3, padding=1), "im2col", MAP),
        sample(lambda x: functional.fold(x, (6, 6), 2, stride=2), "col2im", (2, 12, 9)),
        sample(lambda x: x.unfold(2, 3, 1).unfold(3, 3, 2).flatten(2), "unfold of rows and columns", MAP),
        sample(lambda x: x.unfold(1, 3, 1).flatten(1), "unfold of channels", (2, 6, 5), prunable=False),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        size, shape, name = tape.shape(x), tape.shape(node), str(node.target)
        if "unfold" in name:
            axis: int = node.args[1] % len(size)  # type: ignore[operator,assignment]
            planes = tape.across(node, tape.planes(x), (axis,), "windows of these channels overlap")
            tape.give(node, [plane.narrow(axis, 0, 1).unsqueeze(-1).expand(shape) for plane in planes])
            return
        axis = len(size) - (3 if "im2col" in name else 2)
        labels = self._channels(node, tape, x, axis)
        if labels is None:
            return
        window = max(size[axis], shape[axis]) // min(size[axis], shape[axis])
        if "im2col" in name:
            labels = labels.repeat_interleave(window)
        else:
            table = labels.view(-1, window)
            tape.unify(table, table[:, :1])
            labels = table[:, 0]
        tape.give(node, [spread(labels, axis, shape)])

    def _channels(self, node: fx.Node, tape: Tape, x: fx.Node, axis: int) -> Tensor | None:
        labels, rest = tape.along(node, tape.planes(x), axis)
        tape.freeze_planes(node, rest, "its positions are cut into windows")
        return labels

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """One copy (or addition) per element of the columns; unfold is a view."""
        name = str(node.target)
        return 0 if "unfold" in name else numel(shape(node if "im2col" in name else node.args[0]))  # type: ignore


class Unpool(OpRule):
    """max_unpool: each channel back to where its maxima were; indices have the channels of what was pooled."""

    matches = aten("max_unpool2d", "max_unpool3d")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: functional.max_unpool2d(*functional.max_pool2d(x, 2, return_indices=True), [2, 2],
                                                 output_size=(5, 5)), "max_unpool2d", MAP),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        size, shape, spatial = tape.shape(x), tape.shape(node), 3 if "3d" in str(node.target) else 2
        axes = range(len(size) - spatial, len(size))
        pairs = [(tape.across(node, tape.planes(arg), axes, "its positions are looked up"), size)
                 for arg in node.args[:2]]
        merged = tape.combine(node, pairs, size)
        tape.give(node, [without(plane, axes, shape) for plane in merged])

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        return numel(shape(node))


class Sample2d(OpRule):
    """grid_sample(x [N, C, ...], grid): channels pass, the grid says where to read. affine_grid makes such grids."""

    matches = aten("grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "affine_grid_generator")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x, y: functional.grid_sample(x, y.flatten(2)[:, :1].unflatten(2, (3, 4, 2))[:, 0],
                                                   align_corners=False), "grid_sample", MAP, (2, 1, 4, 6)),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        shape, (x, where) = tape.shape(node), node.args[:2]
        if "affine" in str(node.target):
            tape.freeze_planes(node, tape.planes(x), "they say where to read")
            return
        tape.freeze_planes(node, tape.planes(where), "they say where to read")
        axes = range(2, len(shape))
        planes = tape.across(node, tape.planes(x), axes, "its positions are resampled")
        tape.give(node, [without(plane, axes, shape) for plane in planes])

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """Two per axis of the image and neighbour blended: 2 * 2^axes per output."""
        out = shape(node)
        return numel(out) << (len(out) - 1)

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """4 per output of grid_sample, as if it were bilinear. Source: fvcore 0.1.5, flop_count."""
        return 0 if "affine" in str(node.target) else 4 * numel(shape(node))


RULES: tuple[OpRule, ...] = (Scan(), Norm(), Fourier(), Complex(), Windows(), Unpool(), Sample2d())
