"""What a run is: a YAML file and `key=value` overrides, checked as a whole before anything is loaded.

Precedence: default < file < override. Every problem is reported at once, with the key's path.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from adapterkit.errors import CheckpointError, ConfigError, shown
from adapterkit.formats.files import open_plain
from adapterkit.plugins import get_plugin_manager
from adapterkit.training import yaml_values
from adapterkit.training.hints import hint, paths_of

Seed = Annotated[int, Field(ge=0, lt=2**63)]
_MOST_BYTES = 1 << 20
_RECORDED = ("adapterkit", "torch", "accelerate", "transformers", "diffusers", "timm", "safetensors", "numpy")


class Section(BaseModel):
    """A group of keys: unknown ones are errors, and a value is never converted to another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class WholeSentenceError(ValueError):
    """What is wrong with a value, in words that need not end with the value."""


class Rate(Section):
    """Points that learn otherwise. The schedule, and the rates that adapter types ask for, multiply these too.

    Attributes:
        select: A selector, such as `@component=text_encoder` or `attn.*@layer>=8`.
        learning_rate: Theirs in the place of the run's.
        weight_decay: Theirs in the place of the run's.
    """

    select: str
    learning_rate: float | None = Field(None, gt=0)
    weight_decay: float | None = Field(None, ge=0)


class CardKeys(Section):
    """The keys under `card`: what exported files and the model card tell people.

    Attributes:
        title: What the adapter is called; the run folder's name by default.
        trigger: The words that call what was learnt; by default those that the task knows.
        description, author, license, tags, usage_hint: As they stand there.
        thumbnail: Whether files for the UIs hold a small picture of the first sample.
    """

    title: str = ""
    trigger: str = ""
    description: str = ""
    author: str = ""
    license: str = ""
    tags: str = ""
    usage_hint: str = ""
    thumbnail: bool = True


class Best(Section):
    """Which evaluation is the best.

    Attributes:
        figure: What the task measures, such as `accuracy`.
        mode: Whether less or more of it is better; by default as the task knows.
    """

    figure: str
    mode: Literal["min", "max"] | None = None


class Compile(Section):
    """For `torch.compile`.

    Attributes:
        backend: What compiles.
        mode: What is traded for what; by default as the backend has it.
        dynamic: Whether shapes change from batch to batch; by default torch finds out.
        fullgraph: Whether what cannot be compiled is an error.
    """

    backend: str = "inductor"
    mode: str | None = None
    dynamic: bool | None = None
    fullgraph: bool = False


def _named(value: object) -> object:
    return {"figure": value} if isinstance(value, str) else value


