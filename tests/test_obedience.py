"""Tests whether the words are obeyed: the judge, the captions that models are asked for, and the figures."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from sprite_diffusion.data import sprites
from sprite_diffusion.data.attributes import has_left_out_pair, is_left_out, list_values, read_caption
from sprite_diffusion.data.sprites import CLASS_NAMES, RAMPS, draw_sprites
from sprite_diffusion.metrics import judge as judging
from sprite_diffusion.metrics.evaluation import clip_scores
from sprite_diffusion.metrics.extractors import make_extractor
from sprite_diffusion.metrics.judge import UNSAID, Judge, encode_captions, load_judge
from sprite_diffusion.metrics.obedience import Prompts, draw_prompts, judge_obedience, measure_obedience
from sprite_diffusion.metrics.report import LEFT_OUT_PAIRS, SEEN, TITLES, UNSEEN

CPU = torch.device("cpu")
SLOTS = [*list_values()]
VALUES = list_values()


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """Returns images (N, H, W, C) as (N, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


class Oracle(Judge):
    """A judge that knows each sprite of some prompts, so that the figures can be told from the judge's mistakes."""

    def __init__(self, prompts: Prompts, refused: tuple[str, ...] = ()):
        super().__init__(None, {slot: 0.5 if slot in refused else 1.0 for slot in SLOTS})
        pairs = zip(prompts.images, encode_captions(prompts.captions), strict=True)
        self.__dict__["known"] = {image.numpy().tobytes(): values for image, values in pairs}

    def read(self, images):
        return torch.stack([self.known[image.numpy().tobytes()] for image in images])


@pytest.fixture(scope="module")
def seen() -> Prompts:
    return draw_prompts(1000, SEEN)


@pytest.fixture(scope="module")
def unseen() -> Prompts:
    return draw_prompts(500, UNSEEN)


def count(captions: list[str], colours: bool) -> int:
    """Counts colours or other attributes; the eyes and the sword of a skeleton are of one colour, which is one."""
    facts = [
        (row, fact.slot, bool(fact.part)) for row, caption in enumerate(captions) for fact in read_caption(caption)
    ]
    return sum(is_colour == colours for _, _, is_colour in {*facts})


class TestPrompts:
    def test_those_seen_are_the_training_set_and_the_others_are_what_was_left_out_of_it(self, seen, unseen):
        images, _, captions = draw_sprites(1000, leave_out=has_left_out_pair)
        assert seen.captions == captions
        assert torch.equal(seen.images, to_tensor(images))
        assert all(map(has_left_out_pair, unseen.captions))
        whole = draw_sprites(1000)[2]
        for label in range(len(CLASS_NAMES)):
            left_out = [*filter(has_left_out_pair, whole[label::5])]
            assert left_out == unseen.captions[label::5][: len(left_out)] != []
        assert unseen.images.shape == (500, 3, 16, 16)

    def test_captions_as_numbers(self):
        caption = "a hero walking left with an orange cape, long red hair and an axe"
        (numbers,) = encode_captions([caption])
        said = {slot: VALUES[slot][i - 1] for slot, i in zip(SLOTS, numbers.tolist(), strict=True) if i != UNSAID}
        assert said == {
            "subject": "walking hero",
            "facing": "left",
            "cloak": "cape",
            "cloak colour": "orange",
            "hair": "long hair",
            "hair colour": "red",
            "weapon": "axe",
        }


class TestFigures:
    def test_the_artists_own_sprites_obey(self, seen):
        figures = judge_obedience(Oracle(seen), encode_captions(seen.captions), seen, SEEN)
        assert figures.keys() < TITLES.keys()
        assert {figure.value for figure in figures.values()} == {1}
        assert {figure.real for figure in figures.values()} == {1}
        assert figures["attributes_seen"].num_images == 1000

    def test_of_other_captions_of_the_class_no_more_is_there_than_by_chance(self, seen):
        """The chance that an attribute is there is the share of the sprites of its class that have it."""
        asked = encode_captions(seen.captions)
        labels = np.arange(len(asked)) % len(CLASS_NAMES)
        drawn = torch.empty_like(asked)
        expected = {"attributes_seen": 0.0, "colours_seen": 0.0}
        rng = np.random.default_rng(0)
        for label in range(len(CLASS_NAMES)):
            rows = np.nonzero(labels == label)[0]
            drawn[rows] = asked[rng.permutation(rows)]
            for i, slot in enumerate(SLOTS):
                counts = asked[rows, i].bincount()[1:].double()
                name = "colours_seen" if slot.endswith(" colour") else "attributes_seen"
                expected[name] += float(counts.square().sum()) / len(rows)
        expected["attributes_seen"] /= count(seen.captions, colours=False)
        expected["colours_seen"] /= count(seen.captions, colours=True)
        figures = judge_obedience(Oracle(seen), drawn, seen, SEEN)
        for name, chance in expected.items():
            low, high = figures[name].interval
            assert figures[name].value == pytest.approx(chance, abs=high - low), name  # four standard errors
            assert figures[name].value < 0.5
            assert figures[name].real == 1

    def test_a_part_of_another_colour_counts_for_colours_alone(self, seen):
        drawn = encode_captions(seen.captions)
        cloaks = drawn[:, SLOTS.index("cloak colour")]
        cloaks[cloaks != UNSAID] = 1 + cloaks[cloaks != UNSAID] % len(VALUES["cloak colour"])
        figures = judge_obedience(Oracle(seen), drawn, seen, SEEN)
        wrong = int((cloaks != UNSAID).sum())
        assert figures["attributes_seen"].value == 1
        assert figures["colours_seen"].value == pytest.approx(1 - wrong / count(seen.captions, colours=True))
        assert figures["colours_seen_up_to_4"].value == 1  # monsters, foods and spells, which have no cloaks
        assert figures["colours_seen_9_or_more"].value < figures["colours_seen"].value

    def test_captions_are_parted_by_how_much_they_name(self):
        captions = [
            "a purple bat with red wings and white eyes",  # 1 attribute, 3 colours
            "a hero with a red tunic, short blue hair, a green helmet and an axe",  # 5 and 3
            "a hero walking right with a red cape, a blue coat, a green hood and a bow",  # 6 and 3
        ]
        prompts = Prompts(captions, torch.arange(3, dtype=torch.uint8).expand(16, 16, 3, 3).permute(3, 2, 0, 1))
        figures = judge_obedience(Oracle(prompts), encode_captions(captions[::-1]), prompts, SEEN)
        # The second is drawn as it was to be, the others in place of each other.
        assert {name: (figure.value, figure.num_images) for name, figure in figures.items()} == {
            "attributes_seen": (5 / 12, 3),
            "colours_seen": (3 / 9, 3),
            "attributes_seen_up_to_4": (0, 1),
            "colours_seen_up_to_4": (0, 1),
            "attributes_seen_5_to_8": (1, 1),
            "colours_seen_5_to_8": (1, 1),
            "attributes_seen_9_or_more": (0, 1),
            "colours_seen_9_or_more": (0, 1),
        }

    def test_pairs_that_were_left_out_are_also_counted_alone(self, unseen):
        drawn = encode_captions(unseen.captions)
        pairs = {
            (row, SLOTS.index(fact.slot))
            for row, caption in enumerate(unseen.captions)
            for fact in read_caption(caption)
            if fact.part and is_left_out(fact.pair)
        }
        for place in pairs:
            drawn[place] = UNSAID
        figures = judge_obedience(Oracle(unseen), drawn, unseen, UNSEEN)
        assert figures[LEFT_OUT_PAIRS].value == 0
        assert figures["attributes_unseen"].value == 1
        assert figures["colours_unseen"].value == pytest.approx(1 - len(pairs) / count(unseen.captions, colours=True))
        assert LEFT_OUT_PAIRS not in judge_obedience(Oracle(unseen), drawn, unseen, SEEN)

    def test_what_the_judge_refuses_does_not_count(self, seen):
        drawn = encode_captions(seen.captions)
        drawn[:, [SLOTS.index("cloak"), SLOTS.index("cloak colour")]] = UNSAID
        assert judge_obedience(Oracle(seen), drawn, seen, SEEN)["attributes_seen"].value < 1
        figures = judge_obedience(Oracle(seen, refused=("cloak", "cloak colour")), drawn, seen, SEEN)
        assert {figure.value for figure in figures.values()} == {1}

    def test_images_may_come_in_any_order(self, monkeypatch, capsys):
        prompts = {group: draw_prompts(40, group) for group in (SEEN, UNSEEN)}
        both = Prompts(
            prompts[SEEN].captions + prompts[UNSEEN].captions, torch.cat([some.images for some in prompts.values()])
        )
        monkeypatch.setattr(
            "sprite_diffusion.metrics.obedience.load_judge", lambda device: Oracle(both, refused=("beard", "facing"))
        )
        asked = []

        def generate(conditions):
            asked.append(captions := [condition.name for condition in conditions])
            images = prompts[SEEN if captions == prompts[SEEN].captions else UNSEEN].images
            for rows in torch.randperm(40).split(7):
                yield rows, images[rows]

        figures = measure_obedience(generate, 40, (SEEN, UNSEEN))
        assert asked == [prompts[SEEN].captions, prompts[UNSEEN].captions]
        assert capsys.readouterr().err.strip().endswith("is not asked about: facing, beard")
        assert {"attributes_seen", "colours_unseen", LEFT_OUT_PAIRS} <= figures.keys()
        assert {figure.value for figure in figures.values()} == {1}


class TestJudge:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        """An empty cache for each test, and a judge that is trained for some seconds: on a few slots it is good."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(judging, "TRAINING_STEPS", 20)
        monkeypatch.setattr(judging, "NUM_SPRITES", 500)
        monkeypatch.setattr(judging, "NUM_HELD_OUT", 300)
        return tmp_path / "sprite-diffusion"

    def test_it_knows_how_good_it_is_and_is_trained_once(self, monkeypatch):
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        judge = load_judge(CPU)
        assert torch.rand(1) == expected  # the random state is as before
        images, values, labels = judging._draw(300, judging.HELD_OUT_SEED)
        is_right, is_said = judge.read(images) == values, values != UNSAID
        heroes = np.isin(labels, [CLASS_NAMES.index("hero"), CLASS_NAMES.index("side-facing")])
        for slot in ("cloak", "hair colour", "beard"):
            i = SLOTS.index(slot)
            shares = is_right[is_said[:, i], i].double().mean(), is_right[heroes, i].double().mean()
            assert judge.accuracy[slot] == pytest.approx(float(min(shares)))
        assert judge.slots == SLOTS
        assert judge.refused == [slot for slot in SLOTS if judge.accuracy[slot] < 0.97]
        assert "cloak" in judge.refused
        monkeypatch.setattr(judging, "_train", None)  # a call would fail
        again = load_judge(CPU)
        assert again.accuracy == judge.accuracy
        assert torch.equal(again.read(images), judge.read(images))

    def test_a_damaged_one_is_trained_again(self, cache, monkeypatch):
        monkeypatch.setattr(judging, "TRAINING_STEPS", 2)
        judge = load_judge(CPU)
        (file,) = cache.glob("judge-*.safetensors")
        file.write_bytes(file.read_bytes()[:-1])
        again = load_judge(CPU)
        assert again.accuracy == judge.accuracy
        weights = again.network.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in judge.network.state_dict().items())

    def test_another_artist_has_another_judge(self, cache, monkeypatch):
        monkeypatch.setattr(judging, "TRAINING_STEPS", 2)
        load_judge(CPU)
        monkeypatch.setitem(RAMPS, "red", RAMPS["pink"])
        load_judge(CPU)
        assert len([*cache.glob("judge-*.safetensors")]) == 2

    def test_images_with_transparency_are_laid_on_white(self, monkeypatch):
        monkeypatch.setattr(judging, "TRAINING_STEPS", 2)
        judge = load_judge(CPU)
        transparent = to_tensor(draw_sprites(100, transparent=True)[0])
        transparent[:, :3] *= transparent[:, 3:] // 255  # colours are multiplied by alpha, as in the data
        on_white = to_tensor(draw_sprites(100)[0])
        assert torch.equal(judge.read(transparent), judge.read(on_white))


def recolour(monkeypatch, num_sprites: int, slot: str) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """Draws sprites of a part in pink, whatever the caption says.

    Returns the images, the captions, and which of them name the part in another colour.
    """
    compose = sprites._compose
    nouns = {part.split()[-1] for part in VALUES[slot]}

    def in_pink(layers, ink, mirrored):
        pink = (np.array(RAMPS["pink"], dtype=np.uint8),)
        return compose(
            [
                layer._replace(ramps=pink + layer.ramps[1:]) if nouns & {*layer.phrase.split()} else layer
                for layer in layers
            ],
            ink,
            mirrored,
        )

    monkeypatch.setattr(sprites, "_compose", in_pink)
    images, _, captions = draw_sprites(num_sprites, seed=3)
    monkeypatch.setattr(sprites, "_compose", compose)
    colours = [{fact.slot: fact.value for fact in read_caption(caption)}.get(f"{slot} colour") for caption in captions]
    return to_tensor(images), captions, torch.tensor([colour not in (None, "pink") for colour in colours])


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Judge:
    """The judge as it is used, which takes minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return load_judge(CPU)


@pytest.mark.slow
class TestRealJudge:
    def test_it_judges_every_slot(self, judge):
        assert not judge.refused

    def test_the_artists_own_sprites_obey(self, judge, seen, unseen):
        for group, prompts in ((SEEN, seen), (UNSEEN, unseen)):
            for name, figure in judge_obedience(judge, judge.read(prompts.images), prompts, group).items():
                assert figure.value == figure.real > judging.MIN_ACCURACY, name

    def test_a_little_noise_changes_little(self, judge, seen):
        noise = 8 * torch.randn(seen.images.shape, generator=torch.Generator().manual_seed(0))
        noisy = (seen.images + noise).round().clamp(0, 255).to(torch.uint8)
        for name, figure in judge_obedience(judge, judge.read(noisy), seen, SEEN).items():
            assert figure.value > 0.96, name

    def test_sprites_of_other_captions_obey_no_more_than_by_chance(self, judge, seen):
        rows = torch.arange(1000).view(-1, 5).roll(37, dims=0).flatten()  # of the same classes
        figures = judge_obedience(judge, judge.read(seen.images[rows]), seen, SEEN)
        expected = judge_obedience(Oracle(seen), encode_captions(seen.captions)[rows], seen, SEEN)
        for name, figure in figures.items():
            assert figure.value == pytest.approx(expected[name].value, abs=0.02), name

    @pytest.mark.parametrize("slot", ["cloak", "clothes", "hair", "headgear", "shield"])
    def test_it_sees_a_part_of_another_colour_and_all_others_as_they_were(self, judge, monkeypatch, slot):
        images, captions, is_other = recolour(monkeypatch, 1000, slot)
        asked, seen = encode_captions(captions), judge.read(images)
        assert is_other.sum() > 50
        i = SLOTS.index(f"{slot} colour")
        pink = 1 + VALUES[f"{slot} colour"].index("pink")
        assert (seen[is_other, i] == pink).double().mean() > 0.97
        others = [column for column in range(len(SLOTS)) if column != i]
        is_named = asked[is_other][:, others] != UNSAID
        assert (seen == asked)[is_other][:, others][is_named].double().mean() > 0.97


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A small CLIP model with a tokenizer of letters, which has learned nothing."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=120)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(pieces), "max_position_embeddings": 120, "eos_token_id": len(pieces) - 1}
    configs = {
        "text_config": {**sizes, **text, "projection_dim": 8},
        "vision_config": {**sizes, "image_size": 32, "patch_size": 8, "projection_dim": 8},
    }
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(**configs, projection_dim=8)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


class TestClipScore:
    def test_it_is_the_cosine_that_the_whole_model_gives(self, clip):
        """torchmetrics' CLIPScore would say the same, but fails with transformers 5."""
        images, _, captions = draw_sprites(70, transparent=True)
        on_white = to_tensor(images[..., :3])
        transparent = to_tensor(images)
        transparent[:, :3] *= transparent[:, 3:] // 255
        extractor = make_extractor("clip", str(clip), SimpleNamespace(class_labels=None, captions=captions), CPU)
        ours = clip_scores(extractor.embed_texts, extractor.extract(transparent), captions)
        processor, network = CLIPProcessor.from_pretrained(clip), CLIPModel.from_pretrained(clip)
        inputs = processor(text=captions, images=list(on_white), padding=True, return_tensors="pt")
        with torch.no_grad():
            cosines = network(**inputs).logits_per_image.diagonal() / network.logit_scale.exp()
        assert cosines.min() < 0 < cosines.max()
        torch.testing.assert_close(ours, 100 * cosines.clamp(min=0), rtol=1e-4, atol=1e-3)
