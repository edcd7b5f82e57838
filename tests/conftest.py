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
