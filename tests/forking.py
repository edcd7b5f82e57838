"""Starts programs by a fork of a process that has imported the libraries, as each program would for five seconds.

pytest starts this file as a program. It forks itself for each request, and the fork becomes a child of pytest.
"""

import atexit
import ctypes
import gc
import importlib
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

# What the scripts import after they have read their flags: torch, diffusers, transformers and datasets among it.
SCRIPTS = """
sprite_diffusion.training.unconditional sprite_diffusion.training.conditional sprite_diffusion.sampling.views
sprite_diffusion.metrics.calculation
matplotlib.figure matplotlib.backends.backend_agg torch.utils.tensorboard
""".split()
# The same without this project, for programs that must not know it.
LIBRARIES = """
torchvision torch._dynamo torch.utils.tensorboard matplotlib.figure matplotlib.backends.backend_agg scipy.stats
datasets accelerate huggingface_hub.hf_api diffusers.pipelines.ddpm.pipeline_ddpm diffusers.models.unets.unet_2d
diffusers.models.unets.unet_2d_condition diffusers.training_utils transformers.models.clip.modeling_clip
""".split()
# Variables that are read later, by what is not imported here or when it is used. Any other may matter to an import.
# torch sets the last one when it is imported, in pytest's own process too.
READ_LATE = ("PYTEST_", "WANDB_", "TRACKIO_", "ACCELERATE_", "TORCHINDUCTOR_CACHE_DIR")
# pyarrow's allocator, which is not the one in use, would start a thread.
NO_THREADS = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl.h


class Request(NamedTuple):
    """What a program is started with, besides its standard input, output and error."""

    command: list[str]
    cwd: str
    environment: dict[str, str]
    start_new_session: bool


class ForkServer:
    """The process to fork, which is started when it is first needed and ends with the one that started it."""

    def __init__(
        self, environment: Mapping[str, str], imported: Sequence[str] = SCRIPTS, options: Sequence[str] = ()
    ) -> None:
        """Takes the environment of the imports, the modules to import, and options for Python, such as -I."""
        self._environment, self._imported = environment, imported
        self._interpreter = [sys.executable, *options]
        self._server: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            process, channel = self._server
            channel.close()
            process.wait()

    def can_run(self, command: Sequence[str], environment: Mapping[str, str]) -> bool:
        """Returns whether the command is a script, `-c` or `-m` with the options and environment of the imports."""
        differing = {name for name, _ in environment.items() ^ self._environment.items()}
        if [*command[: len(self._interpreter)]] != self._interpreter:
            return False
        first = command[len(self._interpreter)]
        is_program = first in ("-c", "-m") or first.endswith(".py")
        return is_program and all(name.startswith(READ_LATE) for name in differing)

    def fork(self, request: Request, files: Sequence[int]) -> int:
        """Starts a program with three files as standard input, output and error, and returns its number."""
        if self._server is None:
            channel, far_end = socket.socketpair(type=socket.SOCK_SEQPACKET)
            environment = {**self._environment, **NO_THREADS}
            with far_end:
                command = [*self._interpreter, __file__, *self._imported]
                process = subprocess.Popen(command, stdin=far_end.fileno(), stdout=subprocess.DEVNULL, env=environment)
            self._server = process, channel
        _, channel = self._server
        request = request._replace(command=request.command[len(self._interpreter) :])
        # The program's parent ends at once. This process then takes its place, and can wait for the program.
        set_subreaper(True)
        socket.send_fds(channel, [json.dumps(request).encode()], files)
        pid = int(channel.recv(99))
        set_subreaper(False)
        return pid


class ForkedProgram(subprocess.Popen[str]):
    """A program that is forked from a server. What is done with it, and how it ends, is all the standard library's."""

    def __init__(self, server: ForkServer, command: Sequence[str], **options: Any) -> None:
        self._server = server
        super().__init__(command, **options)

    def _execute_child(self, *options: Any) -> None:
        """Takes the place of fork and exec. `preexec_fn` is not called: the server sets the handler of SIGINT."""
        given = inspect.signature(super()._execute_child).bind(*options).arguments  # type: ignore[misc]
        request = Request(given["args"], str(given["cwd"]), given["env"], given["start_new_session"])
        self.pid = self._server.fork(request, [0, given["c2pwrite"], given["errwrite"]])
        self._child_created = True
        pipes = "p2cread p2cwrite c2pread c2pwrite errread errwrite".split()
        self._close_pipe_fds(*(given[pipe] for pipe in pipes))  # type: ignore[attr-defined]


def set_subreaper(value: bool) -> None:
    """Makes this process the parent of those among its descendants whose parent ends, or no longer."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(value))


def serve() -> None:
    """Imports the libraries and forks for each request until pytest ends; in a fork, runs the program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, and its end is the end of this
    printed = import_all(sys.argv[1:])
    assert not {"wandb", "trackio"} & sys.modules.keys(), "their variables would have been read"
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has one thread, and the locks of all"
    gc.freeze()  # or the first collection in each program would copy most of this memory
    requests = socket.socket(fileno=0)
    while True:
        message, files, *_ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            return
        if fork_for_adoption():
            request = Request(*json.loads(message))
            become_program(request, files, requests)
            os.write(2, printed)
            try:
                run(request.command)
            except SystemExit as end:
                if not isinstance(end.code, int | None):
                    raise
                end_at_once(end.code or 0)
            end_at_once(0)
        for file in files:
            os.close(file)


def fork_for_adoption() -> bool:
    """Forks twice and ends the process between, whose place pytest takes. Returns whether this is the fork."""
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        return False
    between = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == between:
        time.sleep(0.0001)
    return True


def import_all(names: Sequence[str]) -> bytes:
    """Imports modules, and returns what that prints on standard error."""
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            for name in names:
                importlib.import_module(name)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        file.seek(0)
        return file.read()


def become_program(request: Request, files: Sequence[int], requests: socket.socket) -> None:
    """Gives this process what an interpreter has when it begins with a script."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request.start_new_session:
        os.setsid()
    requests.send(str(os.getpid()).encode())
    requests.detach()  # its file, 0, becomes standard input
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.modules["numpy"].random.seed()  # a fork seeds Python's own generator anew, and not this one


def run(arguments: Sequence[str]) -> None:
    """Runs a script, `-c` or `-m`, as the interpreter does that is given these arguments."""
    first, *rest = arguments
    if first == "-c":
        code, *rest = rest
        set_arguments("-c", rest, folder="")
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif first == "-m":
        module, *rest = rest
        set_arguments("-m", rest, folder=os.getcwd())
        sys.modules.pop(module, None)  # where a library has imported it
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        script = os.path.abspath(first)
        set_arguments(script, rest, folder=os.path.dirname(script))
        runpy.run_path(script, run_name="__main__")


def set_arguments(name: str, rest: Sequence[str], folder: str) -> None:
    """Sets `sys.argv`, and the folder that Python first looks for modules in, unless an option keeps it from that."""
    sys.argv = [name, *rest]
    if not sys.flags.safe_path:
        sys.path[0] = folder


def end_at_once(status: int) -> None:
    """Ends this process as the interpreter does, but for freeing all objects, which takes half a second here."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
