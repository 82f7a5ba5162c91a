"""Train and evaluate the rows of both ablations with several seeds, and write benchmarks/ablation/README.md.

    python -m benchmarks.ablation.run [--seeds 3] [--rows coca sycoca] [--steps 20] [--table-only]

A run is a row with a seed, in runs/ablation/<method>/<row>/seed_<n>: `deepspeed train/pretrain.py --resume auto` on one
rank, then `train/evaluate.py`. Its configuration and metrics are copied to benchmarks/ablation/record, which is under
version control. The table is built from this record, and recorded runs are skipped. Unfinished runs continue from their
checkpoint; runs of another configuration are an error. All rows run with the first seed before the next one, and the
table is rewritten after every run. `--steps` is for trials: their runs, record and table go to
runs/ablation_<steps>_steps, and warm-up and contrast_steps are shortened in proportion.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ablation import table as ablation_table
from benchmarks.ablation.rows import STUDIES, AblationError, Row, Study
from softmask.arguments import positive
from softmask.evaluation.captioning import CaptionOptions
from softmask.files import write_atomically
from softmask.training.checkpoint.state import CheckpointError, read_json
from softmask.training.config import Config, ConfigError, flatten, load_config
from softmask.training.launchers import free_port
from softmask.training.logs import say

SCRIPTS = Path(__file__).resolve().parents[2] / "train"
TEST_DATA = "data/scenes/test-*.tar"
GALLERY = 256  # images in the retrieval gallery
SEEDS = 3  # per row, before rows are compared
# Keys that do not affect the result of a run.
NEUTRAL_KEYS = (
    "output",
    "data.workers",
    "data.max_bad_share",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.profile.start",
    "train.profile.steps",
)
Start = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Plan:
    """What to run, and where to write it."""

    rows: tuple[str, ...]  # names of the rows to run; the table has all rows
    seeds: int = SEEDS
    steps: int = 0  # steps per run; 0: those of the configuration
    runs: Path = Path("runs/ablation")
    record: Path = Path("benchmarks/ablation/record")
    table: Path = Path("benchmarks/ablation/README.md")
    studies: tuple[Study, ...] = STUDIES
    test_data: str = TEST_DATA


@dataclass(frozen=True)
class Run:
    """A row with a seed."""

    folder: Path
    record: Path  # folder of the recorded configuration and metrics
    file: Path  # configuration of the study
    overrides: tuple[str, ...]
    config: Config


def make_run(plan: Plan, study: Study, row: Row, seed: int) -> Run:
    """The run of a row with a seed.

    Raises:
        ConfigError: unknown key or invalid value in the row.
    """
    name = Path(study.method, row.name, f"seed_{seed}")
    folder = plan.runs / name
    overrides = [*row.overrides, f"seed={seed}", f"output={folder}"]
    if plan.steps:
        overrides += shortened(load_config(study.config), steps=plan.steps)
    return Run(folder, plan.record / name, study.config, tuple(overrides), load_config(study.config, overrides))


def shortened(config: Config, *, steps: int) -> list[str]:
    """Overrides for fewer steps, with warm-up and contrast_steps shortened in proportion."""
    share = steps / config.train.steps
    overrides = [f"train.steps={steps}", f"optimizer.warmup_steps={round(share * config.optimizer.warmup_steps)}"]
    if hasattr(config.model, "contrast_steps"):
        overrides.append(f"model.contrast_steps={round(share * config.model.contrast_steps)}")
    return overrides


def planned_runs(plan: Plan) -> Iterator[Run]:
    """All rows with one seed before the next seed, so that an interrupted ablation can be compared."""
    for seed in range(plan.seeds):
        for study in plan.studies:
            for row in study.rows:
                if row.name in plan.rows:
                    yield make_run(plan, study, row, seed)


# -- one run ----------------------------------------------------------------------------------------------------------


def check_configuration(run: Run, folder: Path) -> None:
    """Refuses a folder whose run was started with another configuration.

    Raises:
        AblationError: naming every key that differs, with both values.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return
    way_out = f"move or remove {folder} to run it again"
    try:
        old, new = flatten(load_config(path)), flatten(run.config)
    except ConfigError as error:
        raise AblationError(f"{path}: not a configuration of this version: {error}; {way_out}") from error
    differing = [key for key in old | new if key not in NEUTRAL_KEYS and old.get(key) != new.get(key)]
    if differing:
        listed = ", ".join(f"{key} (was {old.get(key)!r}, now {new.get(key)!r})" for key in differing)
        raise AblationError(f"{folder}: run with another configuration: {listed}; {way_out}")


def finished_metrics(run: Run, folder: Path, *, test_data: str) -> dict | None:
    """metrics.json of a folder, if it is of the last step, these test data and the default beams; else None.

    Raises:
        AblationError: the run has another configuration.
        CheckpointError: unreadable metrics.json.
    """
    check_configuration(run, folder)
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    metrics = read_json(path)
    beams = metrics.get("captioning", {}).get("beams", CaptionOptions.beams)
    measured = metrics["training"]["steps"], metrics["evaluation"]["data"], beams
    return metrics if measured == (run.config.train.steps, test_data, CaptionOptions.beams) else None


