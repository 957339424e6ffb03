"""SIGTERM (a preempted VM) and Ctrl-C as a request to save and leave between two steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Listens while it is entered; of several hosts, all leave at the same step.

    A second signal acts as if nobody listened.
    """

    def __init__(self) -> None:
        self._came = False
        self._before: dict[signal.Signals, object] = {}
        # Over several processes JAX's own coordination service catches SIGTERM, wherever it comes.
        self._alone = jax.process_count() == 1

    def __enter__(self) -> Self:
        if self._alone and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def is_requested(self, step: int) -> bool:
        """Whether to leave before this step; to be asked before each, on every host."""
        if self._alone:
            return self._came
        return bool(multihost_utils.reached_preemption_sync_point(step))

    def has_come(self) -> bool:
        """Whether a signal has come, between two steps; False on several hosts, which leave at one.

        What it interrupts begins anew after the next start.
        """
        return self._alone and self._came

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
