"""Tests that a forked program can't be told from one that an interpreter has started."""

import os
import re
import signal
import subprocess

import launching
import pytest
from forking import ForkedProgram
from launching import PYTHON, REPOSITORY, kill, run_command, start_command

STATE = """
import atexit, os, random, resource, signal, sys, threading, time
print(sys.argv[1:], __name__, globals().get("__file__"), os.getcwd(), sys.path, sorted(os.environ.items()))
print(sys.flags)
print(os.getppid(), os.getsid(0) == os.getpid(), repr(sys.stdin.read()), sys.stdout.line_buffering)
print([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE)])
print(len(os.listdir("/proc/self/task")), sorted(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_AS))
print("on standard error", file=sys.stderr)
atexit.register(print, "at exit")
threading.Thread(target=lambda: [time.sleep(0.1), print("a thread is waited for")]).start()
"""
ENDS = [
    "pass",
    "sys.exit(3)",
    "sys.exit('no more')",
    "os._exit(4)",
    "1 / 0",
    "os.kill(os.getpid(), signal.SIGSEGV)",
    "os.kill(os.getpid(), signal.SIGINT), time.sleep(60)",
]


def start_both(command: list[str], **options) -> list[subprocess.Popen[str]]:
    """Starts a program by an interpreter and by a fork."""
    if not launching.fork_servers:
        pytest.skip("programs are not forked where there is a GPU, nor on another system than Linux")
    programs = [start_command(command, fork=fork, **options) for fork in (False, True)]
    assert [type(program) for program in programs] == [subprocess.Popen, ForkedProgram]
    return programs


@pytest.mark.parametrize("end", ENDS)
def test_state_output_and_status_are_those_of_an_interpreter(tmp_path, end):
    options = {"cwd": tmp_path, "environment": {"WANDB_MODE": "offline"}, "start_new_session": end == "pass"}
    (tmp_path / "script.py").write_text(f"{STATE}\n{end}")
    programs = start_both([*PYTHON, str(tmp_path / "script.py"), "--flag", "a value"], **options)
    assert_same_ends(programs)


@pytest.mark.parametrize("options", [["-c"], ["-m"], ["-I", "-c"], ["-I"]], ids=" ".join)
def test_code_modules_and_isolated_programs_are_forked_as_scripts_are(tmp_path, options):
    (tmp_path / "script.py").write_text(STATE)
    what = {"-c": STATE, "-m": "script", "-I": str(tmp_path / "script.py")}[options[-1]]
    assert_same_ends(start_both([*PYTHON, *options, what, "--flag", "a value"], cwd=tmp_path))


def test_isolated_programs_have_not_imported_this_project():
    names = [path.name for path in REPOSITORY.iterdir() if (path / "__init__.py").is_file()]
    assert "sprite_diffusion" in names
    program = f"import sys\nprint('diffusers' in sys.modules, sys.modules.keys() & {names})"
    assert run_command([*PYTHON, "-I", "-c", program]).stdout in ("True set()\n", "False set()\n")


def assert_same_ends(programs: list[subprocess.Popen[str]]) -> None:
    """Waits for programs, and asserts that they printed the same and ended alike."""
    printed = [program.communicate(timeout=60) for program in programs]
    assert programs[0].returncode == programs[1].returncode
    assert printed[0][0] == printed[1][0]
    # A fork's traceback has the lines of the server above those of the script.
    own_lines = [re.sub(r'  File "[^"]*(forking\.py|runpy>)".*\n(    .*\n)*', "", err) for _, err in printed]
    assert own_lines[0] == own_lines[1]


def test_forks_do_not_share_what_is_random(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import numpy, random, uuid\nprint(random.random(), numpy.random.random(), uuid.uuid4())")
    first, second = (set(run_command([*PYTHON, str(script)]).stdout.split()) for _ in range(2))
    assert len(first) == len(second) == 3
    assert not first & second


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_program_that_hangs_is_ended_by_a_signal_to_its_session(tmp_path, number):
    (tmp_path / "script.py").write_text("import time\nprint('hanging', flush=True)\ntime.sleep(600)")
    for program in start_both([*PYTHON, str(tmp_path / "script.py")], start_new_session=True):
        assert program.stdout is not None
        assert program.stdout.readline() == "hanging\n"
        with pytest.raises(subprocess.TimeoutExpired):
            program.communicate(timeout=0.01)
        assert program.poll() is None
        os.killpg(program.pid, number)
        program.communicate(timeout=60)
        assert program.returncode == -number


@pytest.mark.parametrize(
    ("launcher", "environment"),
    [(PYTHON, {"HF_HOME": "elsewhere"}), (PYTHON, {"OMP_NUM_THREADS": "2"}), ([*PYTHON, "-E"], {})],
)
def test_what_an_import_or_the_interpreter_may_read_is_not_forked(launcher, environment):
    """The command has no script, and ends with an error."""
    program = start_command([*launcher, "missing.py"], environment=environment)
    assert type(program) is subprocess.Popen
    kill(program)
