"""Checkpoints of a run: written completely or not at all, found, compared with the configuration, loaded as a model.

`output/checkpoints/step_00000800/` holds DeepSpeed's files, trainer.json, config.yaml and tokenizer/. It is written
under the name `step_00000800.tmp` and renamed when complete, so that a process killed at any moment leaves either a
complete checkpoint or a folder that nobody reads.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from softmask.data import CaptionTokenizer, Source
from softmask.models import SpecialIds
from softmask.training.checkpoint.reshard import SavedState, load_resharded, read_weights
from softmask.training.checkpoint.state import CheckpointError, Progress, read_json, read_state, write_json
from softmask.training.config import Config, ConfigError, flatten, load_config, save_config
from softmask.training.failures import explain
from softmask.training.optim import groups_digest

POSITIONS = "vision.vit.pos_embed"
UNREADABLE = (  # raised by torch.load, or by using a file that is no checkpoint
    OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError, KeyError, AttributeError, TypeError,
)  # fmt: skip
COMPLETE = re.compile(r"step_\d{8,}")
# Keys that a resumed run may change; all others in `model` and `data` must stay.
FREE_KEYS = (
    "data.train",  # the same data may lie elsewhere
    "data.image_root",
    "data.workers",
    "data.eval_resize",
    "data.max_bad_share",
    "data.tokenizer",  # the run has its own copy
    "model.text.checkpoint",  # for new weights only
    "model.vision.checkpoint",
    "head.answer_list",  # for evaluation only
    "head.k",
    "head.rerank",
    "head.beams",
    "head.min_length",
    "head.prompt",
)
FIXED_KEYS = (
    "seed", "train.accumulation", "train.precision", "optimizer.lr_scales", "optimizer.vision_layer_decay",
)  # fmt: skip


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step_*")
    found = [path for path in folders if COMPLETE.fullmatch(path.name) and (path / "trainer.json").is_file()]
    return sorted(found, key=step_of)


def check_no_debris(run: Path, step: int) -> None:
    """CheckpointError for a folder without trainer.json at the place of a later checkpoint."""
    for path in sorted((run / "checkpoints").glob("step_*")):
        if COMPLETE.fullmatch(path.name) and step_of(path) > step and not (path / "trainer.json").is_file():
            raise CheckpointError(f"{path}: an incomplete checkpoint (without trainer.json) is in the way: remove it")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint, given by its own folder or by the run's, which means the newest complete one."""
    path = Path(path)
    if COMPLETE.fullmatch(path.name) and (path / "trainer.json").is_file():
        return path
    found = complete_checkpoints(path)
    if not found:
        reason = "no complete checkpoint in it" if path.is_dir() else "no such folder"
        raise CheckpointError(f"{path}: expected a step_... checkpoint or a run that holds one, got {reason}")
    return found[-1]


def best_checkpoint(path: str | Path) -> Path:
    """As `find_checkpoint`, but of a run that measured itself on held-out data the best."""
    found = find_checkpoint(path)
    best = read_json(found / "trainer.json").get("validation", {}).get("best_step")
    kept = found.with_name(checkpoint_name(best)) if best else found
    return kept if found != Path(path) and (kept / "trainer.json").is_file() else found


def save_checkpoint(
    engine: Any, config: Config, progress: Progress, extra: dict[str, Any], *, best_step: int = 0
) -> Path:
    """Write a checkpoint into the run; call it on all ranks. `extra` goes into trainer.json next to the progress.
    Beside the last ones, that of `best_step` is kept."""
    run = Path(config.output)
    folder = run / "checkpoints"
    final = folder / checkpoint_name(progress.step)
    partial = final.with_name(f"{final.name}.tmp")
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("step_*.tmp"):
            leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
    dist.barrier()
    try:
        engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
    except (OSError, RuntimeError) as error:  # torch's writer gives positions, not reasons
        free = shutil.disk_usage(folder).free >> 20
        raise CheckpointError(f"{partial}: cannot be written ({first_line(error)}); {free:,} MiB are free") from error
    dist.barrier()
    if dist.get_rank() == 0:
        save_config(config, partial / "config.yaml")
        shutil.copytree(run / "tokenizer", partial / "tokenizer")
        state = dataclasses.asdict(progress) | {"world_size": dist.get_world_size()} | extra
        write_json(state, partial / "trainer.json")
        partial.rename(final)
        _prune(folder, config.train.keep_checkpoints, kept=best_step)
    dist.barrier()
    return final


