"""The interface between a method and the trainer, the evaluation and the report: one class per method. What is trained
after pre-training is a `DownstreamTask` (downstream.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from softmask.batch import Batch
    from softmask.data import CaptionTokenizer, DataConfig, Record, Source
    from softmask.models.config import SpecialIds

Split = Literal["train", "val", "test", "testA", "testB"]
"""What data is for: a file that holds several splits gives this one. RefCOCO has two of test."""


@dataclass(frozen=True)
class Curve:
    """How the report shows a number from the log."""

    title: str
    unit: str = ""


def check_queue(size: int, batch: int) -> None:
    """For `check_batch`.

    Raises:
        ValueError: a queue that cannot hold a batch.
    """
    if 0 < size < batch:
        raise ValueError(f"model.queue_size: expected 0 or at least the batch of all ranks, {batch}, got {size}")


class Task:
    """A method that can be trained, evaluated and shown.

    `method:` in a configuration names it: `softmask_pp`, `sycoca`, an entry point of the group `softmask.tasks`, or
    `module:Class` in your own package. A task takes no arguments and keeps no state.

    The model that `build` returns has:

        forward(batch, **step_options)   -> an output with `loss` and `terms` (detached scalars, by name)
        update_momentum(), enqueue(out)  called before and after every optimizer step
        statistics()                     -> buffers that a forward pass changes; a skipped step restores them
        set_activation_checkpointing(enable)
        encode_image(images), encode_text(input_ids, attention_mask)   -> tokens, normalized feature
        patch_grid, num_prefix_tokens    (rows, columns), number of tokens before the patches

    and whatever its evaluation sections need (softmask/evaluation/sections.py).

    Attributes:
        Config: the dataclass of the `model:` section, with vision.image_size, text.max_positions and text.vocab_size
            (0: the tokenizer's).
        eval_resize: what data.eval_resize "auto" means.
        ends_captions: whether the model generates captions that end with [SEP].
        matches_pairs: whether the model has `image_keys` and `match`, for re-ranking.
        tokens_behind: most tokens of an answer that the model reads behind a text, in the same sequence.
        curves: how the report shows its terms, by their names in the log.
        renamed: starts of parameter names in older checkpoints -> today's.
        new_parts: starts of parameter names that `init` need not have.
        view: the report's view of the task, as `module:Class` (softmask/report/view.py); empty: it has no report.
    """

    Config: type
    eval_resize: Literal["squash", "crop"] = "squash"
    ends_captions: bool = False
    matches_pairs: bool = False
    tokens_behind: int = 0
    curves: dict[str, Curve] = {}
    renamed: dict[str, str] = {}
    new_parts: tuple[str, ...] = ()
    view: str = "softmask.report.pretraining:Pretraining"

    def build(self, config: Any, special_ids: SpecialIds) -> nn.Module:
        """The model for a `model:` section."""
        raise NotImplementedError

    def open(self, paths: str | Sequence[str], data: DataConfig, *, split: Split) -> Source:
        """The samples of `paths` (`data.train`, `data.val` or evaluate.py's `--data`).

        Raises:
            DataError: one line that names the file or entry that is wrong.
        """
        from softmask.data import open_source

        return open_source(paths, image_root=data.image_root, split=split)

    def finish_batch(self, batch: Batch, records: Sequence[Record], tokenizer: CaptionTokenizer) -> Batch:
        """The batch with everything that the model reads beside images and captions."""
        return batch

    def initial_weights(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of `init`, another run, by this model's names for them. Those left out are named in the log."""
        return given

    def text_facts(self, source: Any, tokenizer: CaptionTokenizer) -> list[str]:
        """How texts beside the captions are read, in words, such as how many are cut; a run prints it at its start."""
        return []

    def weight_origins(self, model: Any) -> dict[str, str]:
        """Part of a new model -> the origin of its weights in words, such as "random"; a run prints it at its start."""
        return {}

    def check_batch(self, config: Any, batch: int) -> None:
        """Called before training with the pairs per micro-step over all ranks.

        Raises:
            ValueError: the model cannot train with so many.
        """

    def step_options(self, config: Any, step: int, *, steps_per_epoch: float) -> dict[str, Any]:
        """Options of the forward pass that depend on the optimizer step."""
        return {}

    def sections(self, config: Any) -> tuple[str, ...]:
        """Evaluation sections: names from `softmask.evaluation.sections`, or `module:Class` for your own."""
        return ("retrieval", "zero_shot")

    def title(self, config: Any) -> str:
        """The method's name in the report."""
        return type(self).__name__

    def facts(self, config: Any) -> list[tuple[str, str]]:
        """Rows for the table at the top of the report."""
        return []

    def additions(self, config: Any) -> list[str]:
        """What the method adds to its baseline, for the report's first sentence."""
        return []

    def learned(self, config: Any) -> str:
        """What the model learned from captions alone, for the end of that sentence."""
        return "what it finds"

    def hidden_patches(self, config: Any) -> str:
        """Which patches the "reconstruction" section hides, for the report's note."""
        return ""

    def shows_word_maps(self, config: Any) -> bool:
        """Whether the report draws word maps (the model has `word_maps`)."""
        return False

    def current_name(self, name: str) -> str:
        """Today's name of a parameter, buffer or module that an older checkpoint or configuration names."""
        return _replace_start(name, self.renamed)

    def earlier_name(self, name: str) -> str:
        """The name that `current_name` maps to this one."""
        return _replace_start(name, {new: old for old, new in self.renamed.items()})


def _replace_start(name: str, starts: dict[str, str]) -> str:
    for old, new in starts.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name