def launcher() -> list[str]:
    """The DeepSpeed launcher with one rank, because the batch and so every loss depends on the number of ranks.

    A free port avoids conflicts with other runs on the machine.
    """
    program = Path(sys.executable).with_name("deepspeed")
    return [str(program), "--num_accelerators", "1", "--master_port", str(free_port())]


def carry_out(run: Run, *, test_data: str, start: Start) -> bool:
    """Trains, evaluates and records a run, skipping completed steps. False: the run was already recorded.

    Raises:
        AblationError: the run has another configuration, or a command did not finish.
    """
    if finished_metrics(run, run.record, test_data=test_data):
        return False
    if not finished_metrics(run, run.folder, test_data=test_data):
        train(run, start=start)
        evaluate(run, test_data=test_data, start=start)
    run.record.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "metrics.json"):
        write_atomically(run.record / name, (run.folder / name).read_text(encoding="utf-8"))
    return True


def train(run: Run, *, start: Start) -> None:
    done = run.folder / "done.json"
    if done.is_file():
        return
    options = ["--config", str(run.file), "--resume", "auto"]
    start([*launcher(), str(SCRIPTS / "pretrain.py"), *options, *run.overrides])
    if not done.is_file():
        raise AblationError(f"{run.folder}: training stopped before the end; run the command again to continue")


def evaluate(run: Run, *, test_data: str, start: Start) -> None:
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), str(run.folder)]
    start([*command, "--data", test_data, "--pairs", str(GALLERY)])
    if not finished_metrics(run, run.folder, test_data=test_data):
        expected = f"metrics.json of step {run.config.train.steps} on {test_data}"
        raise AblationError(f"{run.folder}: evaluation wrote no {expected}")


def start_process(command: Sequence[str]) -> None:
    """Runs a command to its end. Success is judged by its files, because ranks exit with 0 after a stop signal."""
    with subprocess.Popen(command) as process:
        try:
            process.wait()
        except KeyboardInterrupt:  # the command got the signal too and writes its checkpoint
            process.wait()
            raise


# -- all runs, and the table ------------------------------------------------------------------------------------------


def collect(plan: Plan, study: Study) -> ablation_table.Results:
    """The metrics of all recorded runs of a study, independent of the plan's rows and seeds."""
    found = {row.name: list(recorded_metrics(plan, study, row)) for row in study.rows}
    steps = make_run(plan, study, study.rows[0], 0).config.train.steps
    seeds = max(SEEDS, *map(len, found.values()))
    return ablation_table.Results(study, steps=steps, seeds=seeds, metrics=found)


def recorded_metrics(plan: Plan, study: Study, row: Row) -> Iterator[dict]:
    for folder in sorted((plan.record / study.method / row.name).glob("seed_*")):
        run = make_run(plan, study, row, int(folder.name.removeprefix("seed_")))
        if metrics := finished_metrics(run, folder, test_data=plan.test_data):
            yield metrics


def write_table(plan: Plan) -> None:
    text = ablation_table.render([collect(plan, study) for study in plan.studies])
    plan.table.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(plan.table, text)


def run_all(plan: Plan, *, start: Start = start_process) -> None:
    """Carries out every planned run. Writing the table first finds other configurations before hours of work."""
    write_table(plan)
    runs = list(planned_runs(plan))
    for number, run in enumerate(runs, 1):
        say(f"ablation: run {number} of {len(runs)}: {run.folder}")
        if carry_out(run, test_data=plan.test_data, start=start):
            write_table(plan)
        else:
            say("ablation: already recorded")


def parse(argv: list[str] | None) -> tuple[Plan, bool]:
    """The plan, and whether to write only the table."""
    names = [row.name for study in STUDIES for row in study.rows]
    parser = argparse.ArgumentParser(
        description="Train and evaluate the rows of both ablations, and write their table."
    )
    parser.add_argument("--seeds", type=positive, default=SEEDS, help=f"seeds per row, from 0 (default {SEEDS})")
    parser.add_argument("--steps", type=positive, default=0, help="shorter trial runs, in a folder of their own")
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--table-only", action="store_true", help="only write the table from the record")
    options = parser.parse_args(argv)
    plan = {"rows": tuple(options.rows), "seeds": options.seeds}
    if options.steps:
        folder = Path(f"runs/ablation_{options.steps}_steps")
        plan |= {"steps": options.steps, "runs": folder, "record": folder / "record", "table": folder / "ablation.md"}
    return Plan(**plan), options.table_only


def main(argv: list[str] | None = None) -> int:
    plan, table_only = parse(argv)
    try:
        write_table(plan) if table_only else run_all(plan)
    except (AblationError, CheckpointError, ConfigError, OSError) as error:
        say(f"ablation: {error}")
        return 1
    except KeyboardInterrupt:
        say("ablation: interrupted; run the command again to continue")
        return 130
    print(f"table: {plan.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