def add_to_state(run: Path, step: int, entries: dict[str, Any]) -> None:
    """Add entries to trainer.json of a complete checkpoint."""
    path = run / "checkpoints" / checkpoint_name(step) / "trainer.json"
    write_json(read_json(path) | entries, path)


def _prune(folder: Path, keep: int, *, kept: int) -> None:
    for old in complete_checkpoints(folder.parent)[:-keep]:
        if step_of(old) == kept:
            continue
        doomed = old.with_name(f"{old.name}.tmp")  # a half-deleted checkpoint must not look complete
        old.rename(doomed)
        shutil.rmtree(doomed)


def load_checkpoint(engine: Any, checkpoint: Path, config: Config) -> tuple[Progress, dict[str, Any]]:
    """Load a checkpoint's state into the engine; returns the progress and the content of trainer.json.

    A checkpoint from another number of ranks, another ZeRO stage or an older release is loaded by parameter name.

    Raises:
        CheckpointError: missing or unreadable files, or parameters that do not fit.
    """
    state = read_state(checkpoint)
    if "loss_scale" not in state:
        raise CheckpointError(f"{checkpoint / 'trainer.json'}: lacks loss_scale: not written by the trainer")
    digests = [
        groups_digest(engine.module, config.optimizer, name_of=f) for f in (str, config.find_task().earlier_name)
    ]
    if state.get("groups") not in digests:
        reason = "its optimizer groups the parameters differently, as another release does"
        raise CheckpointError(f"{checkpoint}: cannot be resumed: {reason}; begin a new run with init={checkpoint}")
    try:
        if not _same_layout(checkpoint, state, config) or SavedState(checkpoint).has_earlier_names:
            load_resharded(engine, checkpoint, config.optimizer)
        elif engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)[0] is None:
            raise FileNotFoundError("DeepSpeed found no state in it")
    except UNREADABLE as error:
        raise CheckpointError(f"{checkpoint}: cannot be loaded: {first_line(error)}") from error
    names = [item.name for item in dataclasses.fields(Progress)]
    return Progress(**{name: state[name] for name in names}), state


def _same_layout(checkpoint: Path, state: dict[str, Any], config: Config) -> bool:
    """Whether this run would write the same set of files. Stages 1 and 2 do."""
    saved = load_config(checkpoint / "config.yaml")
    kinds = [min(stage, 1) + (stage == 3) for stage in (saved.zero_stage, config.zero_stage)]
    return kinds[0] == kinds[1] and state["world_size"] == dist.get_world_size()


def data_facts(source: Source) -> dict[str, Any]:
    """What a checkpoint records of its training data."""
    return {"captions": len(source), "pictures": source.images, "digest": source.digest}


def check_data(checkpoint: Path, source: Source) -> None:
    """Refuse a checkpoint that was trained on other data.

    Raises:
        CheckpointError: with the sizes of both.
    """
    was, now = read_state(checkpoint).get("data"), data_facts(source)
    if was is not None and was != now:
        texts = [f"{one['captions']:,} captions of {one['pictures']:,} images" for one in (was, now)]
        other = " with other bytes" if texts[0] == texts[1] else ""
        raise CheckpointError(f"{checkpoint}: made with other data (was {texts[0]}, now {texts[1]}{other})")


def check_resumable(checkpoint: Path, config: Config, *, world_size: int) -> None:
    """Refuse a checkpoint of another model, other data or another order of the data.

    Raises:
        CheckpointError: names every key that differs, with both values.
    """
    saved = load_config(checkpoint / "config.yaml")
    differences = config_differences(saved, config)
    made_by = read_state(checkpoint)["world_size"]
    old, new = saved.train.batch_size, config.train.batch_size
    if made_by * old != world_size * new:
        if old != new:
            differences.append(f"train.batch_size (was {old}, now {new})")
        if made_by != world_size:
            differences.append(f"number of ranks (was {made_by}, now {world_size})")
            product = f"was {made_by * old}, now {world_size * new}; the order of the data follows from it"
            differences.append(f"train.batch_size * ranks ({product})")
    if differences:
        raise CheckpointError(f"{checkpoint}: made with another configuration: {', '.join(differences)}")


