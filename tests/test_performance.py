"""Tests that what makes training and sampling fast changes nothing but the speed."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models import attention_processor
from diffusers.models.attention_processor import Attention
from inspecting import weights
from launching import PYTHON, REPOSITORY, TINY, run_command
from PIL import Image
from torch.overrides import TorchFunctionMode

from sprite_diffusion.common.machine import choose_precision, count_free_cores, prepare_cpu
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.sampling.pipeline_loading import load_pipeline
from sprite_diffusion.sharing.trackers import Trackers
from sprite_diffusion.training.build import build_model
from sprite_diffusion.training.performance import Float32AttnProcessor, compile_model, prepare_attention

CPU_BF16 = SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16")


def tiny_unet(**options) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **options,
    )


class AttentionTypes(TorchFunctionMode):
    """Notes the types that attention is called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append({tensor.dtype for tensor in args})
        return function(*args, **(kwargs or {}))


def test_attention_is_float32_under_bf16_on_a_cpu(monkeypatch):
    warnings = []  # diffusers would warn of an argument that a processor does not take
    monkeypatch.setattr(attention_processor.logger, "warning", warnings.append)
    unet = tiny_unet()
    images = torch.randn(2, 3, 8, 8)
    outputs, seen = [], []
    for prepare in (False, True):
        if prepare:
            prepare_attention(unet, CPU_BF16)
        with AttentionTypes() as types, torch.autocast("cpu", torch.bfloat16):
            outputs.append(unet(images, 0).sample)
        seen.append(types.seen)
    assert seen[0] == [{torch.bfloat16}] * len(seen[0])
    assert seen[1] == [{torch.float32}] * len(seen[0])
    assert len(seen[0]) > 1
    # The two differ by rounding: bf16 keeps 8 bits, of values of about 1.
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=16 * 2**-8)
    assert warnings == []


@pytest.mark.parametrize(("device", "precision"), [("cpu", "no"), ("cuda", "bf16")])
def test_attention_is_left_alone_elsewhere(device, precision):
    unet = tiny_unet()
    prepare_attention(unet, SimpleNamespace(device=torch.device(device), mixed_precision=precision))
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    assert attentions
    assert not any(isinstance(attention.processor, Float32AttnProcessor) for attention in attentions)


def test_freed_memory_is_kept():
    """Counts the page faults of eight tensors of 8 MB, or 2,048 pages, which come and go like a step's activations."""
    code = """
import resource, torch
from sprite_diffusion.training.build import build_model
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.common.machine import choose_precision, prepare_cpu
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        tensors = [torch.ones(2 << 20) for _ in range(8)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
prepare_cpu(num_threads=None)
faults()
print(before, faults())
"""
    before, after = map(int, run_command([*PYTHON, "-c", code], fork=False).stdout.split())
    assert before > 10_000  # of up to 20 * 8 * 2048; else there is nothing to gain here
    assert after < 1000


@pytest.mark.parametrize(
    ("flag", "environment", "threads"),
    [
        (None, {}, [4]),
        (None, {"LOCAL_WORLD_SIZE": "2"}, [2]),
        (None, {"LOCAL_WORLD_SIZE": "9"}, [1]),
        (None, {"OMP_NUM_THREADS": "1"}, []),  # torch has read it
        (None, {"OMP_NUM_THREADS": "3"}, []),
        # `accelerate launch` says 1 if nobody has said anything.
        (None, {"OMP_NUM_THREADS": "1", "ACCELERATE_DYNAMO_BACKEND": "NO"}, [4]),
        (None, {"OMP_NUM_THREADS": "3", "ACCELERATE_DYNAMO_BACKEND": "NO"}, []),
        (1, {"OMP_NUM_THREADS": "3", "ACCELERATE_DYNAMO_BACKEND": "NO"}, [1]),
        (3, {"LOCAL_WORLD_SIZE": "2"}, [3]),
    ],
)
def test_threads_are_those_that_the_user_gave_or_all(flag, environment, threads, monkeypatch):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(4), raising=False)
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    prepare_cpu(flag)
    assert set_to == threads


@pytest.mark.parametrize(
    ("used", "free"), [([0, 0, 0, 0], 3), ([99, 0, 99, 0], 2), ([0, 20, 0, 99], 2), ([99, 99, 0, 99], 1)]
)
def test_free_cores_are_those_of_this_program_that_no_other_uses(used, free, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 3}, raising=False)
    monkeypatch.setattr("psutil.cpu_percent", lambda interval, percpu: used)
    assert count_free_cores() == free


def test_run_on_a_busy_machine_says_how_many_threads_are_faster(run_script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})  # also where the tests may use one core alone
    for used, note in ((100, True), (0, False)):
        monkeypatch.setattr("psutil.cpu_percent", lambda interval, percpu, used=used: [used] * 1024)
        run_script("train_unconditional", f"{TINY} --max_train_steps 1 --logger none", tmp_path / f"run-{used}")
        assert ("--num_threads 1 is faster" in capsys.readouterr().out) == note


