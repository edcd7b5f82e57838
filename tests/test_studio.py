"""Tests the studio: what it draws, and its page, opened in Chromium (Debian's chromium and chromium-driver)."""

import html
import json
import re
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import gradio as gr
import numpy as np
import pytest
import torch
from browsing import DESKTOP, PHONE, set_screen, start_browser, wait
from launching import run_script
from PIL import Image
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from tiny_network import make_tiny_network, make_tiny_text_to_image

from pipelines import ConditionalDDPMPipeline, UnconditionalDDPMPipeline
from schedulers import ClosedFormDDPMScheduler, LinearCorruptionScheduler
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.studio import drawing
from sprite_diffusion.studio.drawing import (
    MIX,
    NO_CLASS,
    Drawing,
    Model,
    Settings,
    draw,
    open_model,
    write_files,
)
from sprite_diffusion.studio.page import bound_canvas, build_page, serve
from sprite_diffusion.studio.snippet import write_snippet

FEW = Settings(num_images=3, seed=5, num_inference_steps=4, guidance_scale=2.0)
RANDOM = np.random.default_rng(0)
PICTURE = torch.from_numpy(RANDOM.integers(256, size=(1, 4, 8, 8))).float() / 255
MASK = torch.zeros(1, 1, 8, 8)
MASK[..., :4] = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns a folder of three models: by class, with transparency and a palette, of anything, and by prompt."""
    folder = tmp_path_factory.mktemp("models")
    network = make_tiny_network(in_channels=4, out_channels=4, num_class_embeds=4)
    names = {0: "hero", 1: "food", 2: "it's"}
    ConditionalDDPMPipeline(network, ClosedFormDDPMScheduler(), id2label=names).save_pretrained(str(folder / "class"))
    (folder / "class" / "palette.hex").write_text("000000\nffffff\nd02c30\n102030\n")
    UnconditionalDDPMPipeline(make_tiny_network(), ClosedFormDDPMScheduler()).save_pretrained(str(folder / "anything"))
    make_tiny_text_to_image().save_pretrained(str(folder / "prompt"))
    return folder


@pytest.fixture(scope="module")
def models(folder) -> dict[str, Model]:
    return {path.name: open_model(str(path), torch.float32) for path in folder.iterdir()}


def finish(*args) -> Drawing:
    """Returns what is drawn in the end."""
    *_, last = draw(*args)
    assert isinstance(last, Drawing)
    return last


def to_array(images: torch.Tensor) -> np.ndarray:
    """Returns images (N, C, H, W) in [0, 1] as (N, H, W, C) uint8."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def read(*paths: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in paths])


# What is drawn


