"""Tests uploads to the Hub, the card, and loading from the Hub, by the real clients against a server on this machine.

Each client runs in a process of its own, as it reads the server's address when it is imported. All read the same one,
so that these processes can be forked from one that has done the imports.
"""

import ast
import json
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import pytest
import yaml
from forking import LIBRARIES, ForkServer
from hub_server import DROP, TOKEN, HubServer, Repository, listen, url_of
from huggingface_hub import ModelCard
from launching import (
    PYTHON,
    REPOSITORY,
    TINY,
    forking_from,
    kill,
    make_environment,
    run_command,
    start_command,
)
from markdown_it import MarkdownIt
from PIL import Image
from tiny_network import make_tiny_network

from sprite_diffusion.common.errors import UserInputError, printable
from sprite_diffusion.sharing.card import BEGIN, END, make_card
from sprite_diffusion.sharing.markdown import escape

MEASUREMENT = {"value": 0.05, "interval": [0, 0.1], "real": 0, "num_images": 20}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PRIVATE_FLAGS = f"--push_to_hub --hub_model_id me/sprites --hub_private_repo --hub_token {TOKEN} --save_model_epochs 1"


@dataclass
class User:
    """A user of the Hub with a cache of their own; a shared cache would answer in place of the server."""

    server: HubServer
    home: Path
    link: ClassVar[Path]  # to the folder of the user whose program runs, where every client looks for it

    def log_in(self) -> None:
        """Writes the token where `hf auth login` writes it."""
        self.home.mkdir(exist_ok=True)
        (self.home / "token").write_text(TOKEN)

    def run(self, *command: str, cwd: Path = REPOSITORY, status: int = 0) -> subprocess.CompletedProcess:
        self.home.mkdir(exist_ok=True)
        self.link.unlink(missing_ok=True)
        self.link.symlink_to(self.home)
        return run_command([*PYTHON, *command], status, environment=self.environment(self.server.url), cwd=cwd)

    @classmethod
    def environment(cls, url: str) -> dict[str, str]:
        return {
            "HF_ENDPOINT": url,
            "HF_HOME": str(cls.link),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*",
            "no_proxy": "*",
        }


@pytest.fixture(scope="module")
def listening(tmp_path_factory):
    """The place of all servers of these tests, and processes to fork that have it from their environment."""
    with listen() as listening, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(User, "link", tmp_path_factory.mktemp("users") / "home", raising=False)
        environment = make_environment(PYTHON, User.environment(url_of(listening)))
        with forking_from([ForkServer(environment, LIBRARIES, options) for options in ([], ["-I"])]):
            yield listening


@pytest.fixture
def server(listening):
    with HubServer(listening).running() as server:
        yield server


@pytest.fixture
def author(server, tmp_path):
    return User(server, tmp_path / "author")


@pytest.fixture(scope="module")
def pushed_runs(listening, tmp_path_factory):
    """Two runs that were pushed while they trained: `me/sprites`, private, and `me/sprites-by-class`, public."""
    folder = tmp_path_factory.mktemp("pushed")
    with HubServer(listening).running() as server:
        author = User(server, folder / "author")
        private = ["train_unconditional.py", *TINY.split(), *PRIVATE_FLAGS.split()]
        public = ["train_conditional.py", *TINY.split(), *f"--push_to_hub --hub_token {TOKEN}".split()]
        results = [
            author.run(*private, "--output_dir", str(folder / "sprites")),
            author.run(*public, "--snapshot_epochs", "1", "--output_dir", str(folder / "sprites-by-class")),
        ]
    return server, folder, "".join(result.stdout + result.stderr for result in results)


@pytest.fixture
def pushed(pushed_runs):
    """The server that the runs were pushed to, which runs again, their folder and what they printed."""
    with pushed_runs[0].running():
        yield pushed_runs


def shared_files(server: HubServer, name: str) -> set[str]:
    return set(server.repos[name].files) - {".gitattributes"}  # the Hub itself puts that into a new repository


CODE = r"_[0-9a-f]{8}\.py"  # files of code are named after their content


def unversioned(files: set[str]) -> set[str]:
    return {re.sub(CODE, "_VERSION.py", name) for name in files}


OF_EVERY_RUN = {
    "README.md",
    "model_index.json",
    "palette.hex",
    "scheduler/scheduler_config.json",
    "scheduler/scheduling_closed_form_ddpm_VERSION.py",
    "unet/config.json",
    WEIGHTS,
    "samples/step-000004.png",
    "samples/step-000008.png",
    "training_config.yaml",
    "training_summary.json",
}


def test_private_repository_holds_the_pipeline_and_nothing_else(pushed):
    server, folder, _ = pushed
    assert server.repos["me/sprites"].private
    files = shared_files(server, "me/sprites")
    assert unversioned(files) == OF_EVERY_RUN | {"pipeline.py", "scheduler/pipeline_ddpm_VERSION.py"}
    for name in files - {"README.md"}:
        assert server.repos["me/sprites"].files[name] == (folder / "sprites" / name).read_bytes(), name


def test_public_repository_has_the_code_in_its_index(pushed):
    server, _, _ = pushed
    assert not server.repos["me/sprites-by-class"].private
    files = shared_files(server, "me/sprites-by-class")
    assert unversioned(files) == OF_EVERY_RUN | {"pipeline_ddpm_VERSION.py"}