def _switched(value: object) -> object:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class RunConfig(Section):
    """The keys of a run file. Paths are relative to the working directory.

    Attributes:
        task: What to train on: the name of a task, see `options`.
        model: A folder, a hub id, or `timm:NAME`.
        data: The training data, as the task reads it.
        output: The run folder that is made.
        adapter: `type`, and that type's own fields.
        adapter_name: The adapter's name on the model.
        options: The task's own keys.
        init_from: A file of an adapter, of any format that is read, whose values a new run begins with.
        steps: Optimizer steps.
        epochs: How often every example is seen, in the place of `steps`.
        batch_size: Examples per process and forward pass.
        gradient_accumulation: Forward passes per optimizer step.
        optimizer: What changes the parameters: a name, or `type` and its own keys.
        learning_rate: The optimizer's, after warm-up; by default what is usual with it.
        scheduler: How the rate goes on after the warm-up: a name, or `type` and its own keys.
        warmup_steps: Steps in which the rate rises linearly from zero.
        weight_decay: The optimizer's.
        rates: Other learning rates and weight decays for some points; of several that select one, the last counts.
        layer_decay: Multiplies the rates once for each block that lies between a point and the head, such as 0.75.
        ema: Decay of a running average of the adapter, which samples, figures and files are then of; None for none.
        max_grad_norm: The gradient is scaled down to this norm; None leaves it.
        mixed_precision: What the forward pass computes in; the adapter stays in float32.
        dtype: What the base model's weights are kept in.
        gradient_checkpointing: Recompute activations in the backward pass, which saves memory.
        block_swap: How many of the model's last blocks keep their frozen weights on the host, and have them on the
            device only while they compute; they recompute their activations in the backward pass.
        torch_compile: Compile the parts that the adapter acts in: true, or settings of its own.
        shard: Spread the frozen base over the processes, by FSDP2 of torch, where it is too large for each.
        seed: Fixes the data's order, the adapter's initial values, dropout and noise.
        checkpoint_every: Steps between checkpoints; None saves one only when the run is interrupted.
        keep_checkpoints: How many checkpoints are kept; older ones are deleted.
        sample_every: Steps between samples and evaluations; None makes them before and after the training.
        samples: Whether samples are made at all; figures are measured all the same.
        strengths: The adapter's weights that a last row of samples shows side by side; `[]` makes none.
        export: Formats that the adapter is written in at the end, beside its own, each read back and compared: such as
            `[kohya, diffusers]`; None leaves it to the task, `[]` writes none.
        export_dtype: What numbers are written as in those files, so that they are half as large; as trained by default.
        bake: Write the model with the adapter in its weights too, into `model/` of the run folder, as its own library
            reads it; the task has to know how.
        card: What those files and the model card tell people.
        evaluate_every: Steps between evaluations; None makes them with the samples.
        best: The figure by which the best evaluation is known, whose adapter the run ends with; None for the last step.
        early_stop: Evaluations without a better one after which the run ends.
        trackers: TensorBoard (`tensorboard`), `wandb`, `trackio`, ...: names, or `type` and settings of their own.
        callbacks: Further ones of plug-ins: names, or `type` and their own keys.
        log_every: Steps between lines of progress where there is no terminal.
        num_workers: Processes that read data, to train on and to measure with; 0 reads in the training process.
        versions: Written into the resolved file, for the record; ignored when read.
    """

    task: str
    model: str
    data: str
    output: str
    adapter: dict[str, Any]
    adapter_name: str = "adapter"
    options: dict[str, Any] = {}
    init_from: str | None = None
    steps: int = Field(1000, gt=0)
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(1, gt=0, le=1 << 20)
    gradient_accumulation: int = Field(1, gt=0, le=1 << 20)
    optimizer: str | dict[str, Any] = "adamw"
    learning_rate: float | None = Field(None, gt=0)
    scheduler: str | dict[str, Any] = "constant"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    rates: list[Rate] = []
    layer_decay: float | None = Field(None, gt=0, le=1)
    ema: float | None = Field(None, gt=0, lt=1)
    max_grad_norm: float | None = Field(1.0, gt=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    block_swap: int = Field(0, ge=0)
    torch_compile: Annotated[Compile | None, BeforeValidator(_switched)] = None
    shard: bool = False
    seed: Seed = 0
    checkpoint_every: int | None = Field(500, gt=0)
    keep_checkpoints: int = Field(2, gt=0)
    sample_every: int | None = Field(None, gt=0)
    samples: bool = True
    strengths: list[float] = [0, 0.5, 0.75, 1, 1.25]
    export: list[str] | None = None
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    bake: bool = False
    card: CardKeys = CardKeys()
    evaluate_every: int | None = Field(None, gt=0)
    best: Annotated[Best | None, BeforeValidator(_named)] = None
    early_stop: int | None = Field(None, gt=0)
    trackers: list[str | dict[str, Any]] = []
    callbacks: list[str | dict[str, Any]] = []
    log_every: int = Field(10, gt=0)
    num_workers: int = Field(0, ge=0)
    versions: dict[str, str] = Field({}, repr=False)


# Keys that may differ when a run is continued: they do not change what a step computes.
FREE_ON_RESUME = frozenset(
    {
        "card",
        "bake",
        "block_swap",
        "export",
        "export_dtype",
        "samples",
        "strengths",
        "output",
        "shard",
        "steps",
        "epochs",
        "checkpoint_every",
        "keep_checkpoints",
        "sample_every",
        "evaluate_every",
        "best",
        "early_stop",
        "trackers",
        "callbacks",
        "log_every",
        "num_workers",
        "versions",
    }
)


def read_values(path: Path | None, overrides: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """The values of a run file with the overrides put in; what is wrong with their form is added to `problems`."""
    values = _read_file(path, problems) if path is not None else {}
    for override in overrides:
        _override(values, override, problems)
    return values


def _read_file(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        with open_plain(path, _MOST_BYTES, follow=True) as (file, _):
            values = yaml_values.parse(file.read().decode("utf-8"))
    except CheckpointError as error:
        raise ConfigError([f"cannot read {error}"], str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"is no UTF-8 text: {error}; save it as UTF-8"], str(path)) from error
    except yaml.YAMLError as error:
        raise ConfigError([" ".join(str(error).split())], str(path)) from error
    if isinstance(values, dict):
        return values
    problems.append(f"{path} must hold keys and values, such as 'steps: 500', not {type(values).__name__}")
    return {}


def _override(values: dict[str, Any], text: str, problems: list[str]) -> None:
    """Puts `a.b=value` into nested mappings; the value is read as YAML."""
    dotted, equals, raw = text.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        problems.append(f"the override {shown(text)} is not of the form key=value or section.key=value")
        return
    try:
        value = yaml_values.parse(raw)
    except yaml.YAMLError:
        problems.append(f"{dotted}: the value {shown(raw)} of the override is no YAML; quote it")
        return
    section = values
    for depth, key in enumerate(keys[:-1]):
        inner = section.setdefault(key, {})
        if not isinstance(inner, dict):
            problems.append(
                f"{dotted}: {'.'.join(keys[: depth + 1])!r} is {shown(inner)}, not a section that holds keys"
            )
            return
        section = inner
    section[keys[-1]] = value


def check_section(
    model: type[BaseModel], values: Mapping[str, Any], problems: list[str], prefix: str = "", known: Sequence[str] = ()
) -> BaseModel | None:
    """The section, or None after adding a sentence for every value at fault.

    Args:
        model: Checks it.
        values: Its values.
        problems: Takes up the sentences.
        prefix: What its keys begin with in the run.
        known: All keys of the run, one of which may be what an unknown one means; by default those of `model`.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        known = known or list(paths_of(model, prefix))
        problems += [_sentence(dict(item), prefix, known) for item in error.errors(include_url=False)]
        return None


def _sentence(item: dict[str, Any], prefix: str, known: Sequence[str]) -> str:
    path = prefix + ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        return f"unknown key {shown(path)}.{hint(path, known)}"
    if item["type"] == "missing":
        return f"{path}: this key is required"
    whole = isinstance(item.get("ctx", {}).get("error"), WholeSentenceError)
    message = item["msg"].removeprefix("Value error, ")  # what pydantic puts before the words of our own checks
    message = message[:1].lower() + message[1:]
    return f"{path}: {message}" + ("" if whole else f", not {shown(item['input'])}")


def installed_versions() -> dict[str, str]:
    """The versions of python, of the libraries that decide a run's numbers, and of every plug-in."""
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    plugins = {record.dist: record.version for record in get_plugin_manager().records if record.provides}
    return {**{name: version for name, version in plugins.items() if name and version}, **found}
