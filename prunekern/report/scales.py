"""Axes: from values to positions, and ticks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """One axis from `low` to `high`, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], *, log: bool = False, pad: float = 0.04) -> Scale:
        """The scale that holds all finite values with a margin of `pad` of its length on both sides."""
        finite = [value for value in values if math.isfinite(value) and not (log and value <= 0)]
        if not finite:
            return cls(1.0, 10.0, True) if log else cls(0.0, 1.0)
        low, high = (math.log10(min(finite)), math.log10(max(finite))) if log else (min(finite), max(finite))
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            half = 0.3 if log else abs(low) * 0.05 or 0.5
            low, high = low - half, high + half
        margin = pad * (high - low)
        low, high = low - margin, high + margin
        return cls(10.0**low, 10.0**high, True) if log else cls(low, high)

    def at(self, value: float) -> float:
        """The position of `value` in percent of the axis, two decimals."""
        if self.log:
            low, high, value = math.log10(self.low), math.log10(self.high), math.log10(value)
        else:
            low, high = self.low, self.high
        return round(100.0 * (value - low) / (high - low), 2)

    def holds(self, value: float) -> bool:
        """Whether `value` can be drawn on this axis."""
        return math.isfinite(value) and self.low <= value <= self.high

    def ticks(self, wanted: int = 6) -> tuple[float, ...]:
        """About `wanted` round values inside the scale."""
        return _log_ticks(self, wanted) if self.log else _linear_ticks(self.low, self.high, wanted)


def _linear_ticks(low: float, high: float, wanted: int) -> tuple[float, ...]:
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, 1 - math.floor(math.log10(step)))
    return tuple(round(index * step, digits) for index in range(first, last + 1))


def _log_ticks(scale: Scale, wanted: int) -> tuple[float, ...]:
    first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        ticks = tuple(
            factor * 10.0**power
            for power in range(first, last + 1)
            for factor in factors
            if scale.low <= factor * 10.0**power <= scale.high
        )
        if len(ticks) >= min(5, wanted):
            return ticks[:: math.ceil(len(ticks) / (2 * wanted))]
    return _linear_ticks(scale.low, scale.high, wanted)


def tick_labels(ticks: tuple[float, ...], text: Callable[[float, int], str]) -> tuple[str, ...]:
    """Labels with the fewest digits (0 to 4) at which `text(value, digits)` tells all ticks apart."""
    labels: tuple[str, ...] = ()
    for digits in range(5):
        labels = tuple(text(tick, digits) for tick in ticks)
        faithful = len(set(labels)) == len(labels)
        if faithful and _evenly(ticks, digits, text):
            break
    return labels


def _evenly(ticks: tuple[float, ...], digits: int, text: Callable[[float, int], str]) -> bool:
    """Whether one more digit would say nothing new (2.5 must not read 2 or 3)."""
    return all(float_of(text(tick, digits)) == float_of(text(tick, digits + 1)) for tick in ticks)


def float_of(label: str) -> float:
    """The number a label starts with."""
    number = label.split("\N{NO-BREAK SPACE}")[0].replace("\N{MINUS SIGN}", "-")
    return float(number)
