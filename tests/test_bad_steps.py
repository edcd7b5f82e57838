"""Tests that a run skips steps whose loss or gradient is not finite, and stops where it can't go on."""

import json
from types import SimpleNamespace

import pytest
import torch
from launching import TINY
from safetensors.torch import load_file

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.runs.state import TrainState
from sprite_diffusion.training import training_loop
from sprite_diffusion.training.bad_steps import OVERFLOWS_IN_A_ROW, BadSteps


def make_bad_steps(model, limit=10, scaler=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), scaler=scaler, gather=lambda tensor: tensor, is_main_process=True
    )
    return optimizer, BadSteps(accelerator, SimpleNamespace(optimizer=optimizer), model, limit)


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))


def take_step(model, optimizer, bad_steps, images, factor=1.0) -> None:
    bad_steps.watch(model(images).square().mean() * factor).backward()
    bad_steps.mark(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
    optimizer.zero_grad()


def trained_tensors(model, optimizer) -> list[torch.Tensor]:
    """Returns copies of all that a step may change: weights, statistics, moments and step counts."""
    states = [value for parameter in model.parameters() for value in optimizer.state[parameter].values()]
    return [tensor.clone() for tensor in [*model.state_dict().values(), *states] if tensor.is_floating_point()]


@pytest.mark.parametrize("bad", ["image", "loss"])
def test_a_bad_step_moves_nothing_and_the_next_one_goes_on(bad):
    """The weights, both moments, the step count and BatchNorm's statistics stay as they were."""
    images = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    model, undisturbed = make_model(), make_model()
    (optimizer, bad_steps), (other_optimizer, other) = make_bad_steps(model), make_bad_steps(undisturbed)
    take_step(model, optimizer, bad_steps, images)
    take_step(undisturbed, other_optimizer, other, images)
    before = trained_tensors(model, optimizer)
    broken = images.clone()
    broken[3, 1] = torch.nan if bad == "image" else 0.0
    take_step(model, optimizer, bad_steps, broken, factor=1.0 if bad == "image" else torch.inf)
    assert all(map(torch.equal, before, trained_tensors(model, optimizer)))
    take_step(model, optimizer, bad_steps, images)
    take_step(undisturbed, other_optimizer, other, images)
    after = trained_tensors(model, optimizer)
    assert not all(map(torch.equal, before, after))
    assert all(map(torch.equal, after, trained_tensors(undisturbed, other_optimizer)))
    state = TrainState()
    assert bad_steps.read(state, "none") == {"skipped_steps": 1}
    assert state.skipped_steps == 1


def test_an_infinite_loss_with_a_finite_gradient_is_a_bad_step():
    model = make_model()
    _, bad_steps = make_bad_steps(model)
    loss = model(torch.ones(2, 3)).sum() + torch.inf
    bad_steps.watch(loss).backward()
    assert all(parameter.grad.isnan().all() for parameter in model.parameters())


def test_only_a_row_of_them_ends_the_run():
    model = make_model()
    optimizer, bad_steps = make_bad_steps(model, limit=3)
    images = torch.ones(2, 3)
    for factor in [torch.nan, torch.nan, 1.0, torch.nan, torch.nan]:
        take_step(model, optimizer, bad_steps, images, factor)
    bad_steps.read(TrainState(), "none")
    take_step(model, optimizer, bad_steps, images, torch.nan)  # the third in a row that began before the reading
    take_step(model, optimizer, bad_steps, images)
    with pytest.raises(UserInputError, match=r"3 steps in a row: lower --learning_rate.*: runs/x/checkpoint-5"):
        bad_steps.read(TrainState(), "runs/x/checkpoint-5")


def test_an_overflow_of_fp16_is_told_from_divergence(capsys):
    """Takes steps with a GradScaler on the CPU whose loss is finite and whose scaled gradient is not."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    model = make_model()
    optimizer, bad_steps = make_bad_steps(model, limit=2, scaler=scaler)

    def step(factor: float) -> None:
        loss = bad_steps.watch((model[0](torch.full((2, 3), 9.0)) * 9).square().mean() * factor)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        bad_steps.mark(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    weights = [parameter.clone() for parameter in model.parameters()]
    state = TrainState()
    for _ in range(4):
        step(1.0)
    assert all(map(torch.equal, weights, model.parameters()))
    assert bad_steps.read(state, "none") == {"skipped_steps": 0, "overflowed_steps": 4}
    assert capsys.readouterr().err == ""
    assert scaler.get_scale() == pytest.approx(1e38 / 2**4)
    step(torch.nan)
    assert bad_steps.read(state, "none") == {"skipped_steps": 1, "overflowed_steps": 4}
    assert "warning: 1 step(s) skipped" in capsys.readouterr().err
    scaler.update(1e38)
    for _ in range(OVERFLOWS_IN_A_ROW):
        step(1.0)
        scaler.update(1e38)
    with pytest.raises(UserInputError, match="fp16 overflowed in"):
        bad_steps.read(state, "none")


@pytest.fixture
def poisoned(monkeypatch):
    """Returns a function that puts a NaN into the images of given steps, before they reach the loss."""

    def poison(steps: range) -> None:
        draw = training_loop.draw_randomness

        def draw_and_poison(entropy, batch, *args):
            if entropy[1] in steps:
                batch.images[0, 0, 0, 0] = torch.nan
            return draw(entropy, batch, *args)

        monkeypatch.setattr(training_loop, "draw_randomness", draw_and_poison)

    return poison


def test_a_run_goes_on_over_a_bad_step(run_script, tmp_path, poisoned, capsys):
    poisoned(range(4, 6))
    run_script("train_unconditional", f"{TINY} --use_ema", tmp_path)
    assert json.loads((tmp_path / "training_summary.json").read_text())["skipped_steps"] == 2
    assert json.loads((tmp_path / "checkpoint-6" / "train_state.json").read_text())["skipped_steps"] == 2
    assert json.loads((tmp_path / "checkpoint-3" / "train_state.json").read_text())["skipped_steps"] == 0
    for file in tmp_path.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    assert capsys.readouterr().err.count("warning: 1 step(s) skipped") == 2


def test_a_run_that_diverges_stops_and_names_its_last_checkpoint(run_script, tmp_path, poisoned, capsys):
    poisoned(range(4, 100))
    with pytest.raises(SystemExit) as exit:
        run_script("train_unconditional", f"{TINY} --max_skipped_steps 3", tmp_path)
    assert exit.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the loss or gradient was not finite in 3 steps in a row")
    assert error.endswith(f"last checkpoint: {tmp_path / 'checkpoint-6'}")
    assert json.loads((tmp_path / "training_summary.json").read_text())["global_step"] == 4  # the first epoch's


def test_weights_that_are_not_finite_are_not_saved(run_script, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run_script("train_unconditional", f"{TINY} --learning_rate 1e39 --lr_warmup_steps 0", tmp_path)
    assert exit.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the weights are not finite at step 3")
    assert not [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*.png")]