def test_token_is_nowhere(pushed):
    server, folder, printed = pushed
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"training_config.yaml", "model_index.json"} <= {path.name for path in files}
    assert any(path.name.startswith("events.out.tfevents") for path in files)
    for path in files:
        assert TOKEN.encode() not in path.read_bytes(), path
    for name, repository in server.repos.items():
        for commit in repository.commits:
            assert TOKEN not in commit.title
            for path, content in commit.files.items():
                assert TOKEN.encode() not in content, (name, path)
    assert TOKEN not in printed


def test_push_in_training_sends_what_changed(pushed):
    """There is an upload after each epoch. The second has new weights and a new grid, and all else is as it was."""
    server, _, _ = pushed
    first, second = server.repos["me/sprites"].commits[1:]
    assert [first.title, second.title] == ["Step 4", "Step 8"]
    assert first.changed == shared_files(server, "me/sprites") - {"samples/step-000008.png"}
    assert second.changed == {WEIGHTS, "samples/step-000008.png", "README.md", "training_summary.json"}


CLIENT = """
import json, sys
from huggingface_hub import CommitOperationAdd, HfApi
api, anonymous, expired = (HfApi(token=token) for token in (sys.argv[1], False, "hf_expired"))
repo = {"repo_id": "me/sprites"}

def error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        response = getattr(error, "response", None)
        return type(error).__name__.removeprefix("Remote"), response and response.status_code

def commit(content, **kwargs):
    readme = CommitOperationAdd("README.md", content)
    return api.create_commit(**repo, operations=[readme], commit_message="card", **kwargs)

api.create_repo("sprites", private=True)
head = commit(b"---\\nlicense: mit\\n---\\n").oid
print(json.dumps([
    api.whoami()["name"],
    [entry.path for entry in api.list_repo_tree(**repo, recursive=True, revision=head)],
    [entry.size for entry in api.get_paths_info(**repo, paths=["README.md", "x"])],
    [api.model_info(**repo).sha == head, api.model_info(**repo).private],
    error(anonymous.model_info, "me/sprites"),
    error(api.model_info, "me/missing"),
    error(expired.hf_hub_download, "me/sprites", "README.md"),
    error(api.model_info, "me/sprites", revision="v9"),
    error(api.hf_hub_download, "me/sprites", "x"),
    error(commit, b"---\\nlicense: mit"),
    error(commit, b"", parent_commit="0" * 40),
    error(api.create_repo, "sprites"),
]))
"""


def test_server_is_a_hub_to_its_client(author):
    """The client raises the errors that it documents for each mistake."""
    output = author.run("-c", CLIENT, TOKEN).stdout
    assert json.loads(output) == [
        "me",
        [".gitattributes", "README.md"],
        [21],
        [True, True],
        ["RepositoryNotFoundError", 401],
        ["RepositoryNotFoundError", 404],
        ["HfHubHTTPError", 401],
        ["RevisionNotFoundError", 404],
        ["EntryNotFoundError", 404],
        ["ValueError", None],
        ["HfHubHTTPError", 412],
        ["HfHubHTTPError", 409],
    ]


def test_server_sends_parts_of_files(server):
    content = bytes(range(100))
    server.repos["me/data"] = Repository(private=False)
    server.repos["me/data"].commit("data", {"x.bin": content})
    request = Request(f"{server.url}/me/data/resolve/main/x.bin", headers={"Range": "bytes=10-19"})
    with build_opener(ProxyHandler({})).open(request) as answer:
        assert (answer.status, answer.headers["Content-Range"]) == (206, "bytes 10-19/100")
        assert answer.read() == content[10:20]


ISOLATED = """
import sys
for name in ("models", "pipelines", "schedulers", "sprite_diffusion"):  # an installed copy must not help
    sys.modules[name] = None
import json, numpy as np, torch
from diffusers import DiffusionPipeline

def sample(model, **kwargs):
    pipeline = DiffusionPipeline.from_pretrained(model, **json.loads(sys.argv[2]))
    generator = torch.Generator().manual_seed(4)
    images = pipeline(generator=generator, num_inference_steps=3, output_type="np", **json.loads(sys.argv[3])).images
    print(type(pipeline).__name__, type(pipeline.scheduler).__name__)
    return pipeline, images
"""
SAMPLE = (
    ISOLATED
    + """
repository, _, _, folder, out = sys.argv[1:]
pipeline, images = sample(repository)
np.save(out + "/hub.npy", images)
np.save(out + "/local.npy", sample(folder)[1])
pipeline.save_pretrained(out + "/saved")
np.save(out + "/saved.npy", sample(out + "/saved")[1])
"""
)
SAMPLE_SAVED = (
    ISOLATED
    + """
np.save(sys.argv[4] + "/fresh.npy", sample(sys.argv[1])[1])
"""
)
OWN_CODE = {"trust_remote_code": True}


