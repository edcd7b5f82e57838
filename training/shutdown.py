"""What SIGTERM, SIGINT and SIGUSR1 do to a run: a checkpoint at the end of the step, and the end of the run or not."""

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
ONE_PRESS = 0.5  # seconds in which a second SIGINT is the first again: programs that start others hand it on


class SamplingInterrupted(BaseException):
    """Raised inside `interruptible`. Not an `Exception`, so that nothing takes it for a failure of its own."""


class Signals:
    """The signals that came, agreed on by all processes. A context: outside of it they do what they did before.

    A thread reads them from a pipe that the interpreter's C handler writes to, so that the time limit and a second
    SIGINT hold even where the main thread is stuck in a kernel or a collective operation.
    """

    def __init__(self, accelerator: Accelerator, grace: float, last_checkpoint: Callable[[], str]) -> None:
        self._grace = grace
        self._last_checkpoint = last_checkpoint
        self._group: Any = None  # of CPU tensors, so that agreeing does not wait for a GPU
        if accelerator.num_processes > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        self._stop = 0  # the signal
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

    def poll(self) -> tuple[bool, int]:
        """Whether a checkpoint is asked for, and the signal to stop for or 0: on every process the same."""
        if self._launcher not in (None, os.getppid()):
            # `accelerate launch` ends on SIGTERM without a word to the program that it launched.
            self._stop = self._stop or signal.SIGTERM
        wanted = torch.tensor([int(self._checkpoint), self._stop])
        if self._group is not None:
            torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX, group=self._group)
        self._checkpoint = False
        return bool(wanted[0]), int(wanted[1])

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raises `SamplingInterrupted` inside if the run is to stop: for what takes long and can be done again."""
        self._interruptible = True
        try:
            self._handle(self._stop, None)
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: Any) -> None:
        if number in _STOPPING:
            self._stop = self._stop or number
            if self._interruptible:
                self._interruptible = False
                raise SamplingInterrupted

    def _watch(self, reading: int) -> None:
        deadline: float | None = None
        second_from = 0.0
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([reading], [], [], left)[0]:
                self._exit(self._stop, f"not done in --shutdown_grace {self._grace:g} s")
            received = os.read(reading, 1)
            if not received:
                break
            number = received[0]
            if number == signal.SIGUSR1:
                self._checkpoint = True
            elif number in _STOPPING and deadline is None:
                self._stop = number
                deadline = time.monotonic() + self._grace
                second_from = time.monotonic() + ONE_PRESS
            elif number == signal.SIGINT and time.monotonic() > second_from:
                self._exit(number, "stopped at once")
        os.close(reading)

    def _exit(self, number: int, why: str) -> None:
        sys.stderr.write(f"\n{why}; last checkpoint: {self._last_checkpoint()}\n")
        sys.stderr.flush()
        os._exit(128 + number)


def _ignore_in_child() -> None:
    """Workers get a terminal's Ctrl-C too: it must neither end them nor count in their parent's pipe."""
    if isinstance(getattr(signal.getsignal(signal.SIGINT), "__self__", None), Signals):
        os.close(signal.set_wakeup_fd(-1))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


os.register_at_fork(after_in_child=_ignore_in_child)
