from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import adapterkit as ak
from adapterkit.errors import ConfigError, DataError, UnsupportedModelError
from adapterkit.training.diffusion import texts as embeddings
from adapterkit.training.diffusion.objectives.noise import NoiseObjective
from adapterkit.training.diffusion.recipes.unet import StableDiffusion
from adapterkit.training.diffusion.task import DiffusionTask
from adapterkit.training.image_files import open_image
from adapterkit.training.loading import ModelNotFoundError
from adapterkit.training.loop import train
from adapterkit.training.order import Draw
from adapterkit.training.pictures.dataset import Pictures
from adapterkit.training.run import Run, load_run
from adapterkit.training.task import Setting
from tests.backends.vision_models import CONTEXT, pipeline, unet_xl

CAPTIONS = ("one red circle", "two blue square", "one blue circle")
UNET = "attention@component=unet"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "words").mkdir()
    torch.manual_seed(0)
    pipeline(folder / "words").save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number, caption in enumerate(CAPTIONS):
        picture = Image.effect_noise((20 + number, 16), 90).convert("RGB")
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


def make_run(base: Path, data: Path, output: Path, *overrides: str, targets: str = UNET, **options: Any) -> Run:
    values: dict[str, Any] = {
        "task": "diffusion",
        "model": str(base),
        "data": str(data),
        "output": str(output),
        "adapter": {"type": "lora", "rank": 2, "targets": targets, "dropout": 0.1},
        "options": {"sample_steps": 2, "prompts": ["one red"], **options},
        "steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "checkpoint_every": 2,
        "export": [],
        "strengths": [],
    }
    return load_run(None, overrides, **{key: value for key, value in values.items() if not _given(key, overrides)})


def _given(key: str, overrides: tuple[str, ...]) -> bool:
    return any(override.startswith(f"{key}=") for override in overrides)


def prepared(run: Run) -> tuple[DiffusionTask, Pictures]:
    task: Any = run.make_task()
    model = task.load_model()
    return task, task.prepare(Setting(model, torch.device("cpu"), ak.points(model, adapter=run.adapter)))


def test_a_run_makes_samples_before_and_after_and_a_grid(base: Path, data: Path, tmp_path: Path):
    result = train(make_run(base, data, tmp_path / "run", "sample_every=2"), silent=True)
    names = sorted(path.name for path in (tmp_path / "run/samples").iterdir())
    assert names == ["grid.png", *(f"step_{step:06d}_p0_s42.png" for step in (0, 2, 4))]
    assert result.figures["grid"] == str(tmp_path / "run/samples/grid.png")


def test_step_0_is_the_base_and_the_last_sample_is_what_a_fresh_pipeline_makes(base: Path, data: Path, tmp_path: Path):
    run = make_run(base, data, tmp_path / "run", resolution=16, guidance_scale=3.0)
    train(run, silent=True)
    fresh: Any = StableDiffusionPipeline.from_pretrained(base)
    adapters = ak.Adapters(fresh)
    adapters.load(tmp_path / "run/adapter.safetensors", "style")

    def drawn() -> bytes:
        generator = torch.Generator().manual_seed(42)
        options = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0}
        return fresh("one red", generator=generator, **options).images[0].tobytes()

    def sampled(step: int) -> bytes:
        with Image.open(tmp_path / f"run/samples/step_{step:06d}_p0_s42.png") as image:
            return image.tobytes()

    assert sampled(0) == drawn()
    adapters.activate("style")
    assert sampled(4) == drawn() != sampled(0)


@pytest.mark.parametrize("targets", [UNET, "attention"])
def test_resume_is_bitwise_with_and_without_a_text_encoder_that_trains(
    base: Path, data: Path, tmp_path: Path, targets: str
):
    train(make_run(base, data, tmp_path / "whole", targets=targets), silent=True)
    train(make_run(base, data, tmp_path / "parts", "steps=2", targets=targets), silent=True)
    train(make_run(base, data, tmp_path / "parts", targets=targets), resume=True, silent=True)
    one, other = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    text = [key for key in one if "@text_encoder." in key and key.endswith("/B")]
    assert bool(text) == (targets == "attention")
    assert all(one[key].abs().max() > 0 for key in text)


