"""The subcommands of adapterkit itself."""

from __future__ import annotations

from adapterkit.specs import CommandSpec


def commands() -> list[CommandSpec]:
    """In the order of `adapterkit --help`."""
    return [
        CommandSpec("points", "adapterkit.cli.points:command", help="Show where adapters can act in a model."),
        CommandSpec("adapters", "adapterkit.cli.adapters:command", help="List the adapter types."),
        CommandSpec("tasks", "adapterkit.cli.tasks:command", help="List the training tasks, and a run file's keys."),
        CommandSpec(
            "optimizers", "adapterkit.cli.optimizers:command", help="List optimizers and schedules, and their keys."
        ),
        CommandSpec("backends", "adapterkit.cli.backends:command", help="List the model families."),
        CommandSpec("plugins", "adapterkit.cli.plugins:command", help="List the plug-ins and what became of each."),
        CommandSpec("train", "adapterkit.cli.train:command", help="Train an adapter as a run file says."),
        CommandSpec("finish", "adapterkit.cli.finish:command", help="End an interrupted run with what it has."),
        CommandSpec("sample", "adapterkit.cli.sample:command", help="Generate with a trained adapter."),
        CommandSpec("predict", "adapterkit.cli.predict:command", help="Say the classes of images with an adapter."),
        CommandSpec("generate", "adapterkit.cli.generate:command", help="Write text with an adapter, as it is drawn."),
        CommandSpec("chat", "adapterkit.cli.chat:command", help="Talk to a language model with an adapter."),
        CommandSpec("inspect", "adapterkit.cli.inspect:command", help="Describe an adapter file."),
        CommandSpec("convert", "adapterkit.cli.convert:command", help="Write an adapter in another tool's format."),
        CommandSpec("resize", "adapterkit.cli.resize:command", help="Give an adapter other ranks, or recommend one."),
        CommandSpec("extract", "adapterkit.cli.extract:command", help="Make an adapter of a fine-tuned model."),
        CommandSpec("combine", "adapterkit.cli.combine:command", help="Put several adapters together."),
        CommandSpec("diff", "adapterkit.cli.diff:command", help="Compare two adapters."),
        CommandSpec("verify", "adapterkit.cli.verify:command", help="Compare what other libraries make of an adapter."),
        CommandSpec("bake", "adapterkit.cli.bake:command", help="Write a model with an adapter in its weights."),
    ]
