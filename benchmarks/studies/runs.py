"""One run of a study: a row with a seed, which is trained, evaluated and recorded.

Its configuration and metrics are copied to the study's record, which is under version control. Recorded runs are
skipped, unfinished ones continue from their checkpoint, runs of another configuration are an error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

from benchmarks.studies.study import Evaluations, Measured, Row, Script, Study, StudyError
from softmask.files import write_atomically
from softmask.training.checkpoint.state import read_json
from softmask.training.config import Config, ConfigError, flatten, load_config, save_config
from softmask.training.launchers import free_port

SCRIPTS = Path(__file__).resolve().parents[2] / "train"
PHASES = ("contrast_steps", "caption_whole_steps")  # options of the models: first steps that differ from the others
# Keys that do not affect the result of a run.
NEUTRAL_KEYS = (
    "output",
    "head.answer_list",  # of the evaluation
    "head.names",  # the classes of the data, which a run writes into its configuration
    "data.workers",
    "data.max_bad_share",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.profile.start",
    "train.profile.steps",
)
OPTIONS = "options"  # key of recorded metrics: those of train/evaluate.py
Start = Callable[[Sequence[str]], None]
_LOCKS: dict[Path, Lock] = {}  # of runs that several others start from


@dataclass(frozen=True)
class Plan:
    """What to run, and where to write it."""

    studies: tuple[Study, ...]
    rows: tuple[str, ...]  # names of the rows to run; the tables have all rows
    seeds: int  # that run
    expected: int  # seeds of a finished row
    runs: Path
    record: Path
    table: Path
    introduction: str = ""  # of the table's file
    jobs: int = 1  # runs side by side
    steps: int = 0  # steps per run; 0: those of the configuration


@dataclass(frozen=True)
class Run:
    """A row with a seed."""

    folder: Path
    record: Path  # folder of the recorded configuration and metrics
    script: Script | None
    file: Path  # configuration
    overrides: tuple[str, ...]
    config: Config
    evaluations: Evaluations
    base: Run | None = None  # the run of `init`

    @property
    def measured(self) -> Path:
        """The folder whose checkpoint is evaluated."""
        return self.folder if self.script or self.base is None else self.base.folder


def make_run(plan: Plan, study: Study, row: Row, seed: int) -> Run:
    """The run of a row with a seed.

    Raises:
        ConfigError: unknown key or invalid value in the row.
    """
    name = Path(study.name, row.name, f"seed_{seed}")
    folder, evaluations = plan.runs / name, study.evaluations if row.evaluations is None else row.evaluations
    base = make_run(plan, *find_row(plan, row.init), seed) if row.init else None
    if row.script is None:
        assert base is not None
        return Run(folder, plan.record / name, None, base.file, base.overrides, base.config, evaluations, base)
    heads = [f"init_heads=[{','.join(row.init_heads)}]"] if row.init_heads else []
    file, overrides = row.config or study.config, [*row.overrides, *heads, f"seed={seed}", f"output={folder}"]
    if plan.steps:
        short = shortened(load_from(base, file, overrides), steps=plan.steps)
        keys = {one.partition("=")[0] for one in short}
        overrides = [one for one in overrides if one.partition("=")[0] not in keys] + short
    config = load_from(base, file, overrides)
    overrides += [f"init={base.folder}"] if base else []
    return Run(folder, plan.record / name, row.script, file, tuple(overrides), config, evaluations, base)


def load_from(base: Run | None, file: Path, overrides: Sequence[str]) -> Config:
    """The configuration of a run that starts from `base`, which need not be there."""
    if base is None:
        return load_config(file, overrides)
    with TemporaryDirectory() as folder:
        save_config(base.config, Path(folder) / "config.yaml")
        return replace(load_config(file, [*overrides, f"init={folder}"]), init=str(base.folder))


def find_row(plan: Plan, place: str) -> tuple[Study, Row]:
    """The study and the row with the name study/row."""
    name, _, row_name = place.partition("/")
    ((study, row),) = [
        (study, row) for study in plan.studies for row in study.rows if (study.name, row.name) == (name, row_name)
    ]
    return study, row


def shortened(config: Config, *, steps: int) -> list[str]:
    """Overrides for fewer steps, with warm-up and phases shortened in proportion."""
    share = steps / config.train.steps
    overrides = [f"train.steps={steps}", f"optimizer.warmup_steps={round(share * config.optimizer.warmup_steps)}"]
    phases = {name: getattr(config.model, name) for name in PHASES if hasattr(config.model, name)}
    return overrides + [f"model.{name}={round(share * length)}" for name, length in phases.items()]


def planned_runs(plan: Plan) -> Iterator[Run]:
    """All rows with one seed before the next seed, so that interrupted studies can be compared."""
    for seed in range(plan.seeds):
        for study in plan.studies:
            for row in study.rows:
                if row.name in plan.rows:
                    yield make_run(plan, study, row, seed)


def check_configuration(run: Run, folder: Path) -> None:
    """Refuses a folder whose run was started with another configuration.

    Raises:
        StudyError: naming every key that differs, with both values.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return
    way_out = f"move or remove {folder} to run it again"
    try:
        old, new = flatten(load_config(path)), flatten(run.config)
    except ConfigError as error:
        raise StudyError(f"{path}: not a configuration of this version: {error}; {way_out}") from error
    differing = [key for key in old | new if key not in NEUTRAL_KEYS and old.get(key) != new.get(key)]
    if differing:
        listed = ", ".join(f"{key} (was {old.get(key)!r}, now {new.get(key)!r})" for key in differing)
        raise StudyError(f"{folder}: run with another configuration: {listed}; {way_out}")