def test_cached_embeddings_are_what_the_pipeline_encodes(base: Path, data: Path, tmp_path: Path):
    cached, _ = prepared(make_run(base, data, tmp_path))
    live, _ = prepared(make_run(base, data, tmp_path, targets="attention"))
    assert not cached.texts.live
    assert live.texts.live
    for texts in ([CAPTIONS[0], CAPTIONS[2]], ["", CAPTIONS[1]]):
        ids = cached.pipe.tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids
        expected = cached.pipe.text_encoder(ids)[0]
        assert torch.allclose(cached.texts(texts)["states"], expected, atol=1e-6)
        assert torch.allclose(live.texts(texts)["states"], expected, atol=1e-6)


def test_latents_are_the_vaes_scaled_and_mirrored_ones_too(base: Path, data: Path, tmp_path: Path):
    task, images = prepared(make_run(base, data, tmp_path, flip=True, buckets=False))
    with Image.open(data / "1.png") as file:
        left = (21 - 16) / 2
        cut = file.resize((16, 16), Image.Resampling.LANCZOS, box=(left, 0, left + 16, 16))
        pixels = torch.tensor(list(cut.tobytes())).view(16, 16, 3).permute(2, 0, 1)[None] / 127.5 - 1
    shots = images.examples[1].shots
    assert [shot.look.mirrored for shot in shots] == [False, True]
    for shot, picture in zip(shots, (pixels, pixels.flip(-1)), strict=True):
        with torch.no_grad():
            posterior = task.pipe.vae.encode(picture).latent_dist
        scale, entry = task.pipe.vae.config.scaling_factor, images.latents.get(shot)
        assert torch.allclose(entry["mean"], posterior.mean[0] * scale, atol=1e-5)
        assert torch.allclose(entry["spread"], posterior.std[0] * scale, atol=1e-5)


def test_an_example_follows_from_its_draw(base: Path, data: Path, tmp_path: Path):
    task, images = prepared(make_run(base, data, tmp_path, caption_dropout=0.5, flip=True))
    assert all(torch.equal(images[Draw(1, 7)][k], images[Draw(1, 7)][k]) for k in ("latents", "noise", "u"))
    many = [images[Draw(0, seed)] for seed in range(400)]
    assert {item["caption"] for item in many} == {CAPTIONS[0], ""}
    assert 140 < sum(item["caption"] == "" for item in many) < 260
    times = task.learning.objective.times(torch.stack([item["u"] for item in many]), 64)
    assert times.min() < 30
    assert 970 < times.max() < 1000
    assert task.learning.objective.times(torch.tensor([0.0, 0.9999999]), 64).tolist() == [0, 999]
    noise = torch.stack([item["noise"] for item in many])
    assert noise.mean().abs() < 0.02
    assert abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_that_of_the_schedulers_prediction(base: Path, data: Path, tmp_path: Path, prediction: str):
    model = tmp_path / "model"
    shutil.copytree(base, model)
    config = model / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', f'"{prediction}"'))
    task, images = prepared(make_run(model, data, tmp_path / "run"))
    batch = task.collate([images[Draw(i, 10 + i)] for i in range(3)])
    times, objective = (batch["u"] * 1000).long(), NoiseObjective(task.pipe.scheduler)
    alphas = torch.cumprod(1 - objective.schedule.betas.double(), 0)[times].view(-1, 1, 1, 1)
    latents, noise = batch["latents"].double(), batch["noise"].double()
    noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    target = {
        "epsilon": noise,
        "v_prediction": alphas.sqrt() * noise - (1 - alphas).sqrt() * latents,
        "sample": latents,
    }[prediction]
    with torch.no_grad():
        states = task.texts(batch["caption"])["states"]
        found = task.pipe.unet(noisy.float(), times, states).sample
        assert task.loss(batch).item() == pytest.approx(F.mse_loss(found.double(), target).item(), rel=1e-4)


def test_gradient_checkpointing_gives_the_same_adapter(base: Path, data: Path, tmp_path: Path):
    for name, value in (("plain", "false"), ("saving", "true")):
        overrides = (f"gradient_checkpointing={value}", "adapter={type: lora, rank: 2, targets: attention}")
        train(make_run(base, data, tmp_path / name, *overrides), silent=True)
    one, other = (load_file(tmp_path / name / "adapter.safetensors") for name in ("plain", "saving"))
    assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)


