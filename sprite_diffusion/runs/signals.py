"""SIGTERM, SIGINT and SIGUSR1 ask a run for a checkpoint at the end of the step; the first two also end the run."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator

EXIT_STATUS: dict[int, int] = {signal.SIGTERM: 0, signal.SIGINT: 130}  # of a run that has written its checkpoint
_STOPPING = tuple(EXIT_STATUS)
SAME_KEYPRESS_SECONDS = 0.5  # a second SIGINT within them is the first again: programs that start others hand it on


class SamplingInterrupted(BaseException):
    """A signal to stop has come inside of `interruptible`. Not an `Exception`, so that no library catches it."""


class Signals:
    """The signals that came, agreed on by all processes, inside of `with`; outside, signals do what they did before.

    A thread reads them from a pipe that the interpreter's C handler writes to, so that the time limit and a second
    SIGINT hold even where the main thread is stuck in a kernel or a collective operation.
    """

    def __init__(self, accelerator: Accelerator, grace: float, last_checkpoint: Callable[[], str]) -> None:
        self._grace = grace
        self._last_checkpoint = last_checkpoint
        self._group: Any = None  # of CPU tensors, so that agreeing does not wait for a GPU
        if accelerator.num_processes > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        self.stop = 0  # the signal to stop for, or 0; on every process the same
        self._received = 0  # by this process
        self._checkpoint = False
        self._interruptible = False
        self._launcher = os.getppid() if "ACCELERATE_DYNAMO_BACKEND" in os.environ else None

    def __enter__(self) -> "Signals":
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._former_fd = signal.set_wakeup_fd(self._writing)
        self._former = {number: signal.signal(number, self._handle) for number in (*_STOPPING, signal.SIGUSR1)}
        self._thread = threading.Thread(target=self._watch, args=(reading,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_fd)
        os.close(self._writing)  # ends the thread
        self._thread.join()  # one that is left at the interpreter's end may abort it

    def poll(self) -> bool:
        """Sets `stop`, and returns whether a signal asks for a checkpoint: on every process the same."""
        if self._launcher not in (None, os.getppid()):
            # `accelerate launch` ends on SIGTERM without a word to the program that it launched.
            self._received = self._received or signal.SIGTERM
        wanted = torch.tensor([int(self._checkpoint), self._received])
        if self._group is not None:
            torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX, group=self._group)
        self._checkpoint = False
        self.stop = int(wanted[1])
        return bool(wanted.any())

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raises `SamplingInterrupted` inside if the run is to stop: for long work that can be done again."""
        self._interruptible = True
        try:
            self._handle(self._received, None)
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: Any) -> None:
        if number in _STOPPING:
            self._received = self._received or number
            if self._interruptible:
                self._interruptible = False
                raise SamplingInterrupted

    def _watch(self, reading: int) -> None:
        deadline: float | None = None
        second_from = 0.0
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([reading], [], [], left)[0]:
                self._exit(self._received, f"not done in --shutdown_grace {self._grace:g} s")
            received = os.read(reading, 1)
            if not received:
                break
            number = received[0]
            if number == signal.SIGUSR1:
                self._checkpoint = True
            elif number in _STOPPING and deadline is None:
                self._received = number
                deadline = time.monotonic() + self._grace
                second_from = time.monotonic() + SAME_KEYPRESS_SECONDS
            elif number == signal.SIGINT and time.monotonic() > second_from:
                self._exit(number, "stopped at once")
        os.close(reading)

    def _exit(self, number: int, why: str) -> None:
        sys.stderr.write(f"\n{why}; last checkpoint: {self._last_checkpoint()}\n")
        sys.stderr.flush()
        os._exit(128 + number)


def _ignore_in_child() -> None:
    """Makes a DataLoader's worker deaf to a terminal's Ctrl-C, which must not count in its parent's pipe either."""
    if isinstance(getattr(signal.getsignal(signal.SIGINT), "__self__", None), Signals):
        os.close(signal.set_wakeup_fd(-1))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


os.register_at_fork(after_in_child=_ignore_in_child)
