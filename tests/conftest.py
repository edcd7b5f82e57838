import importlib
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

REPOSITORY = Path(__file__).resolve().parent.parent

# A run of seconds: 4 optimizer steps an epoch, of a network of 0.02 M parameters.
TINY = (
    "--config {config} --max_train_samples 20 --train_batch_size 5 --num_epochs 2 --lr_warmup_steps 2 "
    "--ddpm_num_inference_steps 2 --eval_batch_size 3 --block_out_channels 8 --attention_levels 0 "
    "--attention_head_dim 8 --checkpointing_steps 3 --logging_steps 1"
).format(config=REPOSITORY / "configs" / "smoke_cpu.yaml")

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
LAUNCH += "--num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0".split()
LAUNCH_TWO = [*LAUNCH, "--multi_gpu", "--num_processes", "2"]  # on CPUs where there are no GPUs
ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory):
    """The tests neither use nor fill the user's cache."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def run_script():
    """Runs a script's `main` in this process; `run_script("train_unconditional", "--seed 1", output_dir)`."""

    def run(script: str, flags: str, output_dir: Path | None = None) -> None:
        output = [] if output_dir is None else ["--output_dir", str(output_dir)]
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state.clear()
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(sys, "argv", [script, *flags.split(), *output])
            importlib.import_module(script).main()

    return run