def test_a_half_precision_base_keeps_a_float32_adapter(base: Path, data: Path, tmp_path: Path):
    result = train(make_run(base, data, tmp_path / "run", "dtype=bfloat16"), silent=True)
    assert result.loss < 10
    assert {t.dtype for t in load_file(tmp_path / "run/adapter.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["prefix", "bottleneck"])
def test_other_adapter_types(base: Path, data: Path, tmp_path: Path, kind: str):
    train(make_run(base, data, tmp_path / "run", f"adapter={{type: {kind}}}", "steps=1"), silent=True)
    assert (tmp_path / "run/adapter.safetensors").exists()


def test_sdxl_with_its_two_encoders_and_its_sizes(data: Path, tmp_path: Path):
    made = pipeline_xl(tmp_path)
    made.save_pretrained(tmp_path / "model")
    for name, targets in (("unet", UNET), ("all", "attention")):
        train(make_run(tmp_path / "model", data, tmp_path / name, targets=targets), silent=True)
        weights = load_file(tmp_path / name / "adapter.safetensors")
        moved = {key.partition("@")[2].partition(".")[0] for key, t in weights.items() if "/B" in key and t.any()}
        assert moved == ({"unet"} if name == "unet" else {"unet", "text_encoder", "text_encoder_2"})
    # The pipeline reads the last layer but one of its encoders, so the last layer's adapter never gets a gradient.
    train(make_run(tmp_path / "model", data, tmp_path / "parts", "steps=2", targets="attention"), silent=True)
    train(make_run(tmp_path / "model", data, tmp_path / "parts", targets="attention"), resume=True, silent=True)
    resumed = load_file(tmp_path / "parts/adapter.safetensors")
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)
    task, images = prepared(make_run(tmp_path / "model", data, tmp_path / "run"))
    batch = task.collate([images[Draw(i, i)] for i in range(2)])
    states, _, pooled, _ = made.encode_prompt(batch["caption"], device="cpu", do_classifier_free_guidance=False)
    sizes = torch.tensor([[16, 20, 0, 0, 14, 18], [16, 21, 0, 0, 14, 18]])
    times, objective = (batch["u"] * 1000).long(), NoiseObjective(task.pipe.scheduler)
    noisy = objective.schedule.add_noise(batch["latents"], batch["noise"], times)
    with torch.no_grad():
        added = {"text_embeds": pooled, "time_ids": sizes}
        found = made.unet(noisy, times, states, added_cond_kwargs=added).sample
        assert task.loss(batch).item() == pytest.approx(F.mse_loss(found, batch["noise"]).item(), rel=1e-5)


def pipeline_xl(folder: Path) -> Any:
    """A tiny SDXL pipeline: the parts of the small one, with a second text encoder and SDXL's UNet."""
    (folder / "words").mkdir()
    small = pipeline(folder / "words")
    sizes = {"vocab_size": small.text_encoder.config.vocab_size, "hidden_size": 6, "intermediate_size": 8}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
    ends = {"bos_token_id": sizes["vocab_size"] - 2, "eos_token_id": sizes["vocab_size"] - 1, "pad_token_id": 1}
    config = CLIPTextConfig(**sizes, **layers, **ends, projection_dim=CONTEXT)
    made = StableDiffusionXLPipeline(
        vae=small.vae,
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer,
        unet=unet_xl(),
        scheduler=small.scheduler,
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def test_without_prompts_the_first_four_different_captions_are_drawn(base: Path, data: Path, tmp_path: Path):
    task, _ = prepared(make_run(base, data, tmp_path, prompts=[]))
    assert sorted(one.prompt for one in task.samples()) == sorted(CAPTIONS)
    task.captions = ["b", "a", "b", "c", "d", "e"]
    assert [one.prompt for one in task.samples()] == ["b", "a", "c", "d"]
    given, _ = prepared(make_run(base, data, tmp_path, prompts=["one", "one"]))
    assert [one.prompt for one in given.samples()] == ["one", "one"]


def test_images_need_not_be_square(base: Path, data: Path, tmp_path: Path):
    run = make_run(base, data, tmp_path / "run", "steps=1", resolution=[16, 24])
    _, images = prepared(run)
    assert images[Draw(0, 0)]["latents"].shape[-2:] == (8, 12)
    train(run, silent=True)
    with Image.open(tmp_path / "run/samples/step_000001_p0_s42.png") as image:
        assert image.size == (24, 16)
    wide = tmp_path / "wide"
    shutil.copytree(base, wide)
    config = wide / "unet/config.json"
    config.write_text(config.read_text().replace('"sample_size": 8', '"sample_size": [8, 12]'))
    assert prepared(make_run(wide, data, tmp_path / "run", buckets=False))[1][Draw(0, 0)]["latents"].shape[-2:] == (
        8,
        12,
    )
    config.write_text(config.read_text().replace('"sample_size": [8, 12]', '"sample_size": null'))
    with pytest.raises(ConfigError, match=r"options\.resolution: give one"):
        train(make_run(wide, data, tmp_path / "other"), silent=True)


def test_an_autoencoder_that_overflows_is_widened_once_for_all_pictures(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    casts: list[Any] = []
    cast = torch.nn.Module.to

    def watched(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        casts.extend(arg for arg in args if isinstance(arg, torch.dtype))
        return cast(module, *args, **kwargs)

    run = make_run(base, data, tmp_path, "dtype=bfloat16")
    task: Any = run.make_task()
    model = task.load_model()
    monkeypatch.setattr(torch.nn.Module, "to", watched)
    images = task.prepare(Setting(model, torch.device("cpu"), ak.points(model, adapter=run.adapter)))
    assert casts == [torch.float32, torch.bfloat16]
    assert model.vae.dtype == torch.bfloat16
    shot = images.examples[0].shots[0]
    pixels = shot.look.of(open_image(shot.picture.path))[None] * 2 - 1
    with torch.no_grad():
        expected = cast(model.vae, torch.float32).encode(pixels).latent_dist.mean[0] * model.vae.config.scaling_factor
    assert torch.allclose(images.latents.get(shot)["mean"], expected, atol=1e-6)


def test_pictures_keep_their_shapes_in_buckets(base: Path, data: Path, tmp_path: Path):
    """Batches are of one size, the denoiser sees sizes of one area, and a resumed run is the same."""
    folder = tmp_path / "shapes"
    shutil.copytree(data, folder)
    Image.effect_noise((64, 16), 90).convert("RGB").save(folder / "0.png")
    Image.effect_noise((16, 16), 90).convert("RGB").save(folder / "1.png")
    _, images = prepared(make_run(base, folder, tmp_path / "run"))
    shapes = [tuple(images[Draw(index, 0)]["latents"].shape[-2:]) for index in range(3)]
    assert shapes == [(4, 16), (8, 8), (7, 9)]
    train(make_run(base, folder, tmp_path / "whole", "steps=2"), silent=True)
    train(make_run(base, folder, tmp_path / "parts", "steps=1"), silent=True)
    train(make_run(base, folder, tmp_path / "parts", "steps=2"), resume=True, silent=True)
    one, other = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_cache_holds_what_is_computed_and_nothing_is_encoded_twice(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encoded: list[str] = []
    pictures, text = StableDiffusion.encode_pictures, StableDiffusion.encode_text

    def watched_pictures(recipe: StableDiffusion, given: torch.Tensor) -> Any:
        encoded.append("picture")
        return pictures(recipe, given)

    def watched_text(recipe: StableDiffusion, given: Any, device: torch.device) -> Any:
        encoded.append("text")
        return text(recipe, given, device)

    monkeypatch.setattr(StableDiffusion, "encode_pictures", watched_pictures)
    monkeypatch.setattr(StableDiffusion, "encode_text", watched_text)
    found = []
    for cache in (None, "cache", "cache"):
        task, images = prepared(make_run(base, data, tmp_path, cache=cache and str(tmp_path / cache)))
        item = images[Draw(1, 7)]
        found.append((item["latents"], task.texts([item["caption"]])["states"], sorted(encoded)))
        encoded.clear()
    assert [count for *_, count in found] == [["picture"] * 3 + ["text"] * 4] * 2 + [[]]
    assert all(torch.equal(found[0][part], other[part]) for other in found[1:] for part in (0, 1))
    next(task.pipe.text_encoder.parameters()).data += 1
    changed, _ = prepared(make_run(base, data, tmp_path, cache=str(tmp_path / "cache")))
    assert changed.texts.kept.model == task.texts.kept.model
    assert task._identity(task.pipe.text_encoder) != task.texts.kept.model


def test_a_prior_is_no_caption_of_what_is_learnt(base: Path, data: Path, tmp_path: Path):
    (tmp_path / "both").mkdir()
    for name in ("mine", "others"):
        shutil.copytree(data, tmp_path / "both" / name)
    concepts = [{"folder": "mine", "trigger": "sks"}, {"folder": "others", "prior": True, "weight": 0.5}]
    task, images = prepared(make_run(base, tmp_path / "both", tmp_path / "run", prompts=[], concepts=concepts))
    assert len(images) == 6
    assert [one.prompt for one in task.samples()] == [f"sks, {caption}" for caption in CAPTIONS]
    assert list(task.triggers()) == ["sks"]
    assert sorted(json.loads(task.metadata()["ss_tag_frequency"])) == ["mine"]


def test_the_base_makes_the_pictures_of_a_prior_that_are_lacking(base: Path, data: Path, tmp_path: Path):
    shutil.copytree(data, tmp_path / "all/mine")
    prior = {"folder": "some/blue", "prior": True, "generate": 3, "caption": "two blue square"}
    values: dict[str, Any] = {"concepts": [{"folder": "mine"}, prior], "guidance_scale": 3.0}
    task, images = prepared(make_run(base, tmp_path / "all", tmp_path / "run", **values))
    folder = tmp_path / "all/some/blue"
    assert sorted(path.name for path in folder.iterdir()) == [f"base_00000{seed}.png" for seed in range(3)]
    items = [images[Draw(index, 0)] for index in range(len(images))]
    assert [item["prior"] for item in items] == [False] * 3 + [True] * 3
    assert {e.picture.caption for e in images.examples[3:]} == {"two blue square"}
    drawn = task.pipe("two blue square", height=16, width=16, num_inference_steps=2, guidance_scale=3.0,
                      generator=torch.Generator().manual_seed(1)).images[0]  # fmt: skip
    with Image.open(folder / "base_000001.png") as made:
        assert made.tobytes() == drawn.tobytes()
    (folder / "base_000001.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    prepared(make_run(base, tmp_path / "all", tmp_path / "run", **values))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with Image.open(folder / "base_000001.png") as made:
        assert made.tobytes() == drawn.tobytes()
    (folder / "base_000001.png").unlink()
    for steps in (1, 2):  # what the base adds is no change of the data
        run = make_run(base, tmp_path / "all", tmp_path / "run", f"steps={steps}", **values)
        train(run, resume=True, silent=True)
    assert json.loads((tmp_path / "run/data.json").read_text())["files"].keys() == {
        f"mine/{n}.{e}" for n in range(3) for e in ("png", "txt")
    }


def test_embeddings_of_a_few_captions_are_kept(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train(make_run(base, data, tmp_path / "all", "mixed_precision=bf16"), silent=True)
    monkeypatch.setattr(embeddings, "_KEPT", 1)
    train(make_run(base, data, tmp_path / "few", "mixed_precision=bf16"), silent=True)
    one, other = (load_file(tmp_path / name / "adapter.safetensors") for name in ("all", "few"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_captions_that_are_cut_are_told(base: Path, data: Path, tmp_path: Path):
    folder = tmp_path / "long"
    shutil.copytree(data, folder)
    (folder / "1.txt").write_text("one red circle " * 10)
    (folder / "2.txt").write_text("")
    task: Any = make_run(base, folder, tmp_path / "run").make_task()
    assert task.survey(None).notes == ["empty caption: 1 (2.txt)"]
    model, told = task.load_model(), []
    task.prepare(Setting(model, torch.device("cpu"), ak.points(model), told.append))
    assert told[:1] == ["data: captions cut to the 16 tokens that the text encoder reads: 1 (1.png, 32 tokens)"]


def test_what_cannot_be_trained_is_named(base: Path, data: Path, tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match="there is no such folder"):
        train(make_run(tmp_path / "absent", data, tmp_path / "run"), silent=True)
    with pytest.raises(ConfigError, match="multiple of 2, not 15"):
        train(make_run(base, data, tmp_path / "run", resolution=15), silent=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        train(make_run(base, tmp_path / "empty", tmp_path / "run"), silent=True)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    index = other / "model_index.json"
    index.write_text(index.read_text().replace('"unet"', '"transformer"'))
    with pytest.raises(UnsupportedModelError, match=r"without unet; .*StableDiffusionXLPipeline"):
        train(make_run(other, data, tmp_path / "run"), silent=True)
    assert not (tmp_path / "run").exists()
