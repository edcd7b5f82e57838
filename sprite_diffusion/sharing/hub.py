"""Uploads to the Hub: beside the training, or later.

python -m sprite_diffusion.sharing.hub push runs/sprites me/sprites
"""

import argparse
import shutil
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import disable_progress_bars, filter_repo_objects
from tqdm.auto import tqdm

from sprite_diffusion.common.errors import UserInputError, exits_on_user_error, first_line, printable
from sprite_diffusion.common.files import write_text
from sprite_diffusion.common.flags import ArgumentParser, check_token
from sprite_diffusion.common.run_files import (
    CARD_FILE,
    HISTORY_FILE,
    INDEX_FILE,
    METRICS_FILE,
    PIPELINE_FILES,
    SAMPLES_DIR,
    SUMMARY_FILE,
)
from sprite_diffusion.sharing.card import make_card
from sprite_diffusion.sharing.space import push_space

# Checkpoints, optimizer states, logs and data are never uploaded.
UPLOADED = [*PIPELINE_FILES, f"{SAMPLES_DIR}/*", SUMMARY_FILE, METRICS_FILE, HISTORY_FILE]
# Code of an older version has another name and would stay. Other Python files in the repository are not ours.
REPLACED = ["pipeline_*.py", "scheduler/*.py", "unet/*.py"]
RETRY_DELAYS = (1.0, 4.0, 16.0)  # seconds
# The errors of huggingface_hub have no base class in common: those of its network library come through (requests, then
# httpx), and a failed upload of weights is a RuntimeError. Hence `except Exception` below, around what calls it.


def create_repository(name: str, private: bool, token: str | None = None) -> str:
    """Creates the repository `name` if it is missing, and returns its id, with the owner.

    A run calls this before it trains, so that a wrong token does not show after hours. A `token` of None is that of
    `hf auth login`. Raises `UserInputError` if the token can't be one, the Hub refuses, the token may only read, or a
    repository that is to be private is public.
    """
    check_token(token)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id
        is_private = api.model_info(repo_id).private
        role = api.whoami()["auth"].get("accessToken", {}).get("role")
    except Exception as error:
        raise UserInputError(
            f"--push_to_hub can't create {name}: {first_line(error)}; check --hub_model_id and the token "
            "('hf auth login')"
        ) from None
    if role == "read":
        raise UserInputError(f"--push_to_hub: the token may only read; make one that may write, for {repo_id}")
    if private and not is_private:
        raise UserInputError(
            f"--hub_private_repo: {repo_id} exists and is public; make it private in its settings, or leave this out"
        )
    return repo_id


def copy_uploaded(run_dir: Path) -> Path:
    """Returns a temporary folder with a copy of what is to be uploaded, as the training goes on to write the files."""
    copy = Path(tempfile.mkdtemp(prefix="upload-"))
    files = (str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file())
    for name in filter_repo_objects(files, allow_patterns=[*UPLOADED, CARD_FILE]):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run_dir / name, copy / name)
    return copy


def upload(api: HfApi, repo_id: str, folder: Path, message: str, create_pr: bool = False) -> CommitInfo:
    """Uploads a folder made by `copy_uploaded` as one commit, or as a pull request.

    Writes a card into the folder first, which keeps what people wrote into the card on the Hub.
    """
    (folder / CARD_FILE).write_text(make_card(folder, repo_id, _read_card(api, repo_id)))
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        delete_patterns=REPLACED,
        commit_message=message,
        create_pr=create_pr,
    )


def _read_card(api: HfApi, repo_id: str) -> str | None:
    """Returns the card on the Hub; None if the repository has none."""
    try:
        # Without `force_download` the cache would answer for a Hub that does not, with a card that may be older.
        return Path(api.hf_hub_download(repo_id, CARD_FILE, force_download=True)).read_text()
    except EntryNotFoundError:
        return None