@pytest.mark.parametrize(
    ("model", "settings", "flags"),
    [
        ("class", replace(FEW, class_id="1"), "--class food --guidance_scale 2"),
        ("class", replace(FEW, class_id=NO_CLASS, guidance_scale=1.0), "--no_class"),
        (
            "class",
            replace(FEW, class_id=MIX, weights=(1.0, 0.6, 0.0), uses_palette=True, binary_alpha=True),
            "--mix hero=1,food=0.6 --guidance_scale 2 --palette auto --binary_alpha",
        ),
        (
            "class",
            replace(FEW, class_id="0", sampler="ddpm", uses_palette=True, colours_per_image=2),
            "--class hero --guidance_scale 2 --scheduler ddpm --palette auto --colours_per_image 2",
        ),
        ("anything", replace(FEW, sampler="dpmsolver++"), "--scheduler dpmsolver++"),
        ("prompt", replace(FEW, prompt="dogs"), "--prompt dogs --guidance_scale 2"),
        (
            "prompt",
            replace(FEW, prompt="dogs", negative_prompt="cat"),
            "--prompt dogs --negative_prompt cat --guidance_scale 2",
        ),
    ],
)
def test_files_are_those_of_the_command_line(model, settings, flags, folder, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sampler = "" if "--scheduler" in flags else "--scheduler unipc"
    command = f"{folder / model} --num_images 3 --seed 5 --num_inference_steps 4 {sampler} {flags} --scale 1"
    run_script("sample", f"{command} --output out")
    run_script("sample", f"{command} --sheet sheet.png --columns 2")
    drawn = finish(models[model], settings)
    files = {path.name: path for path in write_files(models[model], drawn, tmp_path / "files")}
    sprites = [files[f"sprite-0{i}.png"] for i in range(3)]
    np.testing.assert_array_equal(read(*sprites), read(*sorted(Path("out").glob("*.png"))))
    np.testing.assert_array_equal(read(*sprites), to_array(drawn.images))
    np.testing.assert_array_equal(read(files["sheet.png"]), read(Path("sheet.png")))
    frames = json.loads(files["sheet.json"].read_text())["frames"]
    assert [frame["seed"] for frame in frames] == [5, 6, 7]
    assert Image.open(files["animation.webp"]).n_frames == 5  # the noise, and each step


SNIPPETS = [
    ("anything", FEW, None, None),
    ("class", FEW, None, None),
    ("class", replace(FEW, class_id="2"), None, None),
    ("class", replace(FEW, class_id=NO_CLASS), PICTURE, None),
    ("class", replace(FEW, class_id=MIX, weights=(0.0, 0.6, 1.0), uses_palette=True), None, None),
    ("class", replace(FEW, class_id="0", sampler="ddpm", binary_alpha=True), PICTURE, None),
    ("class", replace(FEW, class_id="0", uses_palette=True, colours_per_image=2, binary_alpha=True), PICTURE, MASK),
    ("class", replace(FEW, class_id="0", strength=1.0), PICTURE, MASK),
    ("class", replace(FEW, class_id="0", strength=0.0, uses_palette=True, binary_alpha=True), PICTURE, MASK),
    ("class", replace(FEW, class_id="0", strength=0.0, uses_palette=True, binary_alpha=True), PICTURE, None),
    ("prompt", replace(FEW, prompt='a "red" dog\'s', negative_prompt="cat"), PICTURE, None),
    ("prompt", replace(FEW, prompt="", sampler="ddim"), None, None),
]


@pytest.mark.parametrize(("model", "settings", "picture", "mask"), SNIPPETS)
def test_the_program_on_the_page_draws_the_same(model, settings, picture, mask, models, tmp_path, monkeypatch):
    drawn = finish(models[model], settings, picture, mask)
    write_files(models[model], drawn, tmp_path)
    monkeypatch.chdir(tmp_path)  # where image.png and mask.png are
    values: dict = {}
    exec(write_snippet(models[model], settings, drawn), values)
    images = np.stack([np.asarray(image) for image in values["images"]])
    np.testing.assert_array_equal(images, to_array(drawn.images))


def test_what_is_kept_of_a_picture_is_kept(models):
    settings = replace(FEW, class_id="0", strength=1.0, uses_palette=True, binary_alpha=True)
    drawn = finish(models["class"], settings, PICTURE, MASK)
    kept = (MASK == 0).expand(3, 4, -1, -1)
    np.testing.assert_array_equal(drawn.images[kept], PICTURE.expand(3, -1, -1, -1)[kept])
    assert len(drawn.images.unique(dim=0)) == 3
    unchanged = finish(models["class"], replace(FEW, strength=0.0), PICTURE)
    np.testing.assert_array_equal(unchanged.images, PICTURE.expand(3, -1, -1, -1))
    assert unchanged.frames == []


def test_every_class_has_its_turn(models):
    drawn = finish(models["class"], replace(FEW, num_images=5))
    assert [condition.name for condition in drawn.request.conditions] == ["hero", "food", "it's", "hero", "food"]


def test_a_drawing_that_nobody_waits_for_ends_at_its_next_step(models, monkeypatch):
    """And the model is ready for the next one."""
    monkeypatch.setattr(drawing, "PREVIEW_SECONDS", 0)
    pipeline = models["anything"].pipeline
    scheduler, calls, network = pipeline.scheduler, [], pipeline.unet.forward
    monkeypatch.setattr(pipeline.unet, "forward", lambda *args, **kwargs: calls.append(0) or network(*args, **kwargs))
    previews = draw(models["anything"], replace(FEW, sampler="ddpm", num_inference_steps=250))
    assert next(previews).shape == (3, 3, 8, 8)
    previews.close()
    with models["anything"].lock:  # which the drawing holds until its last step
        assert 1 <= len(calls) < 250
        assert pipeline.scheduler is scheduler
    stopped_at = len(calls)
    time.sleep(0.2)
    assert len(calls) == stopped_at


def test_a_drawing_that_is_stopped_changes_nothing_of_the_next(models, monkeypatch):
    """Which waits for its last step, as a pipeline has one scheduler and one condition at a time."""
    model, expected = models["class"], finish(models["class"], replace(FEW, class_id="0")).images
    monkeypatch.setattr(drawing, "PREVIEW_SECONDS", 0)
    network = model.pipeline.unet.forward
    monkeypatch.setattr(
        model.pipeline.unet, "forward", lambda *args, **kwargs: time.sleep(0.1) or network(*args, **kwargs)
    )
    stopped = draw(model, replace(FEW, class_id="1", sampler="ddpm", num_inference_steps=50, guidance_scale=1.0))
    next(stopped)
    stopped.close()
    np.testing.assert_array_equal(finish(model, replace(FEW, class_id="0")).images, expected)


def test_a_drawing_that_takes_too_long_is_ended(models, monkeypatch):
    monkeypatch.setattr(drawing, "MAX_SECONDS", 0)
    with pytest.raises(UserInputError, match="stopped after 0 seconds: draw fewer sprites, or take fewer steps"):
        finish(models["anything"], FEW)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("class", {"num_images": 33}, "num_images is 33: it must be at least 1 and at most 32"),
        ("class", {"num_inference_steps": 10**9}, "num_inference_steps"),
        ("class", {"seed": -1}, "seed"),
        ("class", {"guidance_scale": float("nan")}, "guidance_scale"),
        ("class", {"sampler": "heun"}, "unknown sampler 'heun'; this model has unipc"),
        ("class", {"class_id": "7"}, "unknown class 7"),
        ("class", {"class_id": "/etc/passwd"}, "unknown class '/etc/passwd'"),
        ("class", {"class_id": MIX, "weights": (0.0, 0.0, 0.0)}, "a mix needs weights"),
        ("prompt", {"prompt": "a" * 1001}, "a prompt has at most 1,000 letters"),
    ],
)
def test_what_a_page_can_not_have_sent_is_refused(model, changes, message, models):
    with pytest.raises(UserInputError, match=message):
        finish(models[model], replace(FEW, **changes))


