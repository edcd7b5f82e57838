"""The fixtures that all test files share: a cache of the tests' own, a process to fork, and the scripts under test."""

import os
import shutil
from pathlib import Path

# Before torch is loaded: networks of these sizes gain nothing from a second thread, and threads that wait in a loop
# for each other make a step take a hundred times as long where the machine is busy otherwise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import launching
import pytest
from forking import LIBRARIES, ForkServer

from sprite_diffusion.metrics import classifier
from sprite_diffusion.sharing import report

MEMORY = Path("/dev/shm")


def pytest_configure():
    """Keeps the tests' files in memory: runs wait for the disk at each file, a third of the time of a small one."""
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8e9:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory):
    """Keeps the tests from using or filling the user's cache."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def short_trajectories():
    """Has the pages of runs show two steps in place of all, but in test_report.py: a fifth of a small run's time."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(report, "TRAJECTORY_STEPS", 2)
        yield


@pytest.fixture(autouse=True, scope="session")
def short_training_of_the_classifier():
    """Trains the metrics' classifier for a second in place of ten; it can then tell sprites from noise."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(classifier, "TRAINING_STEPS", 60)
        yield


@pytest.fixture(autouse=True, scope="session")
def fork_servers(cache_of_its_own):
    """Lets programs be forked, in the environment that the tests begin with."""
    environment = launching.make_environment(launching.PYTHON)
    servers = [ForkServer(environment), ForkServer(environment, LIBRARIES, ["-I"])]
    with launching.forking_from(servers):
        yield


@pytest.fixture(scope="session")
def run_script():
    """Runs a script's `main` in this process; `run_script("train_unconditional", "--seed 1", output_dir)`."""
    return launching.run_script