@pytest.mark.parametrize(
    ("name", "loading", "calling", "classes"),
    [
        ("sprites", {}, {"batch_size": 2}, "DDPMPipeline DDPMScheduler"),
        (
            "sprites",
            {"custom_pipeline": "pipeline", **OWN_CODE},
            {"batch_size": 2},
            "UnconditionalDDPMPipeline ClosedFormDDPMScheduler",
        ),
        (
            "sprites-by-class",
            OWN_CODE,
            {"class_labels": ["food", "hero"], "guidance_scale": 2.0},
            "ConditionalDDPMPipeline ClosedFormDDPMScheduler",
        ),
    ],
)
def test_others_load_it_save_it_and_sample_the_same_images(pushed, tmp_path, name, loading, calling, classes):
    server, folder, _ = pushed
    stranger = User(server, tmp_path / "stranger")
    stranger.log_in()  # one of the two is private
    arguments = [json.dumps(loading), json.dumps(calling)]
    folders = [str(folder / name), str(tmp_path)]
    result = stranger.run("-I", "-c", SAMPLE, f"me/{name}", *arguments, *folders, cwd=tmp_path)
    assert result.stdout.splitlines() == [classes] * 3
    stranger.run("-I", "-c", SAMPLE_SAVED, str(tmp_path / "saved"), *arguments, str(tmp_path), cwd=tmp_path)
    hub, *others = (np.load(tmp_path / f"{source}.npy") for source in ("hub", "local", "saved", "fresh"))
    for other in others:
        np.testing.assert_array_equal(hub, other)
    assert hub.shape == (2, 16, 16, 3)
    assert np.abs(hub[0] - hub[1]).max() > 0.1  # two blanks would be equal


def test_stock_and_our_pipeline_of_one_repository_sample_the_same_images(pushed, tmp_path):
    server, _, _ = pushed
    stranger = User(server, tmp_path / "stranger")
    stranger.log_in()
    calling = json.dumps({"batch_size": 2})
    for source, loading in [("stock", {}), ("ours", {"custom_pipeline": "pipeline", **OWN_CODE})]:
        (tmp_path / source).mkdir()
        arguments = ["me/sprites", json.dumps(loading), calling, str(tmp_path / source)]
        stranger.run("-I", "-c", SAMPLE_SAVED, *arguments, cwd=tmp_path)
    stock, ours = (np.load(tmp_path / source / "fresh.npy") for source in ("stock", "ours"))
    # The float32 tables of the stock scheduler are off by up to 1e-4 of its coefficients; the network passes that on.
    np.testing.assert_allclose(stock, ours, rtol=0, atol=2e-3)


TWO_VERSIONS = """
import sys
for name in ("models", "pipelines", "schedulers", "sprite_diffusion"):
    sys.modules[name] = None
from diffusers import DiffusionPipeline
loading = dict(eval(sys.argv[1]), trust_remote_code=True)
first, second = (DiffusionPipeline.from_pretrained(folder, **loading) for folder in sys.argv[2:])
for pipeline in (first, second, first):
    try:
        pipeline(batch_size=0)
    except ValueError as error:
        print(error, len(pipeline.scheduler))
first.save_pretrained("again")
again = DiffusionPipeline.from_pretrained("again", **loading)
print(len(again.scheduler))
"""


SAVE_AGAIN = """
import sys
from sprite_diffusion.sampling import pipeline_loading
pipeline_loading.check_process = lambda pipeline: None  # that there are as many betas as timesteps
pipeline_loading.load_pipeline(sys.argv[1]).save_pretrained(sys.argv[2])
"""


@pytest.mark.parametrize("kind", ["unconditional", "conditional"])
def test_two_versions_of_the_code_in_one_process_keep_apart(pushed, tmp_path, kind):
    """The second version counts its timesteps twice and words an error in another way."""
    source, project = pushed[1] / ("sprites" if kind == "unconditional" else "sprites-by-class"), tmp_path / "project"
    for package in ("pipelines", "schedulers", "models", "sprite_diffusion"):
        shutil.copytree(REPOSITORY / package, project / package)
    for file, old, new in [
        ("pipelines/pipeline_ddpm.py", "it must be at least 1", "it must be more"),
        (
            "schedulers/scheduling_closed_form_ddpm.py",
            'return self.config["num_train_timesteps"]',
            'return 2 * self.config["num_train_timesteps"]',
        ),
    ]:
        text = (project / file).read_text()
        assert old in text
        (project / file).write_text(text.replace(old, new))
    loading = {"custom_pipeline": "pipeline"} if kind == "unconditional" else {}
    stranger = User(pushed[0], tmp_path / "stranger")
    stranger.run("-c", SAVE_AGAIN, str(source), "changed", cwd=project)
    folders = [str(source), str(project / "changed")]
    result = stranger.run("-I", "-c", TWO_VERSIONS, repr(loading), *folders, cwd=tmp_path)
    plain, changed = "it must be at least 1 1000", "it must be more 2000"
    lines = [line.removeprefix("`batch_size` is 0: ") for line in result.stdout.splitlines()]
    assert lines == [plain, changed, plain, "1000"]