@pytest.mark.parametrize("num_train_timesteps", [1, 2, 10, 20])
def test_a_page_begins_with_steps_that_its_sampler_takes(num_train_timesteps, tmp_path):
    scheduler = ClosedFormDDPMScheduler(num_train_timesteps=num_train_timesteps)
    UnconditionalDDPMPipeline(make_tiny_network(), scheduler).save_pretrained(str(tmp_path))
    model = open_model(str(tmp_path), torch.float32)
    build_page(model).close()
    assert "ddpm" in model.samplers
    for sampler in model.samplers:
        settings = replace(FEW, sampler=sampler, num_inference_steps=model.num_inference_steps)
        assert finish(model, settings).images.shape == (3, 3, 8, 8)


def test_a_process_without_other_samplers_has_its_own(tmp_path):
    UnconditionalDDPMPipeline(make_tiny_network(), LinearCorruptionScheduler()).save_pretrained(str(tmp_path))
    model = open_model(str(tmp_path), torch.float32)
    assert model.samplers == ["LinearCorruptionScheduler"]
    assert finish(model, replace(FEW, sampler=model.samplers[0])).images.shape == (3, 3, 8, 8)


# The page


@pytest.fixture(scope="module")
def browser():
    with start_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(models):
    """Returns the address of each model's page."""
    pages = {name: build_page(model) for name, model in models.items()}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("no_proxy", "*")  # gradio asks its own page for an answer
        yield {name: serve(page, "127.0.0.1", None) for name, page in pages.items()}
    for page in pages.values():
        page.close()


