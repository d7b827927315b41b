"""What is special about UNets: no caption, long captions, the refiner, inpainting; against the pipelines' loops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from transformers import CLIPTextModelWithProjection

import adapterkit as ak
from adapterkit.errors import ConfigError
from adapterkit.training.diffusion.options import Options
from adapterkit.training.diffusion.recipes.chunks import chunks_of
from adapterkit.training.diffusion.recipes.inpainting import Inpainting, InpaintingXL
from adapterkit.training.diffusion.recipes.refiner import Refiner
from adapterkit.training.diffusion.recipes.unet import StableDiffusion, StableDiffusionXL
from adapterkit.training.loop import train
from adapterkit.training.order import Draw
from adapterkit.training.run import Run
from adapterkit.training.task import Setting
from tests.backends import vision_models
from tests.training import tiny_pipelines
from tests.training.pipeline_steps import own_prediction
from tests.training.test_recipes import make_run

CPU = torch.device("cpu")
NOISY, TIMES = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([300, 700])
PROMPTS = ("one red circle", "two blue")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("words")


@pytest.fixture(scope="module")
def small(words: Path) -> Any:
    torch.manual_seed(0)
    (words / "small").mkdir()
    return vision_models.pipeline(words / "small")


@pytest.fixture(scope="module")
def large(words: Path) -> Any:
    torch.manual_seed(0)
    (words / "large").mkdir()
    return vision_models.pipeline_xl(words / "large")


def test_no_caption_is_what_guidance_of_xl_steers_away_from(large: Any):
    recipe = StableDiffusionXL(large, Options())
    states, against, pooled, pooled_against = large.encode_prompt("one red", device=CPU)
    text = recipe.encode_text(["one red", ""], CPU)
    assert torch.allclose(text["states"], torch.cat([states, against]), atol=1e-6)
    assert torch.allclose(text["pooled"], torch.cat([pooled, pooled_against]), atol=1e-6)
    assert not text["states"][1].any()
    large.register_to_config(force_zeros_for_empty_prompt=False)
    said = recipe.encode_text([""], CPU)["states"]
    large.register_to_config(force_zeros_for_empty_prompt=True)
    assert torch.equal(said, large.encode_prompt("", device=CPU)[0])


def test_samples_begin_in_noise_where_the_schedule_ends_in_it(words: Path):
    (words / "terminal").mkdir()
    pipe = vision_models.pipeline(words / "terminal")
    pipe.scheduler = diffusers.PNDMScheduler(prediction_type="v_prediction", steps_offset=1)
    recipe = StableDiffusion(pipe, Options(zero_terminal_snr=True))
    assert (
        recipe.objective().noisy(NOISY, torch.ones_like(NOISY), torch.tensor([999])).allclose(torch.ones(()), atol=1e-3)
    )
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert pipe.scheduler.alphas_cumprod[-1].item() == pytest.approx(0, abs=1e-6)
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_chunks_are_of_whole_words(small: Any):
    text = "one red circle two blue square " * 4  # a token each; the tokenizer reads 14 and two special ones
    chunks = chunks_of(text, small.tokenizer, 3)
    assert [len(chunk.split()) for chunk in chunks] == [14, 10, 0]
    assert " ".join(chunks).split() == text.split()
    assert chunks_of(text, small.tokenizer, 1) == [" ".join(text.split()[:14])]
    spelt = chunks_of("one " * 12 + "xyz red", small.tokenizer, 2)  # three letters, that do not fit any more
    assert spelt == ["one " * 11 + "one", "xyz red"]


@pytest.mark.parametrize("kind", ["small", "large"])
def test_long_captions_are_encoded_chunk_by_chunk(kind: str, request: pytest.FixtureRequest):
    pipe: Any = request.getfixturevalue(kind)
    recipe = (StableDiffusion if kind == "small" else StableDiffusionXL)(pipe, Options(caption_chunks=2))
    first, second = "one red circle two blue square one red circle two blue square one red", "circle two"
    text = recipe.encode_text([f"{first} {second}", "one red"], CPU)
    given = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    rows = [pipe.encode_prompt(chunk, **given) for chunk in (first, second, "one red", "")]
    expected = torch.cat([torch.cat([rows[0][0], rows[1][0]], 1), torch.cat([rows[2][0], rows[3][0]], 1)])
    assert torch.allclose(text["states"], expected, atol=1e-6)
    assert text["states"].shape[1] == 32
    assert recipe.token_limits()[0][1] == 30
    if kind == "large":
        assert torch.allclose(text["pooled"], torch.cat([rows[0][2], rows[2][2]]), atol=1e-6)
    drawn = [
        recipe.draw(prompt, (16, 16), 2, 3.0, torch.Generator().manual_seed(0)).tobytes()
        for prompt in (f"{first} {second}", first)
    ]
    assert drawn[0] != drawn[1]


def refiner(words: Path, scored: bool = True) -> Any:
    (words / f"refiner{scored}").mkdir()
    unet = vision_models.unet_xl(
        cross_attention_dim=6, projection_class_embeddings_input_dim=4 * (5 if scored else 6) + 6
    )
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=tiny_pipelines.vae(shift_factor=None),
        text_encoder=None,
        text_encoder_2=tiny_pipelines.clip(CLIPTextModelWithProjection, 6),
        tokenizer=None,
        tokenizer_2=vision_models._tokenizer(words / f"refiner{scored}"),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        requires_aesthetics_score=scored,
        add_watermarker=False,
    )


@pytest.mark.parametrize("scored", [True, False])
def test_the_refiner_predicts_as_its_pipeline_does(words: Path, scored: bool):
    torch.manual_seed(0)
    pipe = refiner(words, scored)
    recipe = Refiner(pipe, Options(sample_image="a.png"))
    text = recipe.encode_text(PROMPTS, CPU)
    sizes = torch.tensor([[16, 16, 0, 0, 16, 16]] * 2)
    with torch.no_grad():
        found = recipe.predict(NOISY, TIMES, text, {"sizes": sizes})
    given: dict[str, Any] = {"strength": 1.0, "height": None, "width": None, "latents": None, "original_size": (16, 16)}
    for row, prompt in enumerate(PROMPTS):
        noisy = NOISY[row : row + 1]
        own = own_prediction(
            pipe, prompt, noisy, float(TIMES[row]), (16, 16), image=noisy, target_size=(16, 16), **given
        )
        assert torch.allclose(found[row], own[0], atol=1e-5)


def test_the_refiner_learns_the_last_steps_and_refines_a_picture(words: Path, tmp_path: Path):
    data, targets = tmp_path / "data", "attention@component=unet"
    data.mkdir()
    Image.effect_noise((20, 16), 90).convert("RGB").save(data / "a.png")
    (data / "a.txt").write_text("one red")
    torch.manual_seed(0)
    made = refiner(tmp_path)
    made.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"options\.sample_image: name a picture"):
        train(aimed(make_run(tmp_path / "model", data, tmp_path / "none"), targets), silent=True)
    run = make_run(tmp_path / "model", data, tmp_path / "run", sample_image=str(data / "a.png"), sample_strength=0.9)
    train(aimed(run, targets), silent=True)
    with Image.open(tmp_path / "run/samples/step_000002_p0_s42.png") as picture:
        assert picture.size == (32, 32)
    assert Refiner(made, Options()).objective().times(torch.tensor([0.0, 0.999]), 1).tolist() == [0, 199]
    told = Options(time_range=(0.0, 0.5))
    assert Refiner(made, told).objective().times(torch.tensor([0.999]), 1).tolist() == [499]


def aimed(run: Run, targets: str) -> Run:
    return replace(run, adapter=ak.LoRA(rank=2, targets=targets))


@pytest.mark.parametrize("kind", ["small", "large"])
def test_inpainting_predicts_as_its_pipeline_does(kind: str, request: pytest.FixtureRequest):
    plain: Any = request.getfixturevalue(kind)
    torch.manual_seed(0)
    unet = (vision_models.unet if kind == "small" else vision_models.unet_xl)(in_channels=9)
    cls: Any = {
        "small": diffusers.StableDiffusionInpaintPipeline,
        "large": diffusers.StableDiffusionXLInpaintPipeline,
    }[kind]
    parts = {name: part for name, part in plain.components.items() if name not in ("unet", "safety_checker")}
    options = {"safety_checker": None, "requires_safety_checker": False} if kind == "small" else {}
    pipe = cls(**parts, unet=unet, **options)
    pipe.set_progress_bar_config(disable=True)
    recipe = (Inpainting if kind == "small" else InpaintingXL)(pipe, Options(sample_image="a.png"))
    recipe.check()
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8, :] = 1
    surroundings = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    batch = {
        "sizes": torch.tensor([[16, 16, 0, 0, 16, 16]] * 2),
        "hole": mask[..., ::2, ::2].expand(2, -1, -1, -1),
        "surroundings": surroundings,
    }
    with torch.no_grad():
        found = recipe.predict(NOISY, TIMES, recipe.encode_text(PROMPTS, CPU), batch)
    for row, prompt in enumerate(PROMPTS):
        around = {"masked_image_latents": surroundings[row : row + 1], "image": torch.zeros(1, 3, 16, 16)}
        own = own_prediction(
            pipe, prompt, NOISY[row : row + 1], float(TIMES[row]), (16, 16), mask_image=mask, strength=1.0, **around
        )
        assert torch.allclose(found[row], own[0], atol=1e-5)


def test_inpainting_learns_holes_from_masks(words: Path, small: Any, tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b"):
        Image.effect_noise((32, 32), 90).convert("RGB").save(data / f"{name}.png")
        (data / f"{name}.txt").write_text("one red")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 32, 16))
    mask.save(data / "a.mask.png")
    parts = {name: part for name, part in small.components.items() if name not in ("unet", "safety_checker")}
    torch.manual_seed(0)
    pipe = diffusers.StableDiffusionInpaintPipeline(
        **parts, unet=vision_models.unet(in_channels=9), safety_checker=None, requires_safety_checker=False
    )
    pipe.save_pretrained(tmp_path / "model")
    options = {"sample_image": str(data / "a.png"), "masks": "files", "caption_dropout": 0.0}
    run = aimed(make_run(tmp_path / "model", data, tmp_path / "run", **options), "attention@component=unet")
    train(run, silent=True)
    task: Any = run.make_task()
    model = task.load_model()
    task.survey(None)
    examples = task.prepare(Setting(model, CPU, ak.points(model, adapter=run.adapter)))
    items = [examples[Draw(index, 5)] for index in range(2)]
    assert [float(item["hole"].mean()) for item in items] == [0.5, 1.0]
    assert items[0]["hole"][0, 0].all()
    grey = model.vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist
    spread = (items[1]["surroundings"] / model.vae.config.scaling_factor - grey.mean[0]) / grey.std[0]
    assert 0.8 < spread.std() < 1.2
    batch = task.collate(items)
    with torch.no_grad():
        whole = task.loss(batch)
        assert torch.equal(whole, task.loss({key: value for key, value in batch.items() if key != "mask"}))
    several = make_run(tmp_path / "model", data, tmp_path / "run", **{**options, "masks": "random", "variants": 3})
    task = several.make_task()
    task.load_model()
    examples = task.prepare(Setting(task.pipe, CPU, ak.points(model, adapter=run.adapter)))
    holes = {tuple(examples[Draw(0, seed)]["hole"].flatten().tolist()) for seed in range(30)}
    assert len(holes) == 3
    assert all(0.03 < sum(hole) / len(hole) < 0.6 for hole in holes)


def test_holes_at_random_are_for_inpainting(small: Any, tmp_path: Path):
    (tmp_path / "data").mkdir()
    Image.effect_noise((32, 32), 90).convert("RGB").save(tmp_path / "data/a.png")
    small.save_pretrained(tmp_path / "model")
    run = make_run(tmp_path / "model", tmp_path / "data", tmp_path / "run", masks="random", caption="one")
    with pytest.raises(ConfigError, match="'random' is for inpainting models, and this is a StableDiffusionPipeline"):
        train(aimed(run, "attention@component=unet"), silent=True)
