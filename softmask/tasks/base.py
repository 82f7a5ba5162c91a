"""What the trainer, the evaluation and the report ask of a task: one class for every method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import nn

    from softmask.models.config import SpecialIds


@dataclass(frozen=True)
class Curve:
    """How the report shows a number of the log."""

    title: str
    unit: str = ""


def check_queue(size: int, batch: int) -> None:
    """ValueError where a queue would not hold a batch."""
    if 0 < size < batch:
        raise ValueError(f"model.queue_size: expected 0 or at least the batch of all ranks, {batch}, got {size}")


class Task:
    """A method that can be trained, evaluated and shown.

    `method:` in a configuration names it: `softmask_pp`, `sycoca`, an entry point of the group `softmask.tasks`, or
    `module:Class` of a package of your own. A task is never instantiated with arguments and keeps no state.

    The model that `build` returns has:

        forward(batch, **step_options)   -> an output with `loss` and `terms` (detached scalars, by name)
        update_momentum(), enqueue(out)  once per optimizer step, before and after it
        statistics()                     -> buffers that a forward pass changes, restored where a step is skipped
        set_activation_checkpointing(enable)
        encode_image(images), encode_text(input_ids, attention_mask)   -> tokens, normalized feature
        patch_grid, num_prefix_tokens    (rows, columns), tokens in front of the patches

    and what the evaluation sections that it names need (softmask/evaluation/sections.py).
    """

    # dataclass of the `model:` section; it has vision.image_size, text.max_positions and text.vocab_size (0: the
    # tokenizer's)
    Config: ClassVar[type]
    eval_resize: ClassVar[Literal["squash", "crop"]] = "squash"  # where data.eval_resize is "auto"
    ends_captions: ClassVar[bool] = False  # the model writes captions, whose last token is [SEP]
    matches_pairs: ClassVar[bool] = False  # the model has `match`, by which evaluation re-ranks
    curves: ClassVar[dict[str, Curve]] = {}  # of its terms, by their name in the log

    def build(self, config: Any, special_ids: SpecialIds) -> nn.Module:
        """The model of a `model:` section."""
        raise NotImplementedError

    def check_batch(self, config: Any, batch: int) -> None:
        """ValueError where the model cannot be trained by so many pairs, of all ranks, a micro-step."""

    def step_options(self, config: Any, step: int, *, steps_per_epoch: float) -> dict[str, Any]:
        """What of a forward pass follows from the number of the optimizer step."""
        return {}

    def sections(self, config: Any) -> tuple[str, ...]:
        """Evaluation sections: names of `softmask.evaluation.sections`, or `module:Class` of one's own."""
        return ("retrieval", "zero_shot")

    def title(self, config: Any) -> str:
        """The method's name in the report."""
        return type(self).__name__

    def facts(self, config: Any) -> list[tuple[str, str]]:
        """Rows of the table at the top of the report: what was trained."""
        return []

    def additions(self, config: Any) -> list[str]:
        """What the method adds to its base, as the report's first sentence names it."""
        return []

    def learned(self, config: Any) -> str:
        """What the model learned from captions alone, as that sentence ends."""
        return "what it finds"

    def hidden_patches(self, config: Any) -> str:
        """Which patches the "reconstruction" section hides, as the report's note says it."""
        return ""

    def shows_word_maps(self, config: Any) -> bool:
        """Whether the report draws maps of words (the model has `word_maps`)."""
        return False
