"""Tests what a run tells of itself: its log, the picture of its losses, and its page, opened in Chromium.

The tests of the page need Debian's chromium and chromium-driver; they fail where these are missing.
"""

import base64
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from browsing import DESKTOP, PHONE, set_screen, start_browser, wait
from launching import TINY
from matplotlib.colors import to_rgb
from PIL import Image
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from sprite_diffusion.metrics import classifier
from sprite_diffusion.runs import outputs
from sprite_diffusion.sampling.conditions import Condition, one_hot
from sprite_diffusion.sampling.generation import Request, sample_images, sample_noise, to_unit_range
from sprite_diffusion.sampling.pictures import make_picture
from sprite_diffusion.sampling.pipeline_loading import load_pipeline
from sprite_diffusion.sampling.samplers import make_sampler
from sprite_diffusion.sharing import report
from sprite_diffusion.sharing.report import draw_losses, read_training_log, summarize_epochs

SCRIPT = "sprite_diffusion.sharing.report"
# Two epochs of 8 steps, the last one of fewer images, and grids that are wider than a page of text.
FLAGS = f"{TINY} --max_train_samples 38 --eval_batch_size 16 --save_images_steps 3 --logger none"
BATCHES = [5, 5, 5, 5, 5, 5, 5, 3]
GRID_STEPS = [3, 6, 8, 9, 12, 15, 16]
MARKUP = "<script>document.title = 'run'</script><img alt='x' src='https://example.com/x.png'>"
HTML_NAME = '<b>&"x' + 60 * "y"
TRAJECTORY_STEPS = 25


def entry(global_step: int, **values: float | None) -> dict:
    return {"global_step": global_step, "lr": global_step / 1000, **values}


LOG = [
    entry(1, epoch=0, images_seen=10, seconds=2.0, loss=1.0),
    entry(2, epoch=0, images_seen=30, seconds=5.0, loss=4.0),
    entry(3, epoch=1, images_seen=40, seconds=6.0, loss=None),
    entry(4, epoch=1, images_seen=45, seconds=8.0, loss=2.0),
    entry(5, epoch=2, images_seen=50, seconds=9.0, loss=None),
]


@pytest.fixture(autouse=True, scope="module")
def whole_trajectories():
    """Has the pages of this file show all steps, see conftest.py."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(report, "TRAJECTORY_STEPS", TRAJECTORY_STEPS)
        yield


@pytest.fixture(scope="module")
def trained(whole_trajectories, run_script, tmp_path_factory) -> tuple[Path, str]:
    """Trains a run. Returns its folder and what it printed."""
    output_dir = tmp_path_factory.mktemp("trained") / "sprites"
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(io.StringIO()) as printed:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # where a resumed run repeats bit for bit
        monkeypatch.setenv("XDG_CACHE_HOME", str(output_dir.parent / "cache"))  # for a classifier that is no good
        monkeypatch.setattr(classifier, "TRAINING_STEPS", 5)
        monkeypatch.setattr(outputs, "SHORTEST_PRINTED_EPOCH", 0)
        run_script("train_conditional", f"{FLAGS} --evaluate_every 2", output_dir)
    return output_dir, printed.getvalue()


@pytest.fixture(scope="module")
def run(trained) -> Path:
    """Returns the folder of a run, for tests to read and copy."""
    return trained[0]


def with_source(run_dir: Path, source: str) -> None:
    """Changes what a run's summary says of its data."""
    path = run_dir / "training_summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data_source": source}))


def read_lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "training_log.jsonl").read_text().splitlines()]


# The log


def test_log_has_every_step_once_with_its_loss_and_learning_rate(run):
    entries = read_lines(run)
    assert [entry["global_step"] for entry in entries] == list(range(1, 17))
    assert [entry["epoch"] for entry in entries] == 8 * [0] + 8 * [1]
    assert [entry["images_seen"] for entry in entries] == np.cumsum(2 * BATCHES).tolist()
    assert all(math.isfinite(entry["loss"]) and entry["loss"] > 0 for entry in entries)
    assert [entry["lr"] for entry in entries] == pytest.approx([0, 5e-4] + 14 * [1e-3])
    seconds = [entry["seconds"] for entry in entries]
    assert seconds[0] > 0
    assert seconds == sorted(seconds)


def test_run_prints_the_mean_of_each_epoch_over_its_images(trained):
    run, printed = trained
    losses = np.array([entry["loss"] for entry in read_lines(run)]).reshape(2, 8)
    means = [f"{mean:.4f}" for mean in np.average(losses, axis=1, weights=BATCHES)]
    lines = re.findall(r"^epoch (\d+): mean loss (\S+), \d+ images/s, \d+ s$", printed, re.MULTILINE)
    assert lines == [("1", means[0]), ("2", means[1])]


