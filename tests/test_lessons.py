"""Tests that the lessons' commands run and leave the pictures that the pages show, and that both languages agree."""

import re
import shlex
from pathlib import Path

import pytest
from launching import LAUNCH, PYTHON, REPOSITORY, run_command
from PIL import Image

from sprite_diffusion.data.sprites import draw_sprites

LESSONS = REPOSITORY / "docs" / "lessons"
MOST_OF_A_LABEL = 40  # pixels
PAGES = ["README", "t0", "t1", "t2", "t3", "t4", "words", "sixty"]


def commands(page: str) -> list[str]:
    """Returns the commands of a lesson, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", (LESSONS / f"{page}.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def pictures(page: str) -> list[str]:
    """Returns the names of the pictures that a page shows."""
    return re.findall(r"\]\(\.\./images/lessons/(\S+?)\)", (LESSONS / f"{page}.md").read_text())


@pytest.mark.parametrize("page", PAGES)
def test_the_two_languages_have_the_same_commands_pictures_and_parts(page):
    english, chinese = ((LESSONS / f"{page}{ending}.md").read_text() for ending in ("", ".zh"))
    assert commands(page) == commands(f"{page}.zh")
    assert pictures(page) == pictures(f"{page}.zh")
    for part in (r"^##? ", r"^\* ", r"^\d\. ", r"^\|", r"^!\["):
        assert len(re.findall(part, english, re.MULTILINE)) == len(re.findall(part, chinese, re.MULTILINE)), part
    # Figures that are typed as code, such as flags and files, are the same; sentences may order them otherwise.
    codes = [sorted(re.findall(r"`([^`\n]+)`", text)) for text in (english, chinese)]
    assert codes[0] == codes[1]
    links = [
        sorted(re.sub(r"\.zh\.md|\.md", "", link) for link in re.findall(r"\]\((\S+?)\)", text))
        for text in (english, chinese)
    ]
    assert links[0] == links[1]


def test_every_setting_of_the_tutorials_has_a_command_that_names_what_is_there():
    rows = re.findall(r"^\| (T\d) \| (.+) \| (.+) \|$", (LESSONS / "README.md").read_text(), re.MULTILINE)
    assert {tutorial for tutorial, _, _ in rows} == {"T0", "T1", "T2", "T3", "T4"}
    for _, setting, command in rows:
        assert setting.strip()
        assert command.strip()
        for preset in re.findall(r"configs/\w+\.yaml", command):
            assert (REPOSITORY / preset).is_file()


def run_as_typed(command: str, folder: Path) -> None:
    """Runs a line of a page in a folder; the scripts are those of the repository."""
    words = shlex.split(command)
    environment = {}
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    if words[:2] == ["accelerate", "launch"]:
        words = [*LAUNCH, *words[2:]]
    elif words[0] == "python":
        words = [*PYTHON, *words[1:]]
    words = [str(REPOSITORY / word) if word.endswith(".py") and "/" not in word else word for word in words]
    run_command(words, environment=environment, cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize("pages", [["t0", "t1"], ["t2"], ["t3"], ["t4"], ["words"], ["sixty"]], ids="+".join)
def test_the_commands_of_a_lesson_leave_its_pictures(pages, tmp_path):
    (tmp_path / "my_pictures").mkdir()  # sixty files of one kind
    for index, pixels in enumerate(draw_sprites(60, transparent=True)[0]):
        picture = Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST)
        picture.save(tmp_path / "my_pictures" / f"{index}.png")
    for page in pages:
        for command in commands(page):
            run_as_typed(command, tmp_path)
        for name in pictures(page):
            shown, made = Image.open(REPOSITORY / "docs" / "images" / "lessons" / name), Image.open(tmp_path / name)
            assert shown.height == made.height
            assert abs(shown.width - made.width) < MOST_OF_A_LABEL  # the seconds in a label are those of the machine
            assert made.convert("L").getextrema()[0] < 128