def test_card_says_what_the_run_was(pushed):
    server, _, _ = pushed
    card = ModelCard(server.repos["me/sprites-by-class"].files["README.md"].decode())
    data = card.data.to_dict()
    assert {key: data[key] for key in ("license", "library_name", "pipeline_tag")} == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
    }
    assert "class-conditional" in data["tags"]
    assert data["widget"][0]["output"]["url"] in server.repos["me/sprites-by-class"].files
    [result] = card.data.eval_results
    assert isinstance(result.metric_value, float)
    text = card.text
    for fragment in [
        "![Samples](samples/step-000008.png)",
        'DiffusionPipeline.from_pretrained("me/sprites-by-class", trust_remote_code=True)',
        "Classes: hero, non-hero, food, spell, side-facing.",
        "20 images from sprites (built in); licence: apache-2.0.",
        "| steps | 8 |",
        "| images seen | 40 |",
        "| batch size | 5 |",
        "| seed | 0 |",
        "accelerate launch train_conditional.py --config training_config.yaml",
        f"torch {version('torch')}, diffusers {version('diffusers')}",
    ]:
        assert fragment in text, fragment
    assert str(pushed[1]) not in text  # folders of this machine are private


@pytest.mark.parametrize("name", ["sprites", "sprites-by-class"])
def test_snippet_of_the_card_works_as_it_stands(pushed, tmp_path, name):
    server, _, _ = pushed
    card = server.repos[f"me/{name}"].files["README.md"].decode()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert f"me/{name}" in snippet
    stranger = User(server, tmp_path / "stranger")
    stranger.log_in()
    calls = re.findall(r"^pipeline\(.*", snippet, re.MULTILINE)
    assert all("num_inference_steps=50)" in call for call in calls)  # all 1,000 would keep a visitor waiting
    isolated = ISOLATED + "from diffusers.schedulers import DDPMScheduler\n"
    stranger.run("-I", "-c", isolated + snippet, cwd=tmp_path)
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == (["image.png"] if name == "sprites" else ["image.png", "mix.png"])


@pytest.mark.slow
def test_hand_written_parts_of_a_card_are_kept(author, pipeline_folder):
    author.log_in()
    push = ["-m", "sprite_diffusion.sharing.hub", "push", str(pipeline_folder), "me/sprites"]
    author.run(*push)
    repository = author.server.repos["me/sprites"]
    card = repository.files["README.md"].decode()
    assert card.count("| steps | 8 |") == 1
    edited = card.replace("license: apache-2.0", "license: mit\nlanguage: en").replace("- ddpm", "- ddpm\n- mine")
    edited = edited.replace("<!-- from the run: begin -->", "# By hand\n\n<!-- from the run: begin -->")
    edited = edited.replace("| steps | 8 |", "| steps | 9 |") + "\nThanks to my cat.\n"
    repository.commit("edited", {"README.md": edited.encode()})
    for _ in range(2):
        author.run(*push)
        pushed_again = repository.files["README.md"].decode()
        assert pushed_again.count("# By hand") == pushed_again.count("Thanks to my cat.") == 1
        assert pushed_again.count("| steps | 8 |") == 1
        assert "| steps | 9 |" not in pushed_again
        data = ModelCard(pushed_again).data.to_dict()
        assert (data["license"], data["language"]) == ("mit", "en")
        assert data["tags"].count("ddpm") == data["tags"].count("mine") == 1
    repository.commit("all by hand", {"README.md": b"Only my own words."})
    author.run(*push)
    assert repository.files["README.md"].decode().count("Only my own words.") == 1


@pytest.mark.slow
def test_card_is_not_overwritten_when_the_hub_does_not_tell_it(author, pipeline_folder):
    author.log_in()
    push = ["-m", "sprite_diffusion.sharing.hub", "push", str(pipeline_folder), "me/sprites"]
    author.run(*push)
    author.run(*push)  # now the card is in this user's cache
    repository = author.server.repos["me/sprites"]
    repository.commit("edited", {"README.md": b"By hand."})
    author.server.failures["resolve"] = [503] * 20
    author.run(*push, status=2)
    author.server.failures["resolve"] = []
    assert repository.files["README.md"] == b"By hand."


def test_card_command(author, pipeline_folder):
    (pipeline_folder / "README.md").write_text("My notes.\n")
    summary = json.loads((pipeline_folder / "training_summary.json").read_text())
    summary["data_source"] = "/home/me/secrets/pictures"
    (pipeline_folder / "training_summary.json").write_text(json.dumps(summary))
    assert (
        author.run("-m", "sprite_diffusion.sharing.hub", "card", str(pipeline_folder)).stdout
        == f"wrote {pipeline_folder}/README.md\n"
    )
    card = (pipeline_folder / "README.md").read_text()
    assert card.count("My notes.") == 1
    assert "20 images from pictures;" in card
    assert "secrets" not in card
    summary["loss"] = None  # as in the summary of a pipeline that was written before the first log
    (pipeline_folder / "training_summary.json").write_text(json.dumps(summary))
    author.run("-m", "sprite_diffusion.sharing.hub", "card", str(pipeline_folder))
    card = (pipeline_folder / "README.md").read_text()
    assert "None were computed." in card
    assert ModelCard(card).data.eval_results is None
    assert 'from_pretrained("me/sprites")' in card
    assert not author.server.requests
    author.log_in()
    author.run("-m", "sprite_diffusion.sharing.hub", "push", str(pipeline_folder), "me/new")
    assert b"My notes." in author.server.repos["me/new"].files["README.md"]


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("training_summary.json", {"num_parameters": "many"}, "num_parameters is 'many'"),
        ("training_summary.json", {"loss": [0.5]}, r"loss is \[0.5\]"),
        ("training_summary.json", {"versions": None}, "'items'"),
        ("training_config.yaml", {"resolution": 16}, "resolution is 16"),
        ("model_index.json", {"id2label": {"0": 7}}, "id2label is 7"),
        ("metrics.json", {"figures": {}}, "the metrics are missing"),
        ("metrics.json", {"figures": {"near_copies": {**MEASUREMENT, "value": "few"}}}, "few"),
        ("metrics.json", {"sampler": None}, "sampler is None"),
        ("metrics.json", {"num_images": float("inf")}, "infinity"),
    ],
)
def test_card_names_a_value_of_another_type(pipeline_folder, file, changes, reason):
    metrics = {"global_step": 8, "num_images": 20, "extractor": "classifier", "sampler": "ddim:50", "of_class": {}}
    metrics["figures"] = {"near_copies": MEASUREMENT}
    (pipeline_folder / "metrics.json").write_text(json.dumps(metrics))
    assert "of 20 samples, 5.0% were near-copies" in make_card(pipeline_folder, None, None)
    path = pipeline_folder / file
    path.write_text(json.dumps({**yaml.safe_load(path.read_text()), **changes}))  # JSON is YAML
    with pytest.raises(UserInputError, match=f"is not the output folder of a run: .*{reason}"):
        make_card(pipeline_folder, None, None)


