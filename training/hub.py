"""Uploading a trained pipeline to the Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from tqdm.auto import tqdm

from training.checkpoint import PIPELINE_FILES
from training.config import TrainingConfig
from training.errors import UserInputError

UPLOADED = [*PIPELINE_FILES, "samples/*"]  # never checkpoints, optimizer states, logs or data


def create_repository(config: TrainingConfig) -> str | None:
    """Creates the repository if it is missing and returns its id; None without `--push_to_hub`.

    Called before training, so that a wrong token does not show after hours of it.
    """
    if not config.push_to_hub:
        return None
    name = config.hub_model_id or Path(config.output_dir).name
    try:
        api = HfApi(token=config.hub_token)
        return api.create_repo(name, private=config.hub_private_repo, exist_ok=True).repo_id
    except Exception as error:
        reason = _first_line(error)
        raise UserInputError(
            f"--push_to_hub can't create {name}: {reason}; check --hub_model_id and the token ('hf auth login')"
        ) from None


def upload_pipeline(config: TrainingConfig, repo_id: str, global_step: int) -> None:
    """Uploads the pipeline in `output_dir`. A Hub that fails costs a warning, not the run."""
    try:
        commit = HfApi(token=config.hub_token).upload_folder(
            repo_id=repo_id,
            folder_path=config.output_dir,
            allow_patterns=UPLOADED,
            commit_message=f"Step {global_step}",
        )
    except Exception as error:
        reason = _first_line(error)
        tqdm.write(f"warning: {repo_id} was not updated ({reason}); the pipeline is in {config.output_dir}")
    else:
        tqdm.write(f"uploaded {commit.commit_url}")


# The client's errors have no base in common: those of its network library come through (requests, then httpx), and a
# failed upload of weights is a RuntimeError. Hence `except Exception` above, around nothing but calls of the client.
def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
