"""Keeps the contenders out of each other's way: time limits, output, signal stacks."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import io
import logging
import signal
import sys
import threading
import types
import warnings
from collections.abc import Iterator


class OutOfTime(BaseException):
    """Not an Exception, so that no compiler takes it for a bug of its own and carries on."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the main thread at its next Python instruction after so many seconds.

    The signal is simulated, which works on every system and needs no timer of the process.
    """
    number = getattr(signal, "SIGALRM", signal.SIGINT)
    timer = threading.Timer(seconds, _thread.interrupt_main, (number,))
    timer.daemon = True

    def stop(number: int, frame: types.FrameType | None) -> None:
        raise OutOfTime
    before = signal.signal(number, stop)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(number, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress lines and warnings of exporters and compilers; what they raise still shows."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch._inductor", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class _Stack(ctypes.Structure):
    """``stack_t`` of <signal.h> on Linux."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> tuple[int | None, int, int]:
    """Address, flags and size of this thread's alternative signal stack (Linux)."""
    now = _Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(now))
    return now.address, now.flags, now.size


@contextlib.contextmanager
def own_signal_stack() -> Iterator[None]:
    """Put this thread's alternative signal stack back to what it was before.

    A network of OpenVINO installs one as it is compiled, and when it is deleted puts back the one it found: with two
    networks deleted in the order they were made in, that is the freed stack of the first, and the next signal (an
    interrupt, say) ends the process. With this around compilation none ever finds another's.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    before = _Stack(*signal_stack())
    try:
        yield
    finally:
        ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None)
