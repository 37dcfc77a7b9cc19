"""Numbers as people read them: three significant digits, a unit, a real minus sign."""

from __future__ import annotations

import math
from numbers import Integral

NBSP = "\N{NO-BREAK SPACE}"
NONE = "\N{EN DASH}"
_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
COUNTED = frozenset({"macs", "flops", "params", "parameters", "mac", "flop", "bytes", "b"})


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}", 1) if text.startswith("-") else text


def significant(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits and no exponent in the range people write out."""
    if not math.isfinite(value):
        return _minus(str(float(value)))
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = math.floor(math.log10(abs(rounded)))
    if not -4 <= exponent <= 6:
        return f"{value:.{digits - 2}e}"
    return _minus(f"{rounded:.{max(0, digits - 1 - exponent)}f}")


def count(value: float | None) -> str:
    """1234567 -> "1.23 M"; whole numbers below a thousand stay exact."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return significant(value)
    if abs(value) < 999.5:
        return _minus(str(int(value))) if value == int(value) else significant(value)
    rounded = float(f"{value:.2e}")  # before the prefix is picked: 999950 is 1.00 M, not 1000 k
    scale, prefix = next(item for item in _SI if abs(rounded) >= item[0])
    return significant(rounded / scale) + NBSP + prefix


def short(text: str) -> str:
    """A formatted number without trailing zeros, for axis labels: 1.50 M -> 1.5 M, 10.0 ms -> 10 ms."""
    number, space, unit = text.partition(NBSP)
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return number + space + unit


def compact(value: float) -> str:
    """Three significant digits, as short as they go: 1e-10, 0.0001, 3.1e-15."""
    text = f"{value:.3g}"
    mantissa, mark, exponent = text.partition("e")
    return _minus(mantissa + (f"e{int(exponent)}" if mark else ""))


def exact(value: float) -> str:
    """1234567 -> "1,234,567", for tooltips."""
    return _minus(f"{value:,}")


def fixed(value: float, digits: int) -> str:
    """So many decimals, for axis labels."""
    return _minus(f"{value:.{digits}f}")


def percent(fraction: float | None, digits: int = 2) -> str:
    """0.9123 -> "91.23 %"."""
    if fraction is None:
        return NONE
    if not math.isfinite(fraction):
        return significant(fraction)
    return _minus(f"{100 * fraction:.{digits}f}") + NBSP + "%"


def points(value: float | None) -> str:
    """A drop in points with two decimals; what rounds to zero carries no sign."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return significant(value)
    return _minus(f"{round(value, 2) + 0.0:.2f}")


def duration(microseconds: float | None) -> str:
    """1234.5 -> "1.23 ms"."""
    if microseconds is None:
        return NONE
    if not math.isfinite(microseconds):
        return significant(microseconds)
    rounded = float(f"{microseconds:.2e}")
    for scale, unit in ((1e6, "s"), (1e3, "ms"), (1.0, "µs")):
        if abs(rounded) >= scale:
            return significant(rounded / scale) + NBSP + unit
    return significant(rounded) + NBSP + "µs"


def energy(microjoules: float | None) -> str:
    """1234.5 -> "1.23 mJ"."""
    if microjoules is None:
        return NONE
    if not math.isfinite(microjoules):
        return significant(microjoules)
    rounded = float(f"{microjoules:.2e}")
    for scale, unit in ((1e6, "J"), (1e3, "mJ"), (1.0, "µJ")):
        if abs(rounded) >= scale:
            return significant(rounded / scale) + NBSP + unit
    return significant(rounded * 1e3) + NBSP + "nJ"


def times(factor: float | None) -> str:
    """2.314 -> "2.31×"."""
    return NONE if factor is None else significant(factor) + "×"


def share(part: float, whole: float) -> str:
    """What is left of `whole`, in percent with one decimal."""
    return NONE if whole == 0 else percent(part / whole, 1)


def plain(value: float | int | str | None) -> str:
    """A table cell: integers with separators, floats with four significant digits."""
    if value is None:
        return NONE
    if isinstance(value, str | bool):
        return str(value)
    return exact(value) if isinstance(value, Integral) else significant(value, 4)


def quantity(value: float | int | str, unit: str) -> tuple[str, str]:
    """A headline value as (number, unit), prefix and percent sign with the unit."""
    if isinstance(value, str | bool):
        return str(value), unit
    if unit == "fraction":
        text = percent(value)
    elif unit in ("µs", "us"):
        text = duration(value)
    elif unit.lower() in COUNTED:
        suffix = "B" if unit.lower() in ("bytes", "b") else NBSP + unit
        number, _, prefix = count(value).partition(NBSP)
        return number, (prefix + suffix).strip()
    elif unit == "points":
        return points(value), unit
    else:
        return count(value) if isinstance(value, Integral) else significant(value), unit
    number, _, rest = text.partition(NBSP)
    return number, rest


def joined(value: float | int | str, unit: str) -> str:
    """`quantity` as one text; a times sign sticks to its number."""
    number, rest = quantity(value, unit)
    return number + ("" if rest in ("", "×") else NBSP) + rest


def printable(text: str) -> str:
    """The text with control characters (terminal escapes, line breaks) made visible."""
    return "".join(c if c.isprintable() or c == NBSP else f"\\x{ord(c):02x}" for c in text)