class Studio:
    """A page in the browser, and what a person does there."""

    def __init__(self, browser, url: str, width: int = DESKTOP) -> None:
        self.browser = browser
        set_screen(browser, width)
        browser.get(url)
        wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#status[role=status]"))

    @property
    def status(self) -> str:
        return self.browser.find_element(By.ID, "status").text

    def find(self, selector: str):
        wait(self.browser, lambda: self.browser.find_elements(By.CSS_SELECTOR, selector))
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def click(self, selector: str) -> None:
        element = self.find(selector)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def write(self, selector: str, text: object, end: str = Keys.TAB) -> None:
        """Writes into a field in place of what it holds."""
        self.find(selector).send_keys(Keys.CONTROL, "a", Keys.NULL, str(text), end)

    def press(self, selector: str, key: str) -> None:
        """Moves to an element and presses a key there."""
        self.find(selector).send_keys(key)

    @property
    def sprites(self) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, "#sprites img")

    def load(self, path: Path) -> None:
        """Loads a picture."""
        self.browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(path))

    def open(self, label: str) -> None:
        """Opens a folded part of the page."""
        self.browser.find_element(By.XPATH, f"//button[contains(., '{label}')]").click()

    def until(self, text: str) -> None:
        """Waits for what the page says."""
        wait(self.browser, lambda: text in self.status)

    def draw(self) -> np.ndarray:
        """Clicks on Draw, waits for its end and returns the pixels of the files, (N, H, W, C) uint8."""
        self.browser.execute_script("document.querySelector('#status p').textContent = ''")
        self.click("#draw")
        wait(self.browser, lambda: self.status not in ("", "Waiting ...", "Drawing ..."))
        assert " drawn by " in self.status
        wait(self.browser, lambda: self.files)
        names = sorted(name for name in self.files if name.startswith("sprite-"))
        return np.stack([self.download(name) for name in names])

    @property
    def files(self) -> dict[str, str]:
        """The addresses of the files on the page."""
        links = self.browser.find_elements(By.CSS_SELECTOR, "#files a[download]")
        return {link.get_attribute("download"): link.get_attribute("href") for link in links}

    def download(self, name: str) -> np.ndarray:
        return np.asarray(Image.open(urlopen(self.files[name])))


@pytest.fixture
def visit(browser, pages, models) -> Callable[..., Studio]:
    """Returns a function that opens the page of a model, with few sprites and steps chosen."""

    def visit(model: str, width: int = DESKTOP) -> Studio:
        studio = Studio(browser, pages[model], width)
        studio.write("#count input[type=number]", 3)
        studio.write("#seed input", 5)
        studio.open("How")
        studio.write("#steps input[type=number]", 4)
        return studio

    return visit


def choose(studio: Studio, selector: str, name: str) -> None:
    """Chooses an entry of a list."""
    studio.write(f"{selector} input", name, Keys.ENTER)


def test_sprites_of_a_class_are_those_of_the_command_line(visit, folder, tmp_path):
    studio = visit("class")
    choose(studio, "#class", "food")
    drawn = studio.draw()
    flags = "--class food --guidance_scale 2 --palette auto --colours_per_image 8 --binary_alpha --scheduler unipc"
    run_script(
        "sample",
        f"{folder}/class {flags} --num_images 3 --seed 5 --num_inference_steps 4 --scale 1 --output {tmp_path}/out",
    )
    np.testing.assert_array_equal(drawn, read(*sorted((tmp_path / "out").glob("*.png"))))
    pictures = [image.get_attribute("src") for image in studio.sprites]
    np.testing.assert_array_equal(drawn, np.stack([np.asarray(Image.open(urlopen(url))) for url in pictures]))
    assert "class_labels=['food']" in studio.find("#code").text


