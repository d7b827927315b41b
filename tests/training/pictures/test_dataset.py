from __future__ import annotations

import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from adapterkit.errors import DataError
from adapterkit.training.diffusion.validation import still
from adapterkit.training.image_files import open_image, unit_tensor
from adapterkit.training.order import Draw, Order
from adapterkit.training.pictures import latents as latents_module
from adapterkit.training.pictures.dataset import Pictures
from adapterkit.training.pictures.latents import Latents
from adapterkit.training.pictures.options import PictureOptions
from adapterkit.training.pictures.plan import Plan
from adapterkit.training.pictures.store import FolderStore, MemoryStore, Store
from adapterkit.training.pictures.survey import survey


class Encoder:
    """The mean of 2 x 2 pixels, and a hundredth."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        mean = F.avg_pool2d(pictures, 2)
        return mean, torch.full_like(mean, 0.01)


def noisy(path: Path, size: tuple[int, int]) -> Image.Image:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.merge("RGB", [Image.effect_noise(size, 90) for _ in range(3)])
    image.save(path)
    path.with_suffix(".txt").write_text(path.stem)
    return image


def planned(data: Path, **values: Any) -> Plan:
    options = PictureOptions.model_validate({"caption_dropout": 0.0, **values})
    return Plan.of(survey(data, options)[0], options, (16, 16), 2)


def made(
    plan: Plan, store: Store | None = None, encoder: Encoder | None = None, told: list[str] | None = None
) -> Pictures:
    examples = plan.examples()
    latents = Latents(store or MemoryStore(), "model")
    shots = [shot for example in examples for shot in example.shots]
    latents.prepare(shots, encoder or Encoder(), [].append if told is None else told.append)
    return Pictures(examples, latents, plan.options.unmasked_weight)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, size in (("square", (16, 16)), ("wide", (64, 16)), ("tall", (20, 30)), ("large", (32, 32))):
        noisy(tmp_path / "data" / f"{name}.png", size)
    return tmp_path / "data"


def test_of_several_captions_a_draw_says_one_always_the_same(data: Path):
    (data / "square.txt").write_text("first\nsecond\nthird")
    plan = planned(data, caption_lines=True, trigger="ink")
    images = made(plan)
    index = [example.picture.path.stem for example in images.examples].index("square")
    said = [images[Draw(index, seed)]["caption"] for seed in range(60)]
    assert {caption: said.count(caption) > 9 for caption in said} == {
        "ink, first": True, "ink, second": True, "ink, third": True,
    }  # fmt: skip
    assert said == [images[Draw(index, seed)]["caption"] for seed in range(60)]
    picture = images.examples[index].picture
    assert picture.captions == ["ink, first", "ink, second", "ink, third"]
    assert still(picture).captions == ["ink, first"]
    one = made(planned(data, trigger="ink"))
    assert one[Draw(index, 5)]["caption"] == "ink, first second third"
    assert torch.equal(one[Draw(0, 5)]["noise"], images[Draw(0, 5)]["noise"])  # of others nothing changes


def test_an_example_is_what_the_draw_says(data: Path):
    images = made(planned(data, buckets=False, flip=True))
    square = open_image(data / "square.png")
    index = [example.picture.path.stem for example in images.examples].index("square")
    assert images[Draw(index, 5)]["caption"] == "square"
    means = [F.avg_pool2d(unit_tensor(square), 2)]
    means.append(means[0].flip(-1))
    seen = set()
    for seed in range(20):
        item, again = images[Draw(index, seed)], images[Draw(index, seed)]
        assert all(torch.equal(item[key], again[key]) for key in ("latents", "noise", "u", "sizes", "weight"))
        fits = [bool(((item["latents"] - mean).abs() < 0.06).all()) for mean in means]
        assert sum(fits) == 1
        seen.add(fits.index(True))
    assert seen == {0, 1}


def test_numbers_of_draws_are_normal_and_uniform(data: Path):
    images = made(planned(data, buckets=False))
    items = [images[Draw(0, seed)] for seed in range(300)]
    noise = torch.stack([item["noise"] for item in items])
    entry = images.latents.get(images.examples[0].shots[0])
    for numbers in (noise, torch.stack([(item["latents"] - entry["mean"]) / 0.01 for item in items])):
        assert abs(numbers.mean()) < 0.01
        assert abs(numbers.std() - 1) < 0.01
    times = torch.stack([item["u"] for item in items])
    assert 0 <= times.min() < 0.03
    assert 0.97 < times.max() < 1
    assert abs(times.mean() - 0.5) < 0.05


def test_batches_are_of_one_size_and_every_picture_is_shown_as_often_as_it_is_repeated(data: Path):
    noisy(data / "3_more/more.png", (64, 16))
    images = made(planned(data))
    assert len(images) == 7
    assert [images.groups.count(group) for group in sorted(set(images.groups))] == [2, 4, 1] or len(
        set(images.groups)
    ) == 3
    for batch in Order(len(images), 3, 0, 0, 20, groups=images.groups):
        joined = torch.utils.data.default_collate([images[draw] for draw in batch])
        assert joined["latents"].shape[0] == 3
        assert joined["latents"].shape[-2:] == tuple(joined["sizes"][0, 4:] // 2)
        assert joined["weight"].dtype == torch.float32
        assert joined["prior"].dtype == torch.bool


def test_sizes_are_told_per_picture(data: Path):
    images = made(planned(data, buckets=False))
    sizes = {e.picture.path.stem: images[Draw(i, 0)]["sizes"].tolist() for i, e in enumerate(images.examples)}
    assert sizes["wide"] == [16, 64, 0, 24, 16, 16]
    assert sizes["tall"] == [30, 20, 4, 0, 16, 16]
    assert sizes["large"] == [32, 32, 0, 0, 16, 16]


def test_what_is_cut_enlarged_or_repeated_is_told(data: Path, tmp_path: Path):
    assert planned(data, buckets=False).facts() == {
        "cut to their sizes": "by 54% on average, 2 (wide.png 75%, tall.png 33%)"
    }
    told = planned(data).facts()
    assert told["sizes"] == "16 x 16 (2), 12 x 20 (1), 32 x 8 (1)"
    assert told["cut to their sizes"] == "by 10% on average, 1 (tall.png 10%)"
    concepts = [{"folder": "."}, {"folder": ".", "prior": True, "repeats": 3}]
    told = planned(data, concepts=concepts).facts()
    assert (told["."], told[". (prior)"]) == ("4 pictures, 4 examples", "4 pictures, 12 examples")
    noisy(tmp_path / "small/2_a/a.png", (8, 4))
    assert planned(tmp_path / "small").facts() == {
        ".": "1 picture, 2 examples",
        "cut to their sizes": "by 9% on average, 1 (a.png 9%)",
        "enlarged": "1 (a.png 2.8 times)",
    }
    assert planned(tmp_path / "small", upscale=False).facts() == {".": "1 picture, 2 examples"}


def test_pictures_of_one_name_are_several(data: Path):
    noisy(data / "more/wide.png", (64, 16))
    noisy(data / "small/wide.png", (8, 8))
    assert planned(data, buckets=False).facts() == {
        "cut to their sizes": "by 61% on average, 3 (wide.png 75%, wide.png 75%, tall.png 33%)",
        "enlarged": "1 (wide.png 2 times)",
    }


def test_sizes_that_fill_no_batch_are_told(data: Path):
    assert planned(data).small_sizes(1) == ""
    assert planned(data).small_sizes(2) == "2 (12 x 20, 32 x 8)"
    assert planned(data, buckets=False).small_sizes(9) == ""
    concepts = [{"folder": ".", "repeats": 2}]
    assert planned(data, concepts=concepts).small_sizes(4) == "2 (12 x 20, 32 x 8)"
    assert planned(data, concepts=concepts).small_sizes(5) == "3 (16 x 16, 12 x 20, 32 x 8)"


def test_masks_have_the_latents_size_and_what_they_leave_out_a_weight(data: Path):
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 7, 16))
    mask.save(data / "square.mask.png")
    images = made(planned(data, masks="files", unmasked_weight=0.2, flip=True))
    stems = [example.picture.path.stem for example in images.examples]
    row = torch.tensor([1.0, 1.0, 1.0, 0.6, 0.2, 0.2, 0.2, 0.2])
    found = {tuple(images[Draw(stems.index("square"), seed)]["mask"][0, 0].tolist()) for seed in range(20)}
    assert found == {tuple(row.tolist()), tuple(row.flip(0).tolist())}
    whole = images[Draw(stems.index("wide"), 0)]
    assert torch.equal(whole["mask"], torch.ones(1, *whole["latents"].shape[-2:]))
    assert "mask" not in made(planned(data))[Draw(0, 0)]


def test_concepts_have_their_weights_and_captions(data: Path):
    noisy(data / "own/own.png", (16, 16))
    concepts = [{"folder": "own", "trigger": "sks"}, {"folder": ".", "prior": True, "weight": 0.5}]
    images = made(planned(data, concepts=concepts))
    items = [images[Draw(index, 0)] for index in range(len(images))]
    assert [(item["prior"], float(item["weight"])) for item in items] == [(False, 1.0)] + [(True, 0.5)] * 5
    assert items[0]["caption"] == "sks, own"
    assert {item["caption"] for item in items[1:]} == {"own", "square", "wide", "tall", "large"}


def test_a_killed_run_keeps_what_it_made_and_a_damaged_entry_is_made_anew(data: Path, tmp_path: Path):
    plan, store, told = planned(data, flip=True), FolderStore(tmp_path / "cache"), []

    class Killed(Encoder):
        def __call__(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if self.calls == 5:
                raise KeyboardInterrupt
            return super().__call__(pictures)

    with pytest.raises(KeyboardInterrupt):
        made(plan, store, Killed())
    encoder = Encoder()
    whole = made(plan, store, encoder, told)
    assert encoder.calls == 3
    assert told == ["cache: 5 of 8 latents are there already"]
    fresh = made(plan)
    for index in range(len(fresh)):
        assert torch.equal(whole[Draw(index, index)]["latents"], fresh[Draw(index, index)]["latents"])
    path = next((tmp_path / "cache").rglob("*.entry"))
    path.write_bytes(path.read_bytes()[:-1])
    damaged = [i for i in range(len(whole)) for shot in whole.examples[i].shots if shot.key("model") == path.stem]
    with pytest.raises(DataError, match="gone from the cache, or damaged, since the run began; resume the run"):
        [whole[Draw(damaged[0], seed)] for seed in range(20)]
    encoder = Encoder()
    made(plan, store, encoder)
    assert encoder.calls == 1


def test_a_picture_that_changes_or_is_shown_otherwise_is_encoded_again(data: Path, tmp_path: Path):
    store = FolderStore(tmp_path / "cache")
    counts = []
    changes: list[dict[str, Any]] = [{}, {"flip": True}, {"buckets": False}, {"trigger": "sks"}, {"colour": 0.1}]
    for values in changes:
        encoder = Encoder()
        made(planned(data, **values), store, encoder)
        counts.append(encoder.calls)
    assert counts == [4, 4, 2, 0, 12]
    noisy(data / "wide.png", (64, 16))
    encoder = Encoder()
    made(planned(data), store, encoder)
    assert encoder.calls == 1


def test_examples_can_be_sent_to_other_processes(data: Path, tmp_path: Path):
    for store in (MemoryStore(), FolderStore(tmp_path / "cache")):
        images = made(planned(data), store)
        sent = pickle.loads(pickle.dumps(images))
        assert torch.equal(sent[Draw(1, 3)]["latents"], images[Draw(1, 3)]["latents"])


def test_latents_in_a_folder_are_in_memory_one_at_a_time(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(12):
        noisy(data / f"{number}.png", (16, 16))
    alive: set[int] = set()
    most = [0]

    class Watched(Encoder):
        def __call__(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mean, spread = super().__call__(pictures)
            watch(mean)
            return mean, spread

    def watch(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        alive.add(id(storage))
        weakref.finalize(storage, alive.discard, id(storage))
        most[0] = max(most[0], len(alive))

    monkeypatch.setattr(latents_module, "_MUCH", 1000)
    told: list[str] = []
    made(planned(data), MemoryStore(), Watched(), told)
    assert most[0] > 10
    assert any("GiB of memory; options.cache=FOLDER" in line for line in told)
    most[0] = 0
    told.clear()
    pictures = made(planned(data), FolderStore(tmp_path / "cache"), Watched(), told)
    assert most[0] <= 2
    assert not any("GiB" in line for line in told)
    for number in range(len(pictures)):
        watch(pictures.latents.get(pictures.examples[number].shots[0])["mean"])
    assert most[0] <= 2
