"""Times, targets and weights against the equations of the papers, in float64."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from torch.distributions import Normal

from adapterkit.errors import ConfigError, UnsupportedModelError
from adapterkit.training.diffusion.losses import per_example, squared
from adapterkit.training.diffusion.objectives.choice import objective_of, scheduled_shift
from adapterkit.training.diffusion.objectives.times import Times, shifted
from adapterkit.training.diffusion.options import ObjectiveOptions

U = torch.linspace(0.001, 0.999, 201, dtype=torch.float64)
FLOW = diffusers.FlowMatchEulerDiscreteScheduler


def ddim(prediction: str = "epsilon", **options: Any) -> Any:
    return diffusers.DDIMScheduler(prediction_type=prediction, **options)


def made(scheduler: Any, **options: Any) -> Any:
    return objective_of(scheduler, ObjectiveOptions(**options), lambda tokens: 1.0)


def test_logit_normal_times_have_their_distribution():
    times = Times("logit_normal", mean=0.4, deviation=1.5)(U)
    assert torch.allclose(Normal(0.4, 1.5).cdf(torch.log(times / (1 - times))), U, atol=1e-6)


def test_mode_times_prefer_the_middle_and_keep_the_ends():
    times = Times("mode", scale=1.0)(U)
    assert torch.allclose(times, 1 - U - (torch.cos(math.pi / 2 * U) ** 2 - 1 + U))
    assert (times.diff() < 0).all()
    assert Times("mode", scale=1.0)(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    middle = ((times > 0.25) & (times < 0.75)).double().mean()
    assert middle > 0.55


def test_a_range_is_a_part_of_all_times():
    times = Times("uniform", low=0.2, high=0.6)(U)
    assert times.min() >= 0.2
    assert times.max() < 0.6
    for kind in ("logit_normal", "mode"):
        part = Times(kind, low=0.2, high=0.6)(U, shift=3.0)
        whole = Times(kind)(torch.linspace(0, 1, 200_001, dtype=torch.float64), shift=3.0)
        kept = whole[(whole > 0.2) & (whole < 0.6)].sort().values
        assert ((part > 0.2) & (part < 0.6)).all()
        places = (U * (len(kept) - 1)).long()
        assert torch.allclose(part.sort().values, kept[places], atol=1e-3)
    steps = made(ddim(), time_range=(0.0, 0.2)).times(torch.rand(500, generator=torch.Generator().manual_seed(0)), 1)
    assert 190 < steps.max() < 200


@pytest.mark.parametrize("value", [(0.5, 0.5), (0.6, 0.2), (0.0, 1.1)])
def test_a_range_must_rise(value: tuple[float, float]):
    with pytest.raises(ValueError, match="the smaller one first"):
        ObjectiveOptions(time_range=value)


def test_one_step_with_the_target_for_a_prediction_gives_back_the_latents():
    """diffusers' own scheduler says which sign and scale a velocity has."""
    scheduler, flow = FLOW(), made(FLOW())
    latents, noise = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(3)).unbind(0)
    times = torch.tensor([0.37])
    noisy, target = flow.noisy(latents, noise, times), flow.target(latents, noise, times)
    scheduler.set_timesteps(sigmas=[0.37])
    assert scheduler.timesteps.item() == pytest.approx(370.0)
    assert torch.allclose(scheduler.step(target, scheduler.timesteps[0], noisy).prev_sample, latents, atol=1e-6)


def test_times_are_shifted_as_the_scheduler_shifts_them():
    sigmas = torch.linspace(1, 0.1, 10)
    for options, tokens in (({"shift": 3.0}, 64), ({"use_dynamic_shifting": True}, 1024)):
        scheduler = FLOW(**options)
        shift = scheduled_shift(scheduler.config, tokens)
        m = (1.15 - 0.5) / (4096 - 256)
        mu = {} if "shift" in options else {"mu": 0.5 + m * (tokens - 256)}
        scheduler.set_timesteps(sigmas=sigmas.tolist(), **mu)
        assert torch.allclose(scheduler.sigmas[:-1], shifted(sigmas, shift), atol=1e-6)
    linear = FLOW(use_dynamic_shifting=True, time_shift_type="linear")
    assert scheduled_shift(linear.config, 4096) == pytest.approx(1.15)
    multistep = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    assert scheduled_shift(multistep.config, 64) == 5.0