def test_mean_of_an_epoch_is_that_of_its_images_whose_loss_was_finite():
    first, second, third = summarize_epochs(LOG)
    assert (first.number, first.loss, first.images_per_second, first.seconds) == (1, (10 * 1 + 20 * 4) / 30, 6, 5)
    assert (second.number, second.loss, second.images_per_second, second.seconds) == (2, 2, 5, 3)
    assert third.number == 3
    assert math.isnan(third.loss)
    assert str(first) == "epoch 1: mean loss 3.0000, 6 images/s, 5 s"


def test_lines_of_the_log_that_cannot_be_read_are_left_out(tmp_path):
    assert read_training_log(tmp_path) == []
    good = [json.dumps(one).encode() for one in LOG]
    no_step = json.dumps({**LOG[0], "global_step": None}).encode()
    no_rate = json.dumps({name: value for name, value in LOG[0].items() if name != "lr"}).encode()
    text_loss = json.dumps({**LOG[0], "loss": "1.0"}).encode()
    infinite_epoch = json.dumps({**LOG[0], "epoch": float("inf")}).encode()
    bad = [good[0][:-9], b"\xff\xfe\x00", b"", b"[1, 2]", b"7", b"[" * 100_000, no_step, no_rate, text_loss]
    bad.append(infinite_epoch)
    lines = [*bad, good[0], *bad, *good[1:], good[0][:20]]
    (tmp_path / "training_log.jsonl").write_bytes(b"\n".join(lines))
    assert read_training_log(tmp_path) == LOG


def test_resumed_run_logs_each_step_once(run, run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    resumed = shutil.copytree(run, tmp_path / "run")
    with (resumed / "training_log.jsonl").open("a") as file:
        file.write('{"global_step": 17, "ep')  # torn by a kill
    run_script("train_conditional", f"{FLAGS} --resume_from_checkpoint checkpoint-12", resumed)
    before, after = read_lines(run), read_lines(resumed)
    for name in ("global_step", "loss"):
        assert [entry[name] for entry in after] == [entry[name] for entry in before]
    assert after[:12] == before[:12]
    assert all(new["seconds"] != old["seconds"] for new, old in zip(after[12:], before[12:], strict=True))


# The picture


def draw(entries: list[dict]) -> bytes:
    file = io.BytesIO()
    draw_losses(entries, file)
    return file.getvalue()


def test_picture_of_the_losses_shows_the_log_and_nothing_else(run):
    assert (run / "loss.png").read_bytes() == draw(read_lines(run))
    picture = np.asarray(Image.open(run / "loss.png").convert("RGB"))
    assert picture.shape == (525, 1800, 3)
    losses, logarithms, rates = np.split(picture, 3, axis=1)
    for part, color in ((losses, "tab:orange"), (logarithms, "tab:orange"), (rates, "tab:green")):
        distance = np.abs(part - np.multiply(to_rgb(color), 255)).max(axis=-1)
        assert (distance < 20).sum() > 50, color
    other_loss = [{**LOG[0], "loss": 1.5}, *LOG[1:]]
    other_rate = [{**LOG[0], "lr": 0.005}, *LOG[1:]]
    pictures = [draw(entries) for entries in (LOG, LOG, other_loss, other_rate)]
    assert pictures[0] == pictures[1]
    assert len({*pictures}) == 3


# The command


def test_command_writes_the_picture_and_the_page_again(run, run_script, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / run.name, ignore=shutil.ignore_patterns("loss.png", "report.html"))
    run_script(SCRIPT, str(copy))
    assert capsys.readouterr().out == f"wrote {copy / 'loss.png'}\nwrote {copy / 'report.html'}\n"
    for name in ("loss.png", "report.html"):
        assert (copy / name).read_bytes() == (run / name).read_bytes(), name


@pytest.mark.parametrize("summary", [None, "", '{"loss": ', "[]"])
def test_folder_that_is_no_run_is_an_error_of_one_line(summary, run_script, tmp_path, capsys):
    if summary is not None:
        (tmp_path / "training_summary.json").write_text(summary)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        run_script(SCRIPT, str(tmp_path))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"error: {tmp_path}.* is not the (folder|summary) of a run.*\n", err)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("token", ["hf_" + 34 * "x", "a-token-of-another-form"])