def finished_metrics(run: Run, folder: Path) -> Measured | None:
    """The metrics in a folder, if all are there and of these evaluations; else None.

    Raises:
        StudyError: the run has another configuration.
        CheckpointError: an unreadable file of metrics.
    """
    check_configuration(run, folder)
    found = {name: metrics for name in run.evaluations if (metrics := metrics_of(run, folder, name))}
    return found if len(found) == len(run.evaluations) else None


def metrics_of(run: Run, folder: Path, name: str) -> dict | None:
    """The metrics of an evaluation; None if there are none of this run's last step, or with validation of an earlier
    one, the best, and of these options."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    metrics, last = read_json(path), run.config.train.steps
    step = metrics["training"]["steps"]
    of_run = 0 < step <= last if run.config.data.val else step == last
    return metrics if of_run and metrics.get(OPTIONS) == list(run.evaluations[name]) else None


def carry_out(run: Run, *, start: Start) -> bool:
    """Trains, evaluates and records a run, skipping completed steps. False: the run was already recorded.

    Raises:
        StudyError: the run has another configuration, or a command did not finish.
    """
    if finished_metrics(run, run.record):
        return False
    train(run, start=start)
    for name in run.evaluations:
        evaluate(run, name, start=start)
    run.record.mkdir(parents=True, exist_ok=True)
    config = run.measured / "config.yaml"
    for path in (config, *(run.folder / f"{name}.json" for name in run.evaluations)):
        write_atomically(run.record / path.name, path.read_text(encoding="utf-8"))
    return True


def train(run: Run, *, start: Start) -> None:
    """Trains the run, and before it the one that it starts from, unless they are done."""
    check_configuration(run, run.folder)
    with _LOCKS.setdefault(run.folder, Lock()):
        if (done := run.folder / "done.json").is_file():
            return
        if run.base is not None:
            train(run.base, start=start)
        if run.script is None:
            return
        options = ["--config", str(run.file), "--resume", "auto"]
        start([*launcher(), str(SCRIPTS / f"{run.script}.py"), *options, *run.overrides])
        if not done.is_file():
            raise StudyError(f"{run.folder}: training stopped before the end; run the command again to continue")


def evaluate(run: Run, name: str, *, start: Start) -> None:
    if metrics_of(run, run.folder, name):
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    output = run.folder / f"{name}.json"
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), str(run.measured)]
    output.unlink(missing_ok=True)
    start([*command, *run.evaluations[name], "--output", str(output)])
    if output.is_file():
        written = read_json(output) | {OPTIONS: list(run.evaluations[name])}
        write_atomically(output, json.dumps(written, indent=2) + "\n")
    if not metrics_of(run, run.folder, name):
        raise StudyError(f"{output}: evaluation wrote no metrics of step {run.config.train.steps}")


def launcher() -> list[str]:
    """The DeepSpeed launcher with one rank, because the batch and so every loss depends on the number of ranks.

    A free port avoids conflicts with other runs on the machine.
    """
    program = Path(sys.executable).with_name("deepspeed")
    return [str(program), "--num_accelerators", "1", "--master_port", str(free_port())]


def start_process(command: Sequence[str], *, jobs: int) -> None:
    """Runs a command to its end. Success is judged by its files, because ranks exit with 0 after a stop signal.

    Ctrl-C reaches the command too, which then writes its checkpoint.
    """
    threads = max((os.cpu_count() or 1) // jobs, 1)
    environment = os.environ if jobs == 1 else os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, env=environment, check=False)
