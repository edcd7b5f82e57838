"""Converted checkpoints of the sprite course against a network and a sampling loop written as the course's."""

import numpy as np
import pytest
import torch
from course_network import make_course_network
from diffusers import DiffusionPipeline

from sprite_diffusion.sampling.convert_course_checkpoint import course_scheduler


@pytest.fixture
def convert(run_script):
    def run(*arguments) -> None:
        run_script("sprite_diffusion.sampling.convert_course_checkpoint", " ".join(map(str, arguments)))

    return run


class CourseSchedule:
    """The course's tables, in float64: index t is its timestep, 1..500."""

    betas = (0.02 - 1e-4) * torch.linspace(0, 1, 501, dtype=torch.float64) + 1e-4
    alphas = 1 - betas
    alpha_bars = torch.cumsum(alphas.log(), dim=0).exp()

    def denoise(self, x, t, prediction, noise):
        mean = (x - prediction * ((1 - self.alphas[t]) / (1 - self.alpha_bars[t]).sqrt())) / self.alphas[t].sqrt()
        return mean + self.betas[t].sqrt() * noise


def test_converted_pipeline_predicts_and_steps_as_the_course(convert, tmp_path):
    course = make_course_network(f=16, c=5)
    torch.save(course.state_dict(), tmp_path / "context_model_trained.pth")
    convert(tmp_path / "context_model_trained.pth", tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert pipeline.id2label == {0: "hero", 1: "non-hero", 2: "food", 3: "spell", 4: "side-facing"}

    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    context = torch.tensor([[1, 0, 0, 0, 0], [0.5, 0, 0.6, 0, 0]])
    schedule, scheduler = CourseSchedule(), pipeline.scheduler
    scheduler.set_timesteps(500)
    assert scheduler.timesteps.tolist() == list(range(499, -1, -1))
    with torch.no_grad():
        for t in (500, 499, 250, 2):
            expected = course(x, torch.full((2, 1), t / 500), context)
            prediction = pipeline.unet(x, t - 1, context=context).sample
            # the same layers on the same numbers: roundings as in tests/test_models.py
            torch.testing.assert_close(prediction, expected, rtol=1e-5, atol=1e-5)

            generator = torch.Generator().manual_seed(t)
            stepped = scheduler.step(prediction, t - 1, x, generator=generator).prev_sample
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
            expected = schedule.denoise(x.double(), t, prediction.double(), noise.double())
            # About ten float32 operations on values below 16.
            torch.testing.assert_close(stepped.double(), expected, rtol=0, atol=10 * 16 * 2**-24)


def test_schedule_is_the_courses():
    scheduler = course_scheduler()
    torch.testing.assert_close(scheduler.alphas_cumprod, CourseSchedule.alpha_bars[1:], rtol=1e-13, atol=0)
    assert not scheduler.config.clip_sample


def test_sizes_are_read_from_the_shapes(convert, tmp_path):
    torch.save(make_course_network(f=24, c=3).state_dict(), tmp_path / "other.pth")
    convert(tmp_path / "other.pth", tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (pipeline.unet.config.num_features, pipeline.num_classes, pipeline.id2label) == (24, 3, {})
    images = pipeline(class_labels=[0, 2], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all()


class Malicious:
    def __reduce__(self):
        return (print, ("this code ran",))


def test_files_that_are_not_course_checkpoints(convert, tmp_path, capsys):
    course = make_course_network().state_dict()
    torch.save({"unet.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save({name: value for name, value in course.items() if "up0" not in name}, tmp_path / "part.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(Malicious(), tmp_path / "malicious.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    torch.save(course, tmp_path / "good.pth")
    for arguments, fragment in [
        (("other.pth", "out"), "'unet.weight' is not a weight of the course's ContextUnet"),
        (("part.pth", "out"), "part.pth is not a checkpoint of the course's ContextUnet"),
        (("list.pth", "out"), "list.pth is not a checkpoint of the course's ContextUnet"),
        (("malicious.pth", "out"), "malicious.pth is not a state dict"),
        (("text.pth", "out"), "text.pth is not a state dict"),
        (("missing.pth", "out"), "missing.pth: no such file"),
        (("good.pth", "full"), "full is there already"),
    ]:
        with pytest.raises(SystemExit) as exit:
            convert(*(tmp_path / argument for argument in arguments))
        assert exit.value.code == 2
        output = capsys.readouterr()
        assert output.err.startswith("error: ")
        assert output.err.count("\n") == 1
        assert fragment in output.err
        assert "this code ran" not in output.out
    assert not (tmp_path / "out").exists()