def test_card_that_is_written_again_keeps_its_metadata(pipeline_folder):
    (pipeline_folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n")
    card = make_card(pipeline_folder, None, "---\nthumbnail: cat.png\ntags: [cats]\n---\nMy cats.\n")
    metadata = yaml.safe_load(card.split("---")[1])
    assert list(metadata)[:4] == ["language", "license", "tags", "thumbnail"]
    assert list(metadata)[4:] == ["library_name", "pipeline_tag", "widget", "model-index"]
    assert (metadata["license"], metadata["tags"][-1]) == ("mit", "cats")
    again = make_card(pipeline_folder, None, card)
    assert yaml.safe_load(again.split("---")[1]) == metadata
    assert make_card(pipeline_folder, None, again) == again


EVIL_NAMES = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[free](https://evil.example)",
    "https://evil.example",
    "www.evil.example",
    "![x](https://evil.example/x.png)",
    "a | b",
    "`a` ``b``",
    "*_~$\\",
    "\x1b[31mred",
    "two\nlines\n```\n# head",
    'quote"s',
    "&lt;b&gt;",
    END,
    f"\n{END}\n<b>",
    BEGIN,
    "\u202eltr",
    "😀",
    " ",
]


def test_names_from_data_are_shown_and_never_acted_upon(pipeline_folder):
    """Rendered by CommonMark with HTML and links on, the card has the elements that it has with plain names."""
    renderer = MarkdownIt("commonmark", {"html": True}).enable("table")

    def render(names: list[str], **summary: str) -> str:
        values = {"id2label": dict(enumerate(names))}
        for file, changes in [("model_index.json", values), ("training_summary.json", summary)]:
            path = pipeline_folder / file
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return make_card(pipeline_folder, "me/sprites", None)

    plain_names = [f"name {i}" for i in range(len(EVIL_NAMES))]
    text_fields = ("data_source", "data_license", "device", "precision", "script")
    plain = renderer.render(ModelCard(render(plain_names)).text)
    card = render(EVIL_NAMES, **{name: EVIL_NAMES[i] for i, name in enumerate(text_fields)})
    html = renderer.render(ModelCard(card).text)
    for tag in ("a", "b", "br", "em", "h1", "h2", "hr", "img", "li", "p", "pre", "script", "strong", "table", "td"):
        assert html.count(f"<{tag}>") + html.count(f"<{tag} ") == plain.count(f"<{tag}>") + plain.count(f"<{tag} ")
    assert printable(card.replace("\n", "")) == card.replace("\n", "")  # no control codes
    outside_of_code = re.sub(r"<code.*?</code>", "", html, flags=re.DOTALL)
    assert "evil" not in outside_of_code  # programs make links of bare addresses too, but not within code
    for name in EVIL_NAMES[:-1]:
        assert escape(name) in card
    program = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert [node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant)].count(" ") == 2


def test_card_does_not_grow_when_it_is_pushed_again(pipeline_folder):
    index = pipeline_folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": {"0": END, "1": BEGIN}}))
    card = make_card(pipeline_folder, None, "My cats.\n")
    again = make_card(pipeline_folder, None, card)
    assert again == card
    assert make_card(pipeline_folder, None, again.replace("\n", "\r\n")).count("My cats.") == 1
    mine = card + f"Mine: `{END}` and {BEGIN}\n"
    assert make_card(pipeline_folder, None, mine).count(f"Mine: `{END}` and {BEGIN}") == 1


def test_card_without_its_second_mark_is_not_overwritten(pipeline_folder):
    card = make_card(pipeline_folder, None, None).replace(END, "") + "Mine."
    with pytest.raises(UserInputError, match="no '<!-- from the run: end -->' after it: put that back"):
        make_card(pipeline_folder, None, card)


