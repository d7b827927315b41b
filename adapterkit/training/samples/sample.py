"""What one sample is made from."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapterkit.training.sizes import Size


@dataclass(frozen=True)
class Sample:
    """What one sample is made from. What is None is left to the task's options.

    Attributes:
        prompt: What it begins with, or shows.
        seed: Decides everything that is random about it.
        negative: What it should not show.
        size: Height and width of a picture, in pixels.
        steps: Denoising steps.
        guidance: How strongly the prompt is followed.
        weight: How strongly the adapter acts; the loop sees to it.
        number: That of its prompt, which files are named by.
        where: Of a file of prompts, which of it; for errors.
    """

    prompt: str
    seed: int = 42
    negative: str | None = None
    size: Size | None = None
    steps: int | None = None
    guidance: float | None = None
    weight: float | None = None
    number: int = 0
    where: str = field(default="", compare=False, repr=False)

    @property
    def label(self) -> str:
        """The sample in a line for people: the prompt, the seed and what else it says."""
        size = "" if self.size is None else f"{self.size[0]}x{self.size[1]}"
        rest = {"negative": self.negative, "steps": self.steps, "guidance": self.guidance, "weight": self.weight}
        told = [f"{name} {value}" for name, value in rest.items() if value is not None]
        return f"{self.prompt} ({', '.join([f'seed {self.seed}', *filter(None, [size]), *told])})"

    @property
    def stem(self) -> str:
        """What files of it are called, after what they show: `p0_s42`."""
        return f"p{self.number}_s{self.seed}"


def sample_name(step: int, sample: Sample, suffix: str) -> str:
    """The file of a sample of one step: `step_000250_p0_s42.png`."""
    return f"step_{step:06d}_{sample.stem}{suffix}"
