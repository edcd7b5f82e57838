"""The fixtures that all test files share: a cache that is the tests' own, and the scripts under test."""

import launching
import pytest


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory):
    """Keeps the tests from using or filling the user's cache."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def run_script():
    """Runs a script's `main` in this process; `run_script("train_unconditional", "--seed 1", output_dir)`."""
    return launching.run_script