def test_picture_of_a_card_is_one_of_the_run(pipeline_folder):
    shutil.copy(pipeline_folder / "samples/step-000008.png", pipeline_folder / "samples/step-9) [x](evil.png")
    assert "![Samples](samples/step-000008.png)" in make_card(pipeline_folder, None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("non-hero", "non-hero"),
        ("sprites (built in)", "sprites (built in)"),
        ("apache-2.0", "apache-2.0"),
        ("my_cats", "my_cats"),
        ("_cats_", "`_cats_`"),
        ("me/cats", "`me/cats`"),
        ("a.b", "`a.b`"),
        ("`a`", "`` `a` ``"),
        ("a\x1bb", "`a\\x1bb`"),
        ("café", "café"),
        ("", "` `"),
    ],
)
def test_plain_text_stays_plain_in_markdown(text, expected):
    assert escape(text) == expected


def test_run_begins_from_a_repository_and_its_card_says_so(pushed, tmp_path):
    server, _, _ = pushed
    user = User(server, tmp_path / "user")
    flags = TINY[: TINY.index("--block_out_channels")].split()
    user.run(
        "train_unconditional.py", *flags, "--init_from", "me/sprites-by-class", "--output_dir", str(tmp_path / "run")
    )
    card = ModelCard(make_card(tmp_path / "run", None, None))
    assert (card.data.base_model, card.data.base_model_relation) == ("me/sprites-by-class", "finetune")
    assert f"The training began with the weights of {escape('me/sprites-by-class')}; licence: apache" in card.text


def test_sample_script_samples_from_a_repository(pushed, tmp_path):
    server, _, _ = pushed
    flags = f"me/sprites-by-class --output {tmp_path}/out --scale 1 --num_inference_steps 2 --num_images 2"
    User(server, tmp_path / "user").run("sample.py", *flags.split(), "--palette", "auto")
    pictures = [Image.open(path) for path in sorted((tmp_path / "out").glob("*.png"))]
    assert len(pictures) == 10  # 2 for each of 5 classes
    assert all(picture.size == (16, 16) for picture in pictures)
    palette = server.repos["me/sprites-by-class"].files["palette.hex"].decode().split()
    drawn = {bytes(pixel).hex() for picture in pictures for pixel in np.asarray(picture).reshape(-1, 3)}
    assert 1 < len(drawn) <= len(palette)
    assert drawn <= {*palette}


def test_wrong_token_stops_the_run_before_it_starts(author, tmp_path):
    flags = PRIVATE_FLAGS.replace(TOKEN, "hf_expired")
    command = ["train_unconditional.py", *TINY.split(), *flags.split(), "--output_dir", str(tmp_path / "run")]
    result = author.run(*command, status=2)
    assert result.stderr.splitlines()[-1].startswith("error: --push_to_hub can't create me/sprites: ")
    assert "Traceback" not in result.stderr
    assert "hf_expired" not in result.stdout + result.stderr
    assert not (tmp_path / "run").exists()
    assert not author.server.repos


CREATE = """
import sys
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.sharing.hub import create_repository
for token, name in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    name, _, private = name.partition(":")
    try:
        print(create_repository(name, bool(private), token or None))
    except UserInputError as error:
        print(error)
"""


def test_repository_that_cannot_be_created_is_one_line(author):
    author.server.failures["create"] = [DROP, 503]
    cases = [
        (TOKEN, "me/a", "disconnected"),
        (TOKEN, "me/b", "503"),
        (TOKEN, "other/c", "you don't have the rights"),
        (TOKEN, "me/two words", "'me/two words'"),
        ("", "me/d", "401"),
        ("hf_expired", "me/e", "401"),
    ]
    arguments = [argument for case in cases for argument in case[:2]]
    # A name without a user is of a repository of the token's owner. The second time the repository is there already.
    result = author.run("-c", CREATE, *arguments, TOKEN, "f", TOKEN, "f", TOKEN, "f:private", TOKEN, "g:private")
    *refused, created, found, public, private = result.stdout.splitlines()
    assert len(refused) == len(cases)
    for line, (_, name, reason) in zip(refused, cases, strict=True):
        assert line.startswith(f"--push_to_hub can't create {name}: ")
        assert reason in line.lower()
    assert created == found == "me/f"
    assert public.startswith("--hub_private_repo: me/f exists and is public; ")
    assert private == "me/g"
    assert author.server.repos.keys() == {"me/f", "me/g"}
    assert author.server.repos["me/g"].private


def test_token_that_may_only_read_is_refused_before_training(author):
    author.server.role = "read"
    result = author.run("-c", CREATE, TOKEN, "me/a")
    assert result.stdout.startswith("--push_to_hub: the token may only read; ")


UPLOAD = """
import sys
from pathlib import Path
from sprite_diffusion.sharing import hub
hub.RETRY_DELAYS = (0.01, 0.02)
output_dir, token, *changes = sys.argv[1:]
for step, change in enumerate(changes):
    repo_id = hub.create_repository("me/sprites", private=False, token=token)
    uploader = hub.HubUploader(repo_id, Path(output_dir), private=False, token=token)
    if change:
        Path(output_dir, change).write_text("new")
    uploader.push(step)
    uploader.finish()
"""


@pytest.fixture
def pipeline_folder(pushed_runs, tmp_path):
    shutil.copytree(pushed_runs[1] / "sprites", tmp_path / "run")
    return tmp_path / "run"


