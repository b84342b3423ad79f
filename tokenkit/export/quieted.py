"""Other packages' warnings and signals, while something is being exported."""

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TALKERS = ("torch.onnx", "torch.export", "onnxscript")  # warn about what their caller cannot change


@contextmanager
def quieted() -> Iterator[None]:
    """Inside, tracing and conversion say nothing but errors."""
    loggers = [logging.getLogger(name) for name in TALKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def clears_up() -> Iterator[None]:
    """Inside, SIGTERM ends the process by way of every `finally`, so that no draft is left. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