def config_differences(saved: Config, config: Config) -> list[str]:
    """Keys that differ and that a resumed run may not change."""
    for key in ("method", "task"):
        if (was := getattr(saved, key)) != (now := getattr(config, key)):
            return [f"{key} (was {was!r}, now {now!r})"]
    old, new = flatten(saved), flatten(config)
    of_model = ("model.", "data.", "head.")
    fixed = [key for key in new if key in FIXED_KEYS or (key.startswith(of_model) and key not in FREE_KEYS)]
    if new.get("head.names") == []:  # the data's
        fixed.remove("head.names")
    return [f"{key} (was {old[key]!r}, now {new[key]!r})" for key in fixed if old[key] != new[key]]


def build_model(config: Config, tokenizer: CaptionTokenizer) -> nn.Module:
    """The model of a configuration, with the tokenizer's vocabulary where the configuration says 0.

    Raises:
        ConfigError: no model can be built from these keys.
    """
    model = config.model
    if model.text.vocab_size == 0:
        model = dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=tokenizer.vocab_size))
    if model.text.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.text.vocab_size: expected 0 or at least the tokenizer's {tokenizer.vocab_size}, "
            f"got {model.text.vocab_size}"
        )
    most, what = longest_text(config)
    if config.data.max_length > most:
        raise ConfigError(f"data.max_length: expected at most {what} = {most}, got {config.data.max_length}")
    ids = SpecialIds(pad=tokenizer.pad_id, cls=tokenizer.cls_id, sep=tokenizer.sep_id, mask=tokenizer.mask_id)
    try:
        return config.find_task().build(model, ids)
    except (ValueError, FileNotFoundError, RuntimeError, TypeError) as error:  # the last two: timm has no such ViT
        if explain(error, smaller=""):
            raise
        raise ConfigError(f"model: {first_line(error)}") from error


def longest_text(config: Config) -> tuple[int, str]:
    """The most tokens of a text that the model can read, and the same in words."""
    behind = config.find_task().tokens_behind
    what = f" less {behind} tokens of an answer" if behind else ""
    return config.model.text.max_positions - behind, f"model.text.max_positions{what}"


def without_files(config: Config) -> Config:
    """The configuration without the weight files that training started from, for weights from a checkpoint."""
    bare = config.model
    for part in ("vision", "text"):
        section = getattr(bare, part)
        if getattr(section, "checkpoint", ""):
            bare = dataclasses.replace(bare, **{part: dataclasses.replace(section, checkpoint="")})
    return dataclasses.replace(config, model=bare)


def fit_positions(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Interpolate position embeddings of another grid to the model's; returns their names."""
    own: Any = model
    options = {"new_size": list(own.patch_grid), "num_prefix_tokens": own.num_prefix_tokens}
    fitted = []
    for name, tensor in model.state_dict().items():
        if name.endswith(POSITIONS) and name in state and state[name].shape != tensor.shape:
            state[name] = resample_abs_pos_embed(state[name], **options)
            fitted.append(name)
    return fitted


def load_model(
    path: str | Path, device: str | torch.device = "cpu", *, image_size: int = 0
) -> tuple[nn.Module, CaptionTokenizer, Config]:
    """Model (in evaluation mode), tokenizer and configuration of a checkpoint, or of a run's newest one.

    `image_size`: of the images to come; 0: as in training.

    The weights are fp32, which flash-attn does not support, and attention libraries need not be installed here: the
    model uses torch's attention.

    Raises:
        CheckpointError: no checkpoint, or an unreadable one.
    """
    checkpoint = find_checkpoint(path)
    sizes = [f"{section}.image_size={image_size}" for section in ("model.vision", "data") if image_size]
    config = load_config(checkpoint / "config.yaml", ["model.text.attention=sdpa", *sizes])
    try:
        tokenizer = CaptionTokenizer.load(checkpoint / "tokenizer")
        state = read_weights(checkpoint)
    except UNREADABLE as error:
        raise CheckpointError(f"{checkpoint}: cannot be read: {first_line(error)}") from error
    model = build_model(without_files(config), tokenizer)
    fit_positions(model, state)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint}: does not fit its config.yaml: {first_line(error)}") from error
    return model.to(device).eval(), tokenizer, config


def first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, KeyError):
        text = f"no entry {text}"
    return " ".join(text.splitlines()[:2])