def test_second_push_does_not_send_the_weights_again(author, pipeline_folder):
    result = author.run("-c", UPLOAD, str(pipeline_folder), TOKEN, "", "samples/new.png", "", "logs/new")
    first, second = author.server.repos["me/sprites"].commits[1:]
    assert WEIGHTS in first.changed
    assert second.changed == {"samples/new.png"}
    assert [name for name, _ in author.server.requests].count("lfs_upload") == 1
    assert len([line for line in result.stdout.splitlines() if line.startswith("uploaded ")]) == 4


@pytest.mark.parametrize(
    ("route", "status"),
    [("lfs_upload", 403), ("lfs_upload", 413), ("commit", DROP), ("commit", 429), ("commit", 503), ("preupload", 401)],
)
def test_upload_that_fails_is_tried_again(author, pipeline_folder, route, status):
    author.server.failures[route] = [status]
    lines = author.run("-c", UPLOAD, str(pipeline_folder), TOKEN, "").stdout.splitlines()
    uploading = [line for line in lines if line == "uploading to me/sprites"]
    warning, uploaded = [line for line in lines if line not in uploading]
    assert warning.startswith("warning: me/sprites was not updated (")
    assert warning.endswith("; trying again in 0 s")
    assert uploaded.startswith("uploaded ")
    assert author.server.repos["me/sprites"].commits[-1].title == "Step 0"


@pytest.mark.slow
def test_hub_that_stays_down_is_told_of_with_the_command_that_sends_it(author, pipeline_folder, tmp_path):
    author.server.failures["commit"] = [503] * 3
    *_, last, unsent = author.run("-c", UPLOAD, str(pipeline_folder), TOKEN, "").stdout.splitlines()
    assert last.startswith("warning: me/sprites was not updated (")
    assert "trying again" not in last
    start = "warning: step 0 is not on the Hub; send it by: python "
    assert unsent.startswith(start)
    assert author.server.repos["me/sprites"].commits[-1].title == "initial commit"
    author.log_in()
    author.run(*unsent.removeprefix(start).split())
    assert author.server.repos["me/sprites"].commits[-1].title == "Upload run"


@pytest.mark.slow
def test_run_survives_a_hub_that_fails(author, tmp_path):
    author.server.failures["commit"] = [503] * 10
    flags = f"{PRIVATE_FLAGS} --hub_strategy end --output_dir {tmp_path}/run"
    result = author.run("train_unconditional.py", *TINY.split(), *flags.split())
    assert "step 8 is not on the Hub" in result.stdout
    assert f"push {tmp_path}/run me/sprites --private" in result.stdout
    assert (tmp_path / "run" / WEIGHTS).is_file()
    assert shared_files(author.server, "me/sprites") == set()


SLOW = """
import sys, time
from pathlib import Path
from sprite_diffusion.sharing import hub
output_dir, token = sys.argv[1:]
repo_id = hub.create_repository("me/sprites", private=False, token=token)
uploader = hub.HubUploader(repo_id, Path(output_dir), private=False, token=token)
weights = Path(output_dir, "unet", "diffusion_pytorch_model.safetensors")
for step in range(4):
    weights.write_bytes(b"weights of step %d" % step)
    start = time.perf_counter()
    uploader.push(step)
    print(time.perf_counter() - start)
uploader.finish()
"""


def test_slow_hub_does_not_hold_up_the_training_and_gets_the_last_step(author, pipeline_folder):
    author.server.delays["commit"] = 2
    result = author.run("-c", SLOW, str(pipeline_folder), TOKEN)
    waits = [float(line) for line in result.stdout.splitlines()[:4]]
    assert max(waits) < 1
    first, last = author.server.repos["me/sprites"].commits[1:]
    assert [first.title, last.title] == ["Step 0", "Step 3"]
    # Each commit has the weights of its step, though the files were written again during the first upload.
    assert [commit.files[WEIGHTS] for commit in (first, last)] == [b"weights of step 0", b"weights of step 3"]


def test_strategies(author, tmp_path):
    """Of 8 steps, the pipeline is written after steps 4 and 8, and checkpoints after steps 3, 6 and 8."""
    for strategy, steps in [("end", [8]), ("checkpoint", [3, 4, 6, 8])]:
        name = f"sprites-{strategy}"
        flags = f"{PRIVATE_FLAGS} --hub_model_id me/{name} --hub_strategy {strategy} --output_dir {tmp_path}/{name}"
        author.run("train_unconditional.py", *TINY.split(), *flags.split())
        titles = [commit.title for commit in author.server.repos[f"me/{name}"].commits[1:]]
        expected = [f"Step {step}" for step in steps]
        assert titles[-1] == "Step 8"
        assert set(titles) <= set(expected)  # an upload that takes longer than a step leaves some out
        assert len(titles) == 1 if strategy == "end" else "Step 3" in titles
        assert not [path for path in author.server.repos[f"me/{name}"].files if "checkpoint" in path]