def test_flow_matching_is_logit_normal_and_shifted_unless_told():
    u = torch.tensor([0.25, 0.5, 0.75])
    scheduler = FLOW(shift=3.0)
    objective = objective_of(scheduler, ObjectiveOptions(), lambda tokens: scheduled_shift(scheduler.config, tokens))
    plain = torch.sigmoid(Normal(0.0, 1.0).icdf(u))
    assert torch.allclose(objective.times(u, 16), 3 * plain / (1 + 2 * plain), atol=1e-6)
    assert torch.allclose(made(FLOW(), time_sampling="uniform", time_shift=2.0).times(u, 16), 2 * u / (1 + u))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_weights_by_the_signal_to_noise_ratio(prediction: str):
    times = torch.tensor([0, 10, 300, 999])
    kept = torch.cumprod(1 - ddim().betas.double(), 0)[times]
    ratio = kept / (1 - kept)
    # min(snr, 5) / snr and / (snr + 1): Hang et al., section 3.4; the picture itself is the unit.
    over = {"epsilon": ratio, "v_prediction": ratio + 1, "sample": torch.ones(4).double()}[prediction]
    bounded = made(ddim(prediction), loss_weighting="min_snr").weights(times)
    assert torch.allclose(bounded.double(), ratio.clamp(max=5) / over, rtol=1e-3)
    debiased = made(ddim(prediction), loss_weighting="debiased").weights(times)
    assert torch.allclose(debiased.double(), ratio.sqrt() / over, rtol=1e-3)
    assert made(ddim(prediction)).weights(times).tolist() == [1.0] * 4


def test_weights_of_flow_matching():
    times = torch.tensor([0.1, 0.5, 0.9])
    cosmap = made(FLOW(), loss_weighting="cosmap").weights(times)
    assert cosmap.tolist() == pytest.approx([2 / (math.pi * (1 - 2 * t + 2 * t * t)) for t in (0.1, 0.5, 0.9)])
    assert made(FLOW(), loss_weighting="sigma_sqrt").weights(times).tolist() == pytest.approx([100, 4, 1 / 0.81])


def test_the_schedule_ends_in_noise_where_that_is_asked_for():
    objective = made(ddim("v_prediction"), zero_terminal_snr=True, loss_weighting="min_snr")
    last, latents = torch.tensor([999]), torch.full((1, 1, 1, 1), 100.0)
    noise = torch.ones(1, 1, 1, 1)
    assert objective.noisy(latents, noise, last).item() == pytest.approx(1.0, abs=1e-3)
    assert objective.target(latents, noise, last).item() == pytest.approx(-100.0)
    assert objective.weights(last).item() == pytest.approx(0.0, abs=1e-6)
    assert made(ddim("v_prediction")).noisy(latents, noise, last).item() > 1.5


@pytest.mark.parametrize(
    ("scheduler", "options", "match"),
    [
        (ddim(), {"zero_terminal_snr": True}, "predicts noise"),
        (ddim(), {"loss_weighting": "cosmap"}, "choose min_snr, debiased"),
        (ddim(), {"time_shift": 2.0}, "is for flow matching"),
        (FLOW(), {"loss_weighting": "min_snr"}, "choose none, cosmap, sigma_sqrt"),
        (FLOW(), {"zero_terminal_snr": True}, "always ends in noise"),
    ],
)
def test_what_does_not_fit_the_scheduler_is_named(scheduler: Any, options: dict[str, Any], match: str):
    with pytest.raises(ConfigError, match=match):
        made(scheduler, **options)


def test_a_scheduler_that_predicts_something_else_is_refused():
    with pytest.raises(UnsupportedModelError, match="'strange'; this task trains 'epsilon'"):
        made(ddim("strange"))


def test_the_pseudo_huber_error_is_a_square_and_then_a_line():
    error = torch.tensor([1e-3, 0.5, 100.0], dtype=torch.float64)
    found = squared(error, torch.zeros(3), 0.1)
    assert found.tolist() == pytest.approx([2 * 0.1 * ((e * e + 0.01) ** 0.5 - 0.1) for e in error.tolist()])
    assert found[0].item() == pytest.approx(1e-6, rel=1e-3)
    assert found[2].item() == pytest.approx(2 * 0.1 * 100, rel=1e-2)
    assert squared(error, torch.ones(3)).tolist() == pytest.approx([(e - 1) ** 2 for e in error.tolist()])


def test_the_mean_under_a_mask_is_that_of_what_counts():
    error = torch.arange(32.0).view(2, 2, 2, 4)
    mask = torch.zeros(2, 1, 4, 8)
    mask[0, :, :2, :2] = 1  # the first pixel of the latents
    mask[1, :, 2:, 6:] = 0.5  # half of the last one counts as much as all of it: it is alone
    assert per_example(error, mask).tolist() == pytest.approx([(0 + 8) / 2, (23 + 31) / 2])
    assert per_example(error).tolist() == pytest.approx([7.5, 23.5])
    assert per_example(error, torch.zeros(2, 1, 2, 4)).tolist() == [0.0, 0.0]
    video = error.view(2, 2, 1, 2, 4).expand(2, 2, 3, 2, 4)
    assert per_example(video, mask).tolist() == pytest.approx([4.0, 27.0])