def test_token_does_not_stand_on_the_page(token, run, run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    copy = shutil.copytree(run, tmp_path / f"run-{token}")
    with_source(copy, f"/data/{token}/images")
    run_script(SCRIPT, str(copy))
    page = (copy / "report.html").read_text()
    assert token not in page
    assert "<h1>run-***</h1>" in page
    assert "<td>/data/***/images</td>" in page


# The page


@pytest.fixture(scope="module")
def browser():
    with start_browser() as browser:
        yield browser


@pytest.fixture
def visit(browser) -> Callable[..., None]:
    """Returns a function that opens a run's page."""

    def visit(run_dir: Path, width: int = DESKTOP, scheme: str = "light") -> None:
        set_screen(browser, width, scheme)
        browser.get((run_dir / "report.html").as_uri())

    return visit


@pytest.fixture(scope="module")
def html_run(run, run_script, tmp_path_factory) -> Path:
    """Returns a copy of the run, with a name, and a name of its data, that are long and have HTML in them."""
    copy = shutil.copytree(run, tmp_path_factory.mktemp("html") / HTML_NAME)
    with_source(copy, MARKUP)
    run_script(SCRIPT, str(copy))
    return copy


def find_figure(browser: Chrome, slider: str) -> tuple[WebElement, WebElement, list[WebElement]]:
    """Returns a slider, the caption beside it, and the images that it shows one of."""
    figure = browser.find_element(By.XPATH, f"//figure[.//input[@id='{slider}']]")
    caption = figure.find_element(By.TAG_NAME, "output")
    return figure.find_element(By.ID, slider), caption, figure.find_elements(By.TAG_NAME, "img")


def decode(image: WebElement) -> np.ndarray:
    """Returns the pixels (H, W, 3) of the PNG that stands in a page."""
    kind, content = image.get_attribute("src").split(",")
    assert kind == "data:image/png;base64"
    return to_array(base64.b64decode(content))


def to_array(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_page_asks_for_nothing_and_has_no_errors(run, browser, visit):
    for log in ("browser", "performance"):  # of earlier tests
        browser.get_log(log)
    visit(run)
    for slider in ("grids", "trajectory"):
        find_figure(browser, slider)[0].send_keys(Keys.HOME)
    messages = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url for url in requests if not url.startswith("data:")} == {(run / "report.html").as_uri()}
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    elements = browser.find_elements(By.CSS_SELECTOR, "[src], [srcset], [href], [data], [action]")
    sources = [element.get_dom_attribute("src") for element in elements]
    assert len(sources) == 1 + len(GRID_STEPS) + 25 + 1
    assert all(source and source.startswith("data:image/") for source in sources)


def test_images_are_whole_and_have_texts(run, browser, visit):
    visit(run)
    images = browser.find_elements(By.TAG_NAME, "img")
    assert all(image.get_attribute("alt").strip() for image in images)
    wait(browser, lambda: all(browser.execute_script("return arguments[0].complete", image) for image in images))
    assert all(image.get_property("naturalWidth") > 100 for image in images)
    names = [e.get_attribute("aria-label") for e in browser.find_elements(By.CSS_SELECTOR, "input[type=range]")]
    headings = [e.text for e in browser.find_elements(By.TAG_NAME, "h2")]
    assert names == headings[2:4] == ["Samples while it learned", "How it draws"]


@pytest.mark.parametrize(
    ("slider", "captions"),
    [
        ("grids", [f"step {step}" for step in GRID_STEPS]),
        ("trajectory", [f"step {i} of 25: noisy, and below the prediction" for i in range(1, 26)]),
    ],
)
def test_slider_shows_the_one_image_that_it_stands_at(slider, captions, run, browser, visit):
    visit(run)
    handle, caption, images = find_figure(browser, slider)
    assert len(images) == len(captions)
    last = len(images) - 1
    moves = [(Keys.HOME, 0), (Keys.ARROW_RIGHT, 1), (Keys.ARROW_UP, 2), (Keys.END, last), (Keys.ARROW_LEFT, last - 1)]
    for key, position in [(None, last), *moves]:
        if key is not None:
            handle.send_keys(key)
        wait(browser, lambda position=position: caption.text == captions[position])
        assert [i for i, image in enumerate(images) if image.is_displayed()] == [position]
        assert images[position].get_attribute("alt") == captions[position]


def test_grids_are_those_of_their_steps(run, browser, visit):
    visit(run)
    _, _, images = find_figure(browser, "grids")
    assert [image.get_attribute("alt") for image in images] == [f"step {step}" for step in GRID_STEPS]
    for step, image in zip(GRID_STEPS, images, strict=True):
        assert np.array_equal(decode(image), to_array((run / "samples" / f"step-{step:06d}.png").read_bytes())), step


def test_grids_come_by_number_without_what_others_put_beside_them(run, run_script, tmp_path):
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    for name in ("step-000003 copy.png", "step-1000000.png"):
        shutil.copy(run / "samples" / "step-000003.png", copied / "samples" / name)
    run_script(SCRIPT, str(copied))
    steps = re.findall(r'alt="step ([\d,]+)"', (copied / "report.html").read_text())
    assert steps == [*map(str, GRID_STEPS), "1,000,000"]


def test_trajectory_goes_from_noise_to_samples(run, browser, visit):
    """The upper row begins with the noise of the seeds 0 to 7, and the lower one ends with what they give."""
    pipeline = load_pipeline(str(run))
    noise = sample_noise(pipeline.sample_shape, [torch.Generator().manual_seed(seed) for seed in range(8)])
    conditions = [Condition.of_classes(str(id), one_hot(id, 5)) for id in (0, 1, 2, 3, 4, 0, 1, 2)]
    sampler = make_sampler("--scheduler", pipeline, "ddim", 25)
    samples = sample_images(pipeline, sampler, Request(list(range(8)), conditions), show_progress=False)
    visit(run)
    _, _, images = find_figure(browser, "trajectory")
    frames = [decode(image).astype(int) for image in images]
    assert all(frame.shape == (140, 548, 3) for frame in frames)
    assert np.array_equal(frames[0][:72], make_picture(to_unit_range(noise), columns=8))
    assert np.abs(frames[-1][68:] - np.asarray(make_picture(samples, columns=8))).max() <= 1
    assert len({frame.tobytes() for frame in frames}) == 25


@pytest.mark.parametrize("slider", ["grids", "trajectory"])
def test_sprites_are_crisp_where_there_is_room(slider, run, browser, visit):
    """Each pixel of a picture is a pixel of the screen."""
    visit(run)
    _, _, images = find_figure(browser, slider)
    screen = to_array(images[-1].screenshot_as_png)
    assert np.array_equal(screen, decode(images[-1]))


def test_tab_goes_from_slider_to_slider(run, browser, visit):
    visit(run)
    for slider in ("grids", "trajectory"):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        assert browser.switch_to.active_element.get_attribute("id") == slider


def test_page_fits_on_a_phone(html_run, browser, visit):
    visit(html_run, PHONE)
    widths = browser.execute_script("return ['scrollWidth', 'clientWidth'].map(n => document.documentElement[n])")
    assert widths == [PHONE, PHONE]
    for slider in ("grids", "trajectory"):
        handle, _, images = find_figure(browser, slider)
        assert images[-1].rect["width"] <= PHONE
        assert handle.rect["width"] > PHONE / 2


def test_what_is_wider_than_a_phone_is_moved_by_keyboard(run, browser, visit):
    """Such as the picture of the losses, which would be too small to read; it is the first that Tab goes to."""
    visit(run, PHONE)
    figure = browser.find_element(By.CSS_SELECTOR, "figure:has(img.curve)")
    position = "return arguments[0].scrollLeft"
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.switch_to.active_element == figure
    assert browser.execute_script(position, figure) == 0
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    wait(browser, lambda: browser.execute_script(position, figure) > 0)


def test_page_is_light_or_dark_as_the_reader_has_it(run, browser, visit):
    screens = []
    for scheme in ("light", "dark"):
        visit(run, scheme=scheme)
        screens.append(to_array(browser.get_screenshot_as_png()))
    for screen, corner in zip(screens, (range(230, 256), range(40)), strict=True):
        assert all(level in corner for level in screen[0, 0])
        assert (np.abs(screen.astype(int) - screen[0, 0]).max(axis=-1) > 100).sum() > 5000  # the text, at least
    curve = browser.find_element(By.CSS_SELECTOR, "img.curve")  # its letters are black
    assert to_array(curve.screenshot_as_png)[2, 2].min() > 250


def test_names_with_html_in_them_are_text(html_run, browser, visit):
    visit(html_run)
    assert browser.title == HTML_NAME
    assert browser.find_element(By.TAG_NAME, "h1").text == HTML_NAME
    assert browser.find_elements(By.TAG_NAME, "b") == []
    assert browser.find_element(By.XPATH, "//tr[th='data']/td").text == MARKUP


def test_page_has_the_summary_and_the_metrics(run, browser, visit):
    visit(run)
    rows = {row.find_element(By.TAG_NAME, "th").text: row for row in browser.find_elements(By.TAG_NAME, "tr")}
    cells = {name: [cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for name, row in rows.items()}
    summary = {"data": "sprites (built in)", "images": "38", "optimizer steps": "16", "images seen": "76"}
    flags = {"noise_scheduler_class": "ClosedFormDDPMScheduler", "ddpm_num_steps": "1,000"}
    for name, value in {**summary, **flags}.items():
        assert cells[name] == [value], name
    figure = json.loads((run / "metrics.json").read_text())["figures"]["frechet_distance"]
    low, high = figure["interval"]
    assert cells["Fréchet distance"] == [f"{figure['value']:.4g}", f"{low:.4g} to {high:.4g}", f"{figure['real']:.4g}"]
    pairs = browser.find_element(By.CSS_SELECTOR, "img.pairs")
    assert np.array_equal(decode(pairs), to_array((run / "closest_pairs.png").read_bytes()))