@pytest.mark.parametrize(("model", "flags"), [("anything", ""), ("prompt", "--prompt cat --guidance_scale 2")])
def test_other_models_draw_too(model, flags, visit, folder, tmp_path):
    studio = visit(model)
    if model == "prompt":
        assert studio.find("#prompt textarea").get_property("value") == "two dogs"  # the first of its examples
        studio.write("#prompt textarea", "cat")
    drawn = studio.draw()
    binary = "--binary_alpha" if model == "prompt" else ""
    command = f"{folder}/{model} {flags} --scheduler unipc {binary} --num_images 3 --seed 5 --num_inference_steps 4"
    run_script("sample", f"{command} --scale 1 --output {tmp_path}/out")
    np.testing.assert_array_equal(drawn, read(*sorted((tmp_path / "out").glob("*.png"))))


def test_the_page_names_words_that_the_model_has_never_seen(visit):
    """Every time, to everybody; not only when they are first asked for."""
    studio = visit("prompt")
    for prompt in ("a zebra", "two dogs", "a zebra"):
        studio.write("#prompt textarea", prompt)
        studio.draw()
        assert ("never seen the word 'zebra'" in studio.status) == (prompt == "a zebra")


def test_a_slider_mixes_classes(visit, folder, tmp_path):
    studio = visit("class")
    studio.open("A mix of classes")
    for id, weight in (0, 1), (1, 0.6):
        studio.write(f"#weight-{id} input[type=number]", weight)
    wait(studio.browser, lambda: studio.find("#class input").get_property("value") == MIX)
    studio.draw()
    assert "context={'hero': 1.0, 'food': 0.6}" in studio.find("#code").text
    texts = [image.get_attribute("alt") for image in studio.sprites]
    assert texts == [f"hero=1,food=0.6 {seed}" for seed in (5, 6, 7)]


def test_a_sprite_is_varied_and_a_half_drawn_anew(visit):
    """By keyboard."""
    studio = visit("class")
    first = studio.draw()
    studio.press("#sprites button[aria-label='Thumbnail 2 of 3']", Keys.ENTER)
    studio.until("Sprite 2 is to be changed.")
    variants = studio.draw()
    np.testing.assert_array_equal(studio.download("image.png"), first[1])
    assert "mask.png" not in studio.files
    assert len({image.tobytes() for image in variants}) == 3
    studio.press("#part input[value='left half']", Keys.SPACE)
    wait(studio.browser, lambda: studio.find("#strength input[type=number]").get_property("value") == "1")
    halves = studio.draw()
    assert (halves[:, :, 4:] == first[1, :, 4:]).all()
    assert (halves[[0, 2], :, :4] != first[1, :, :4]).any(axis=(1, 2, 3)).all()  # the second has its first noise
    studio.click("#leave")
    studio.until("Sprites are drawn from noise.")
    np.testing.assert_array_equal(studio.draw(), first)


def test_a_picture_is_loaded_and_painted_on(visit, folder, tmp_path):
    """What was painted is drawn anew, by the same numbers as on the command line, and nothing else is."""
    studio = visit("class")
    image = to_array(PICTURE)[0]
    Image.fromarray(image).save(tmp_path / "mine.png")
    studio.load(tmp_path / "mine.png")
    studio.until("The picture is to be changed.")
    choose(studio, "#class", "hero")
    studio.press("#part input[value='what is painted']", Keys.SPACE)
    studio.click("#draw")
    studio.until("nothing is painted: paint what is to be drawn anew")
    canvas = studio.find("#canvas canvas")
    studio.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    brush = ActionChains(studio.browser).move_to_element_with_offset(canvas, -60, -60).click_and_hold()
    brush.move_by_offset(80, 0).move_by_offset(0, 40).release().perform()
    drawn = studio.draw()
    mask = studio.download("mask.png")
    assert {*np.unique(mask)} == {0, 255}
    np.testing.assert_array_equal(studio.download("image.png"), image)
    assert (drawn[:, mask == 0] == image[mask == 0]).all()
    assert (drawn[:, mask == 255] != image[mask == 255]).any()
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = "--class hero --guidance_scale 2 --palette auto --colours_per_image 8 --binary_alpha --scheduler unipc"
    files = f"--image {tmp_path}/mine.png --mask {tmp_path}/mask.png"
    command = f"{folder}/class {flags} {files} --num_images 3 --seed 5 --num_inference_steps 4"
    run_script("sample", f"{command} --scale 1 --output {tmp_path}/out")
    np.testing.assert_array_equal(drawn, read(*sorted((tmp_path / "out").glob("*.png"))))


