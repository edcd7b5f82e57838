"""Tests what the environment of `accelerate launch` and `accelerate config` does: honoured, or refused in one line."""

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DynamoBackend
from launching import TINY, finish, start

from sprite_diffusion.common import machine
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.common.machine import check_launch, choose_compilation, choose_precision
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.training.performance import make_accelerator

# What is in the environment, the flags besides, and fragments of the line of error.
REFUSED = [
    ({"ACCELERATE_USE_FSDP": "true"}, "", "ACCELERATE_USE_FSDP: FSDP is not supported", "accelerate config"),
    ({"ACCELERATE_USE_FSDP": "TRUE"}, "", "ACCELERATE_USE_FSDP: FSDP is not supported"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "", "ACCELERATE_USE_DEEPSPEED: DeepSpeed is not supported"),
    ({"ACCELERATE_USE_MEGATRON_LM": "1"}, "", "ACCELERATE_USE_MEGATRON_LM: Megatron-LM is not supported"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "", "tensor, context or sequence parallelism is not supported"),
    ({"ACCELERATE_USE_SAGEMAKER": "true"}, "", "ACCELERATE_USE_SAGEMAKER: SageMaker is not supported"),
    ({"ACCELERATE_USE_FSDP": "maybe"}, "", "ACCELERATE_USE_FSDP is 'maybe': it must be true or false"),
    ({"ACCELERATE_USE_CPU": "maybe"}, "", "ACCELERATE_USE_CPU is 'maybe': it must be true or false"),
    ({"ACCELERATE_DEBUG_MODE": "2"}, "", "ACCELERATE_DEBUG_MODE is '2': it must be true or false"),
    ({"ACCELERATE_DYNAMO_USE_DYNAMIC": "x"}, "", "ACCELERATE_DYNAMO_USE_DYNAMIC is 'x': it must be true or false"),
    ({"WORLD_SIZE": "two"}, "", "WORLD_SIZE is 'two': it must be a whole number"),
    ({"LOCAL_RANK": ""}, "", "LOCAL_RANK is '': it must be a whole number"),
    ({"ACCELERATE_TORCH_DEVICE": "abacus"}, "", "ACCELERATE_TORCH_DEVICE is 'abacus'"),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "", "ACCELERATE_MIXED_PRECISION is 'fp8': it must be no, fp16 or bf16"),
    ({"ACCELERATE_MIXED_PRECISION": "fp64"}, "", "ACCELERATE_MIXED_PRECISION is 'fp64'"),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "--mixed_precision bf16", "--mixed_precision is bf16", "says fp16"),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "--mixed_precision fp16", "--mixed_precision is fp16", "says bf16"),
    (
        {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_CPU": "true"},
        "",
        "--mixed_precision fp16 needs a GPU: give bf16",
    ),
    ({"ACCELERATE_USE_CPU": "true"}, "--mixed_precision fp16", "--mixed_precision fp16 needs a GPU"),
    ({"ACCELERATE_DYNAMO_BACKEND": "IPEX"}, "", "ACCELERATE_DYNAMO_BACKEND is 'ipex': only no and inductor"),
    ({"ACCELERATE_DYNAMO_BACKEND": "fast"}, "", "ACCELERATE_DYNAMO_BACKEND is 'fast'"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--compile off", "--compile is off", "--dynamo_backend inductor"),
]


@pytest.fixture(autouse=True)
def new_states():
    """Lets each test make an accelerator of its own, as a process would."""
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: " ".join([*map("=".join, case[0].items()), case[1]]))
def test_what_is_not_supported_is_refused_before_anything_is_read(case, run_script, tmp_path, monkeypatch, capfd):
    environment, flags, *fragments = case
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit:
        run_script("train_unconditional", f"{TINY} --dataset_name {tmp_path}/missing.npy {flags}", tmp_path / "run")
    assert exit.value.code == 2
    [error] = capfd.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert all(fragment in error for fragment in fragments)
    assert "missing.npy" not in error
    assert not list(tmp_path.iterdir())


def test_metrics_refuse_it_too(run_script, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SystemExit):
        run_script("calculate_metrics", f"{tmp_path} --dataset_name sprites")
    assert "error: ACCELERATE_USE_DEEPSPEED: DeepSpeed is not supported" in capfd.readouterr().err


def test_xla_is_refused(monkeypatch):
    monkeypatch.setattr(machine, "is_torch_xla_available", lambda: True)
    with pytest.raises(UserInputError, match="TPUs and XLA are not supported; set USE_TORCH_XLA=0"):
        check_launch()


@pytest.mark.parametrize(
    ("of_launcher", "flag", "expected"),
    [
        (None, "no", "no"),
        (None, "bf16", "bf16"),
        ("", "bf16", "bf16"),
        ("no", "no", "no"),
        ("no", "bf16", "bf16"),  # accelerate launch says 'no' where nobody was asked
        ("bf16", "no", "bf16"),
        ("BF16", "no", "bf16"),
        ("bf16", "auto", "bf16"),
        ("bf16", "bf16", "bf16"),
    ],
)
def test_precision_of_the_launcher_counts_where_no_flag_says_another(of_launcher, flag, expected, monkeypatch):
    if of_launcher is None:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    else:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", of_launcher)
    assert choose_precision(flag) == expected
    assert make_accelerator(TrainingConfig(mixed_precision=flag)).mixed_precision == expected


def test_precision_of_the_launcher_is_that_of_the_run(tmp_path):
    flags = f"{TINY} --max_train_steps 1 --logger none"
    process = start("train_unconditional", flags, tmp_path / "run", environment={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert "1 process(es), precision bf16" in finish(process).stdout


def test_accumulation_of_the_launcher_changes_no_loss(monkeypatch):
    """Accelerate would divide each loss by it. The flag alone says how many micro-batches a step has."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = make_accelerator(TrainingConfig(gradient_accumulation_steps=2))
    assert accelerator.gradient_accumulation_steps == 1


def test_model_is_compiled_once(monkeypatch):
    """By `compile_model`; accelerate would compile it too, and save it under other names."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert [choose_compilation(flag) for flag in ("auto", "on")] == ["on", "on"]
    assert make_accelerator(TrainingConfig()).state.dynamo_plugin.backend == DynamoBackend.NO
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert [choose_compilation(flag) for flag in ("auto", "on", "off")] == ["auto", "on", "off"]