def test_auto_compiles_on_a_gpu_and_for_long_runs_only():
    def compiles(choice: str, device: str, total_steps: int) -> bool:
        model = torch.nn.Linear(1, 1)
        accelerator = SimpleNamespace(device=torch.device(device))
        return compile_model(model, SimpleNamespace(compile=choice), accelerator, total_steps) is not model

    assert compiles("auto", "cuda", 100_000)
    assert not compiles("auto", "cuda", 1000)
    assert not compiles("auto", "cpu", 100_000)
    assert compiles("on", "cpu", 1)
    assert not compiles("off", "cuda", 100_000)


def test_bfloat16_samples_are_near_and_recorded(run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_script("train_unconditional", f"{TINY} --num_epochs 1 --seed 3", tmp_path / "run")
    pictures = {}
    for dtype in ("float32", "bfloat16"):
        run_script(
            "sample", f"run --num_images 4 --scheduler ddim --num_inference_steps 5 --dtype {dtype} --output a.png"
        )
        pictures[dtype] = np.asarray(Image.open("a.png").convert("RGB"), int)
        assert json.loads((tmp_path / "a.json").read_text())["dtype"] == dtype
    assert load_pipeline("run", torch.bfloat16).unet.dtype == torch.bfloat16
    difference = abs(pictures["float32"] - pictures["bfloat16"])
    # bfloat16 rounds a prediction to 8 bits, which is 1 of 256 levels; a few layers and steps add up.
    assert 0 < difference.mean() < 8


def test_gradient_checkpointing_calculates_blocks_again_and_the_same():
    gradients, calls = [], []
    for checkpointing in (False, True):
        options = {"block_out_channels": [8], "attention_levels": [0], "resolution": "8"}
        torch.manual_seed(0)
        model = build_model(TrainingConfig(gradient_checkpointing=checkpointing, **options), num_channels=3)
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        model.down_blocks[0].resnets[0].register_forward_pre_hook(count)
        model(torch.ones(1, 3, 8, 8), 0).sample.sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert calls == [1, 2]
    for plain, again in zip(*gradients, strict=True):
        # Both take the same float32 operations, but may add up two gradients in another order.
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_compiled_training_is_the_same(run_script, tmp_path, precision):
    for choice in ("off", "on"):
        flags = f"{TINY} --num_epochs 1 --seed 3 --compile {choice} --mixed_precision {precision}"
        run_script("train_unconditional", flags, tmp_path / choice)
    off, on = (weights(tmp_path / choice) for choice in ("off", "on"))
    # Four steps of Adam at a learning rate of up to 1e-3: a weight whose gradient is rounding noise may go either way.
    bound = {"no": 1e-5, "bf16": 4e-3}[precision]
    assert off.keys() == on.keys()
    assert sum((off[name] - on[name]).abs().mean() for name in off) / len(off) < bound
    assert any(not torch.equal(off[name], on[name]) for name in off)  # compiled code rounds otherwise


@pytest.mark.slow
def test_compiled_samples_are_the_same(run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_script("train_unconditional", f"{TINY} --num_epochs 1 --seed 3", tmp_path / "run")
    pictures = []
    for flag in ("", "--compile"):
        run_script("sample", f"run --num_images 4 --num_inference_steps 5 --output a.png {flag}")
        pictures.append(np.asarray(Image.open("a.png").convert("RGB"), int))
    assert abs(pictures[0] - pictures[1]).max() <= 1  # 1e-5 of the range may be the border of a level


@pytest.mark.slow
@pytest.mark.skipif(choose_precision("auto") == "no", reason="without bf16 in hardware a step takes seconds")
def test_loss_of_the_fast_path_stays_within_the_spread_of_seeds(run_script, tmp_path):
    """Compares 500 steps in bf16 with those in float32, of three seeds each, by the mean loss of each tenth."""
    preset = "--config configs/smoke_cpu.yaml --num_epochs 25 --logger none --logging_steps 1 --save_images_epochs 100"
    curves = {}
    monitor = []

    def log(self, metrics, step):
        monitor.append(metrics.get("loss"))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(REPOSITORY)
        monkeypatch.setattr(Trackers, "log", log)
        for precision, seed in (("no", 0), ("no", 1), ("no", 2), ("bf16", 0), ("bf16", 1), ("bf16", 2)):
            monitor.clear()
            flags = f"{preset} --mixed_precision {precision} --seed {seed}"
            run_script("train_unconditional", flags, tmp_path / f"{precision}{seed}")
            curves[precision, seed] = np.array(monitor, float).reshape(10, -1).mean(axis=1)
    plain = np.array([curves["no", seed] for seed in range(3)])
    fast = np.array([curves["bf16", seed] for seed in range(3)])
    spread = plain.max(axis=0) - plain.min(axis=0)
    assert (abs(fast.mean(axis=0) - plain.mean(axis=0)) < spread).all()
    # With the same seed both paths see the same images and noise, and differ by rounding alone.
    assert abs(fast - plain).mean() < spread.mean() / 2