def test_a_file_that_is_no_picture_is_answered_with_a_line(visit, tmp_path):
    studio = visit("anything")
    (tmp_path / "no.png").write_bytes(b"<script>")
    studio.load(tmp_path / "no.png")
    studio.until("no.png can't be read: load one of PNG, JPEG, GIF, WEBP, BMP")
    Image.new("1", (4000, 2000)).save(tmp_path / "large.png")
    studio.load(tmp_path / "large.png")
    studio.until("large.png has more than 4,194,304 pixels: load a smaller picture")


def test_an_empty_number_is_answered_with_a_line(visit):
    studio = visit("anything")
    studio.write("#seed input", Keys.BACKSPACE)
    studio.click("#draw")
    studio.until("--seed is None: it must be a whole number")


@pytest.fixture
def slow_calls(models, monkeypatch) -> list[int]:
    """Has the network of one model take its time, and returns a list that grows by each of its calls."""
    network, calls = models["anything"].pipeline.unet.forward, []

    def forward(*args, **kwargs):
        time.sleep(0.05)
        calls.append(0)
        return network(*args, **kwargs)

    monkeypatch.setattr(models["anything"].pipeline.unet, "forward", forward)
    return calls


def test_sprites_are_seen_while_they_form_and_a_click_stops_them(visit, slow_calls):
    studio = visit("anything")
    studio.write("#steps input[type=number]", 250)
    studio.click("#draw")
    wait(studio.browser, lambda: len(studio.sprites) == 3)
    early = [image.get_attribute("src") for image in studio.sprites]
    wait(studio.browser, lambda: [image.get_attribute("src") for image in studio.sprites] != early)
    studio.click("#stop")
    studio.until("Stopped.")
    wait(studio.browser, lambda: is_constant(slow_calls))
    assert len(slow_calls) < 250
    studio.write("#steps input[type=number]", 4)
    assert len(studio.draw()) == 3


def test_who_leaves_the_page_does_not_keep_others_waiting(visit, slow_calls):
    studio = visit("anything")
    first = studio.browser.current_window_handle
    studio.browser.switch_to.new_window("tab")
    leaving = visit("anything")
    leaving.write("#steps input[type=number]", 250)
    leaving.click("#draw")
    wait(studio.browser, lambda: leaving.sprites)
    studio.browser.close()
    studio.browser.switch_to.window(first)
    before = len(slow_calls)
    assert len(studio.draw()) == 3
    assert len(slow_calls) < before + 100


def is_constant(calls: list[int]) -> bool:
    """Returns whether no call is added for a while."""
    count = len(calls)
    time.sleep(0.3)
    return len(calls) == count


def test_nothing_is_asked_of_other_machines(browser, visit):
    browser.get_log("performance")
    visit("class").draw()
    messages = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert requests
    assert {url.split("/")[2] for url in requests if not url.startswith(("data:", "blob:"))} == {
        browser.current_url.split("/")[2]
    }


def test_pixels_stay_squares_and_a_phone_is_wide_enough(visit):
    studio = visit("class", PHONE)
    studio.draw()
    for image in studio.sprites:
        assert image.value_of_css_property("image-rendering") == "pixelated"
        assert image.rect["width"] >= 96
    assert studio.browser.execute_script("return document.documentElement.scrollWidth") <= PHONE


