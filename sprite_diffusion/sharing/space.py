"""The studio as a Space of the Hub: a machine there that runs studio.py for everybody."""

import shutil
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from sprite_diffusion.common.errors import UserInputError, first_line

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = ("studio.py", "LICENSE", "schedulers/*.py", "models/*.py", "pipelines/*.py", "sprite_diffusion/**/*.*")
APP_FILE = "app.py"
MARK = '"""A studio by sprite-diffusion."""'  # by which an app is known to be ours
APP = f"""{MARK}

import sys

from studio import main

sys.argv = ["studio.py", {{model!r}}]
main()
"""
README = """---
title: {name}
emoji: 👾
sdk: gradio
app_file: app.py
license: apache-2.0
models:
- {model}
---

Draws with [{model}](https://huggingface.co/{model}): a click on a sprite varies it, a mask says what is drawn anew.
"""


def push_space(space: str, model: str, private: bool) -> str:
    """Uploads the studio of a model of the Hub as a Space, and returns the address of the commit.

    Raises `UserInputError` if the Hub refuses, if the Space holds another app, and if this is no clone of the project.
    """
    if not (REPOSITORY / "studio.py").is_file():
        raise UserInputError(f"--space {space}: a Space needs the project's files: run this in a clone of it")
    api = HfApi()
    try:
        space = api.create_repo(space, private=private, exist_ok=True, repo_type="space", space_sdk="gradio").repo_id
        held = api.list_repo_files(space, repo_type="space")
        if APP_FILE in held:
            path = api.hf_hub_download(space, APP_FILE, repo_type="space", force_download=True)
            if not Path(path).read_text().startswith(MARK):
                raise UserInputError(f"--space {space} holds another app: name a Space of its own for the studio")
        with TemporaryDirectory() as folder:
            _write_files(Path(folder), space, model)
            commit = api.upload_folder(
                repo_id=space,
                repo_type="space",
                folder_path=folder,
                ignore_patterns=["README.md"] if "README.md" in held else None,  # somebody may have changed it
                delete_patterns=["sprite_diffusion/*", "schedulers/*", "models/*", "pipelines/*"],
                commit_message=f"The studio of {model}",
            )
    except UserInputError:
        raise
    except Exception as error:  # as in hub.py
        raise UserInputError(f"--space {space} was not updated: {first_line(error)}") from None
    return commit.commit_url


def _write_files(folder: Path, space: str, model: str) -> None:
    """Writes what a Space is made of."""
    for pattern in CODE:
        for path in REPOSITORY.glob(pattern):
            if path.is_file() and path.suffix != ".pyc":
                target = folder / path.relative_to(REPOSITORY)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    (folder / APP_FILE).write_text(APP.format(model=model))
    (folder / "README.md").write_text(README.format(name=space.partition("/")[2], model=model))
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    (folder / "requirements.txt").write_text(setup["options"]["install_requires"].strip() + "\n")