class HubUploader:
    """Uploads a run in a thread beside the training. A Hub that fails costs the run a warning and no time."""

    def __init__(self, repo_id: str, run_dir: Path, private: bool, token: str | None) -> None:
        self.repo_id = repo_id
        self.run_dir = run_dir
        self.private = private
        self._api = HfApi(token=token)
        self._running: Future | None = None
        self._tried: int | None = None  # the step of the last upload that was started
        self._unsent: int | None = None  # the step that is on the disk and not on the Hub
        disable_progress_bars()  # of uploads, which would write over the bar of the training

    def push(self, global_step: int) -> None:
        """Starts to upload what the run has written at a step; while an upload is under way, leaves it to the next."""
        self._unsent = global_step
        if self._running is not None and not self._running.done():
            return
        self._tried = global_step
        self._running = self._api.run_as_future(self._send, copy_uploaded(self.run_dir), global_step)

    def finish(self) -> None:
        """Waits until the last step is on the Hub. If that fails, prints the command that sends it."""
        while self._running is not None:
            if not self._running.done():
                tqdm.write(f"uploading to {self.repo_id}")
            self._running.result()
            self._running = None
            if self._unsent is not None and self._unsent != self._tried:
                self.push(self._unsent)
        if self._unsent is not None:
            private = " --private" if self.private else ""
            tqdm.write(
                f"warning: step {self._unsent} is not on the Hub; send it by: "
                f"python -m sprite_diffusion.sharing.hub push {self.run_dir} {self.repo_id}{private}"
            )

    def _send(self, folder: Path, global_step: int) -> None:
        """Uploads a folder and removes it; tries again where the Hub fails."""
        for delay in (*RETRY_DELAYS, None):
            try:
                commit = upload(self._api, self.repo_id, folder, f"Step {global_step}")
            except Exception as error:
                next_try = "" if delay is None else f"; trying again in {delay:.0f} s"
                tqdm.write(f"warning: {self.repo_id} was not updated ({first_line(error)}){next_try}")
                if delay is not None:
                    time.sleep(delay)
            else:
                tqdm.write(f"uploaded {commit.commit_url}")
                if self._unsent == global_step:  # else a newer step waits for the next upload
                    self._unsent = None
                break
        shutil.rmtree(folder)


def _push(run_dir: Path, repo_id: str, private: bool, create_pr: bool) -> str:
    """Uploads a finished run, and returns its id, with the owner. Raises `UserInputError` if the Hub refuses it."""
    check_token(None)
    api = HfApi()
    if not create_pr:  # a pull request may go to a repository of somebody else
        repo_id = create_repository(repo_id, private)
    folder = copy_uploaded(run_dir)
    try:
        commit = upload(api, repo_id, folder, f"Upload {run_dir.resolve().name}", create_pr)
    except UserInputError:
        raise
    except Exception as error:
        raise UserInputError(f"{repo_id} was not updated: {first_line(error)}") from None
    finally:
        shutil.rmtree(folder)
    print(f"uploaded {commit.pr_url or commit.commit_url}")
    return repo_id


def parse_args() -> argparse.Namespace:
    """Reads the command line. Raises `UserInputError` for a wrong one, and for a folder without a pipeline."""
    parser = ArgumentParser(prog="python -m sprite_diffusion.sharing.hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    push = commands.add_parser("push", help="Upload a run; the token is that of `hf auth login`, or HF_TOKEN.")
    push.add_argument("run_dir", type=Path)
    push.add_argument("repo_id", help="Such as me/sprites; made if it is missing.")
    push.add_argument("--private", action="store_true", help="Make it private if it is missing.")
    push.add_argument("--pr", action="store_true", help="Open a pull request in place of a commit.")
    push.add_argument("--space", metavar="ID", help="Also make a Space of this id, with the studio of the model.")
    card = commands.add_parser("card", help=f"Write {CARD_FILE} of a run, and upload nothing.")
    card.add_argument("run_dir", type=Path)
    args = parser.parse_args()
    if args.command == "push" and args.pr and args.space is not None:
        raise UserInputError("--space does not go with --pr: its studio would draw with what the repository holds now")
    if not (args.run_dir / INDEX_FILE).is_file():
        raise UserInputError(f"{args.run_dir} holds no pipeline: name the output folder of a run that has saved one")
    return args


@exits_on_user_error
def main() -> None:
    args = parse_args()
    if args.command == "push":
        repo_id = _push(args.run_dir, args.repo_id, args.private, args.pr)
        if args.space is not None:
            print(f"uploaded {push_space(args.space, repo_id, args.private)}")
        return
    path = args.run_dir / CARD_FILE
    write_text(path, make_card(args.run_dir, None, None))
    print(f"wrote {printable(str(path))}")


if __name__ == "__main__":
    main()