@pytest.mark.parametrize("path", ["/etc/passwd", "setup.cfg", "http://127.0.0.1:1/x.png"])
def test_a_page_can_not_name_files(path, pages):
    config = json.load(urlopen(f"{pages['class']}config"))
    [upload] = [c["id"] for c in config["components"] if c["props"].get("elem_id") == "load"]
    [event] = [d["id"] for d in config["dependencies"] if [upload, "upload"] in d["targets"]]
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [file], "fn_index": event, "session_hash": "x"}).encode()
    request = Request(f"{pages['class']}gradio_api/run/predict", body, {"Content-Type": "application/json"})
    with pytest.raises(HTTPError):
        urlopen(request)


# The program


@pytest.fixture
def run_studio(monkeypatch) -> Callable[[str], dict]:
    """Returns a function that runs studio.py with flags until its page is up, and returns what the page is made of."""

    def run(flags: str) -> dict:
        configs = []

        def look(page: gr.Blocks) -> None:
            configs.append(json.load(urlopen(f"{page.local_url}config")))
            page.close()

        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(gr.Blocks, "block_thread", look)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        run_script("studio", f"{flags} --port {port}")
        return configs[0]

    return run


def test_the_program_opens_a_page_for_this_machine_alone(folder, run_studio, capsys):
    assert run_studio(f"{folder}/class")["title"] == "class: studio"
    assert re.match(r"open http://127.0.0.1:\d+/ in a browser; Ctrl-C ends it\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "unet" / "config.json").write_text("{"), "is not a model that can be loaded: "),
        (
            lambda path: (path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}'),
            "not a pipel",
        ),
        (shutil.rmtree, "is not a model that can be loaded: "),
    ],
)
def test_a_model_that_can_not_be_opened_is_one_line(
    damage, message, folder, tmp_path, run_studio, capsys, monkeypatch
):
    """On the terminal and, where visitors see the page alone, on the page."""
    path = shutil.copytree(folder / "class", tmp_path / "model")
    damage(path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as exit:
        run_studio(str(path))
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}")
    assert message in error
    assert error.count("\n") == 1
    monkeypatch.setenv("SPACE_ID", "me/studio")
    [shown] = [
        c["props"]["value"] for c in run_studio(str(path))["components"] if c["props"].get("elem_id") == "status"
    ]
    assert html.escape(error.removeprefix("error: ").strip()) in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--port 0", "--port is 0"),
        ("--host nowhere.invalid", "--host nowhere.invalid --port"),
        ("--num_threads 0", "--num_thr"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, folder, capsys):
    with pytest.raises(SystemExit) as exit:
        run_script("studio", f"{folder}/anything --port 1 {flags}")
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_canvas_takes_no_more_than_fits_on_it(tmp_path):
    canvas = gr.ImageEditor(canvas_size=(8, 8), type="pil")
    bound_canvas(canvas)

    def send(side: int, num_layers: int) -> dict:
        Image.new("RGBA", (side, side)).save(tmp_path / "a.png")
        part = {"path": str(tmp_path / "a.png"), "meta": {"_type": "gradio.FileData"}}
        layers = [part] * num_layers
        return canvas.preprocess(canvas.data_model(background=part, layers=layers, composite=part))

    assert [layer.size for layer in send(16, 4)["layers"]] == [(16, 16)] * 4
    for side, num_layers in ((17, 1), (16, 5)):
        with pytest.raises(gr.Error, match="more than fits"):
            send(side, num_layers)


def test_no_parts_of_a_canvas_are_kept_for_a_click(pages):
    """A visitor could send any number of them, and the number of one could be any."""
    config = json.load(urlopen(f"{pages['class']}config"))
    [canvas] = [c["id"] for c in config["components"] if c["props"].get("elem_id") == "canvas"]
    body = {"data": {"type": "layer", "index": 5, "id": "a"}, "component_id": canvas, "fn_name": "accept_blobs"}
    body |= {"session_hash": "x"}
    request = Request(
        f"{pages['class']}gradio_api/component_server", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(HTTPError, match="404"):
        urlopen(request)


def test_another_name_of_this_machine_is_not_served(pages):
    with pytest.raises(HTTPError, match="400"):
        urlopen(Request(f"{pages['class']}config", headers={"Host": "evil.example"}))
