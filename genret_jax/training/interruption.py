"""Stopping on request: a checkpoint first, then out."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, NoReturn

from genret_jax.training import processes


class Interrupted(SystemExit):
    """Training stopped on request and can go on: the command line exits with `code`."""

    def __init__(self, message: str, code: int):
        super().__init__(code)
        self.message = message


class Interruption:
    """Turns SIGTERM and the first Ctrl-C into a request that the loop reads between steps.

    A second Ctrl-C interrupts at once. Outside the main thread, where Python allows no handlers,
    nothing is caught.

    Where several processes train together, JAX has caught SIGTERM since they joined, and tells
    them all a step at which to stop; Ctrl-C goes the same way.
    """

    requested: int = 0

    def __enter__(self) -> Interruption:
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            own = (signal.SIGTERM, signal.SIGINT) if processes.count() == 1 else (signal.SIGINT,)
            for number in own:
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number
        if processes.count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self) -> bool:
        """Whether to stop now, at the same step in all processes. To be called once a step."""
        if processes.count() > 1 and processes.reached_stop():
            self.requested = self.requested or signal.SIGTERM
            return True
        return processes.count() == 1 and bool(self.requested)

    def stop(self, message: str) -> NoReturn:
        """Raises Interrupted with the exit code of the signal (128 + its number)."""
        raise Interrupted(f"{message}; run the same command to go on", 128 + self.requested)
