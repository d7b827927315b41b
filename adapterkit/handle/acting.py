"""The part of the handle that says what acts."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from adapterkit.composition import Expression
from adapterkit.engine.selection import Selection
from adapterkit.errors import ConfigError, StateError, UnknownNameError, shown
from adapterkit.handle import baking, choices, merging
from adapterkit.handle.base import Access
from adapterkit.handle.choices import Choice
from adapterkit.handle.initialising import require_values


class Switching(Access):
    """What acts, for whom, and whether it is folded into the weights."""

    # -- what acts --------------------------------------------------------------------------------------------------

    @property
    def active(self) -> dict[Expression, Any]:
        """What acts now, in this thread, with its weights as they were asked for; inside `routed` one for each row."""
        state = self._state
        asked = (state.merge.selection if state.merge else state.switch.current).asked
        return {name: weight.tolist() if isinstance(weight, Tensor) else weight for name, weight in asked.items()}

    def activate(self, choice: Choice) -> None:
        """Sets what acts from now on: a name, names, `{name: weight}`, or nothing (None).

        In the place of a name may stand an expression: `Stack`, `Parallel`, `Average`, `Split`. In the place of a
        weight may stand one for each selector, the first that matches, `{"*@stage=down": 0.3, "*": 0.8}` (0 where none
        does); or a function of the point and the step, `lambda point, step: ...` (see `at_step`). A number may also be
        a tensor [rows] or [rows, tokens], where adapters act at weights and outputs; it may carry gradients.

        Raises:
            UnknownNameError: No such adapter.
            ConfigError: A weight is not a finite number, or negative where it multiplies attention; or an adapter that
                replaces the base (`AdapterModule.scalable`) has another weight than 1, or company.
            RoutingError: `Split` names an adapter that acts where there is no axis of tokens; or positions are counted
                where another adapter adds some.
            StateError: Weights are merged, or this is inside an `activated` block, where it would not act.
        """
        self._check(near=True)
        self._require_unmerged("change what acts")
        self._require_outside("activate()")
        state, selection = self._state, self._selection(choice)
        before, state.switch.default = state.switch.default, selection
        try:  # another thread may have removed one since
            choices.check_names(selection.names, state.adapters)
        except UnknownNameError:
            state.switch.default = before.without(before.names - state.adapters.keys())
            raise
        state.switch.switched |= bool(before)

    @contextlib.contextmanager
    def activated(self, choice: Choice) -> Iterator[None]:
        """Sets what acts inside a `with` block, in this thread or asyncio task and in those that are started there.

        Blocks nest, and may end in any order; other threads and tasks see nothing of them. Those of generators that
        take turns are their own; code outside of them sees the last of these where it is in no block.
        """
        self._require_unmerged("change what acts")
        with self._block(self._selection(choice), "change what acts"):
            yield

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Exactly the base model inside a `with` block; see `activated` for whom."""
        return self.activated(None)

    @contextlib.contextmanager
    def routed(self, routes: Sequence[Expression | None], *, copies: int | None = None) -> Iterator[None]:
        """Gives every sample of a batch its own adapter inside a `with` block, as `activated` does. Also in training.

        Args:
            routes: One name (or expression) for each sample of the batch; None is the base. Where generation makes
                several rows of a sample (beams, several results), they are all its own; where one row stands for
                several samples (an encoder before its beams), these must have the same. In a tower whose rows are
                images, one for each image.
            copies: How often a pipeline of diffusers repeats the whole batch: 2 with guidance, 1 without. Several
                images of a prompt are then found too.

        Raises:
            UnknownNameError: No such adapter.
            ConfigError: What is given is no list of names, or no number of copies.
            RoutingError: An adapter acts where one weight serves the whole batch; or, in a forward, the model's batch
                has other rows.
            StateError: Weights are merged.
        """
        self._require_unmerged("route samples")
        with self._block(choices.to_routes(routes, self._state.adapters, copies), "route samples"):
            yield

    @contextlib.contextmanager
    def context(self, **tensors: Tensor) -> Iterator[None]:
        """Gives side inputs to forwards inside a `with` block, for whom `activated` does. Blocks nest, and add up.

        Adapters that read one (`AdapterConfig.contexts`) see it as `base.context[name]`: task ids, image tokens, maps.

        Args:
            tensors: By name, [rows, ...] with one row for each that the model sees, or [1, ...] for all of them.

        Raises:
            UnknownNameError: No adapter on the model reads a side input of this name.
            ConfigError: What is given is no tensor with an axis of rows.
            ContextError: In a forward, an adapter reads one that is not given, or that has other rows than its input.
        """
        choices.check_context(tensors, self._state.adapters)
        with self._state.switch.given(tensors):
            yield

    def at_step(self, step: int) -> None:
        """Tells weights that are functions which step it is, of a denoising or whatever the user counts; 0 until then.

        Inside `activated` it is told to this block alone. For a diffusers pipeline, see `on_step_end`.
        """
        if isinstance(step, bool) or not isinstance(step, int):
            raise ConfigError([f"step must be an int, not {shown(step)}"], "at_step()")
        state = self._state
        if state.merge is not None and state.merge.selection.stepped:
            raise StateError("the weights of the step that was are merged, and do not follow it; unmerge() first")
        current = state.switch.current
        if current.stepped:
            state.switch.replace(choices.to_selection(current.asked, state.adapters, step))

    def on_step_end(self, pipeline: object, step: int, timestep: object, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`at_step` for the next step, as diffusers calls it: `pipe(..., callback_on_step_end=adapters.on_step_end)`.

        Say `at_step(0)` before each image.
        """
        self.at_step(step + 1)
        return kwargs

    def recompute_context(
        self,
    ) -> tuple[contextlib.AbstractContextManager[object], contextlib.AbstractContextManager[object]]:
        """A `context_fn` for `torch.utils.checkpoint`: what is recomputed sees what acted in the first forward.

        Where something acted, that is found without it. It is needed where nothing did (`disabled`), for `context`
        alone, and where torch keeps its records in a way that is not known here.
        `model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": adapters.recompute_context})`
        """
        return contextlib.nullcontext(), self._state.switch.recalled()

    def checkpoint_context(
        self,
    ) -> tuple[contextlib.AbstractContextManager[object], contextlib.AbstractContextManager[object]]:
        """The earlier name of `recompute_context`."""
        told = "checkpoint_context is called recompute_context: a checkpoint is what a file holds of an adapter"
        warnings.warn(told, DeprecationWarning, stacklevel=2)
        return self.recompute_context()

    # -- merging ----------------------------------------------------------------------------------------------------

    def merge(self, choice: Choice = None) -> None:
        """Folds adapters into the weights: the same output at the base's speed.

        Args:
            choice: What to fold, as for `activate`; by default what acts now. Nothing else acts while it is merged,
                but for what blocks say that the caller is in.

        Raises:
            NotMergeableError: An adapter has no equivalent weight. Nothing is changed.
            StateError: Weights are merged already, or nothing acts; or another thread or task is in a block in which
                something else acts, or another thread in a call of the model.
        """
        with self._changing() as state:
            self._check()
            self._require_unmerged("merge again")
            merging.merge(state, self._foldable(choice))

    def unmerge(self, *, force: bool = False) -> None:
        """Gives back the very bits of the weights, and what acted before.

        A weight that was tied to a merged one is what it was tied to before; rows that a resize has added stay.

        Args:
            force: Whether to do so where merged weights were written to or replaced, which is lost then.

        Raises:
            StateError: Nothing is merged; or that would be lost; or another thread is in a call of the model.
            ReplacedError: A module was replaced.
        """
        with self._changing() as state:
            if state.merge is None:
                raise StateError("nothing is merged")
            if not force:
                self._check()
            merging.unmerge(state, force=force)

    def bake(self, choice: Choice = None) -> None:
        """Folds adapters into the weights for good, and takes all adapters off: a plain model is left.

        Its class, hooks and keys are the base's, and `save_pretrained` or `state_dict` hold the merged weights. A
        weight that was tied to another's is its own from then on, and the model's config says so.

        Args:
            choice: What stays in the weights, as for `activate`; by default what is merged or acts now. Whatever else
                is attached is taken off with it.

        Raises:
            NotMergeableError: An adapter has no equivalent weight; or what it needs is nothing that a checkpoint of
                the base could hold: a quantized layer made dense, a bias that the base lacks, a tie broken that the
                model would make again. Nothing is changed.
            StateError: Nothing acts, samples are routed, or this is inside an `activated` block.
            ReplacedError: A module was replaced.
        """
        with self._changing() as state:
            self._check()
            self._require_outside("bake()")
            if state.merge is not None and choice is None:
                selection = state.merge.selection
                merging.unmerge(state)
            else:
                self._require_unmerged("bake another choice")
                selection = self._foldable(choice)
            baking.bake(state, selection)

    def _foldable(self, choice: Choice) -> Selection:
        selection = self._state.switch.current if choice is None else self._selection(choice)
        if selection.routed:
            raise StateError("samples are routed here, and one weight cannot be several; name an adapter")
        if not selection:
            raise StateError("nothing acts, so there is nothing to merge; name an adapter")
        require_values(selection.names, self._state, "merge")
        return selection

    @contextlib.contextmanager
    def merged(self, choice: Choice = None) -> Iterator[None]:
        """Merges inside a `with` block."""
        self.merge(choice)
        try:
            yield
        finally:
            self.unmerge()