def test_push_command(author, pipeline_folder):
    author.log_in()
    push = ["-m", "sprite_diffusion.sharing.hub", "push", str(pipeline_folder)]
    before = sorted(path.name for path in pipeline_folder.iterdir())
    assert author.run(*push, "me/later", "--private").stdout.startswith("uploaded http")
    repository = author.server.repos["me/later"]
    assert repository.private
    assert unversioned(shared_files(author.server, "me/later")) == OF_EVERY_RUN | {
        "pipeline.py",
        "scheduler/pipeline_ddpm_VERSION.py",
    }
    assert sorted(path.name for path in pipeline_folder.iterdir()) == before

    # Code of another version is replaced, and other files of the repository stay.
    repository.commit("others", {"scheduler/scheduling_closed_form_ddpm_00000000.py": b"", "app.py": b"import gradio"})
    author.run(*push, "me/later", "--private")
    files = shared_files(author.server, "me/later")
    assert "app.py" in files
    assert "scheduler/scheduling_closed_form_ddpm_00000000.py" not in files

    (pipeline_folder / "samples" / "step-000008.png").write_bytes(b"another")
    printed = author.run(*push, "me/later", "--pr").stdout
    assert printed == f"uploaded {author.server.url}/me/later/discussions/1\n"
    assert repository.pull_requests[0].changed >= {"samples/step-000008.png"}
    assert repository.files["samples/step-000008.png"] != b"another"


def test_a_space_draws_with_the_model(author, pipeline_folder, tmp_path):
    """Its files alone, run as the Hub runs them: by app.py, at the address and port of gradio's variables."""
    author.log_in()
    push = [
        "-m",
        "sprite_diffusion.sharing.hub",
        "push",
        str(pipeline_folder),
        "me/later",
        "--space",
        "me/later-studio",
    ]
    _, uploaded = author.run(*push).stdout.splitlines()
    assert uploaded.startswith(f"uploaded {author.server.url}/spaces/me/later-studio/commit/")
    files = dict(author.server.repos["spaces/me/later-studio"].files)
    assert yaml.safe_load(files["README.md"].decode().split("---")[1])["models"] == ["me/later"]
    for name, content in files.items():
        (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / name).write_bytes(content)
    environment = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(find_free_port()), "SPACE_ID": "me/x"}
    environment |= {**author.environment(author.server.url), "PYTHONPATH": "", "PYTHONSAFEPATH": ""}
    process = start_command([*PYTHON, "-u", "app.py"], environment, tmp_path / "space", fork=False)
    try:
        said = process.stdout.readline()
        url = re.fullmatch(r"open (http://127.0.0.1:\d+/) in a browser; Ctrl-C ends it\n", said)[1]
        page = build_opener(ProxyHandler({})).open(f"{url}config").read().decode()
    finally:
        kill(process)
    assert "later: studio" in page
    assert '"elem_id":"draw"' in page

    author.server.repos["spaces/me/later-studio"].commit("another", {"README.md": b"mine"})
    author.run(*push)
    assert author.server.repos["spaces/me/later-studio"].files["README.md"] == b"mine"
    author.server.repos["spaces/me/later-studio"].commit("another", {"app.py": b"import gradio"})
    refused = author.run(*push, status=2).stderr
    assert "error: --space me/later-studio holds another app: name a Space of its own for the studio" in refused


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.slow
def test_push_command_that_fails_is_one_line(author, pipeline_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    author.server.failures["commit"] = [503]
    for login, arguments, fragment in [
        (False, ["push", str(pipeline_folder), "me/x"], "401"),
        (True, ["push", str(tmp_path / "empty"), "me/x"], "empty holds no pipeline"),
        (True, ["push", str(pipeline_folder), "other/x"], "you don't have the rights"),
        (True, ["push", str(pipeline_folder), "me/x"], "me/x was not updated: "),
        (True, ["push", str(pipeline_folder)], "repo_id"),
        (True, ["card", str(tmp_path / "missing")], "missing holds no pipeline"),
    ]:
        if login:
            author.log_in()
        result = author.run("-m", "sprite_diffusion.sharing.hub", *arguments, status=2)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert fragment in lines[0].replace("You", "you"), lines
        assert "Traceback" not in result.stderr


def test_bare_network_of_the_hub_is_drawn_from(author, tmp_path):
    """A tutorial's `model.push_to_hub(...)` leaves a network without its process."""
    make_tiny_network().save_pretrained(tmp_path / "net")
    author.log_in()
    script = "import sys; from diffusers import UNet2DModel as M; M.from_pretrained(sys.argv[1]).push_to_hub('me/net')"
    author.run("-c", script, str(tmp_path / "net"))
    assert "model_index.json" not in author.server.repos["me/net"].files
    flags = f"--ddpm_num_steps 20 --num_inference_steps 2 --num_images 1 --output {tmp_path}"
    author.run("sample.py", "me/net", *f"{flags}/hub.png".split())
    author.run("sample.py", str(tmp_path / "net"), *f"{flags}/local.png".split())
    hub, local = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("hub", "local"))
    assert (hub == local).all()
    # Of a pipeline, whose process is known, the flag is refused there as it is here.
    script = "import sys; from diffusers import DDPMPipeline as P, DDPMScheduler as S, UNet2DModel as M; "
    script += "P(M.from_pretrained(sys.argv[1]), S()).push_to_hub('me/whole')"
    author.run("-c", script, str(tmp_path / "net"))
    result = author.run("sample.py", "me/whole", "--ddpm_num_steps", "20", "--num_images", "1", status=2)
    assert "--ddpm_num_steps: me/whole says itself how it was trained" in result.stderr
