"""Train and evaluate the rows of both ablations with several seeds, and write benchmarks/ablation/README.md.

    python -m benchmarks.ablation.run [--seeds 5] [--jobs 2] [--rows coca sycoca] [--steps 20] [--table-only]

A run is a row with a seed, in runs/ablation/<method>/<row>/seed_<n>: `deepspeed train/pretrain.py --resume auto` on one
rank, then `train/evaluate.py` on an artist that training never sees and on those of training. Its configuration and
metrics are copied to benchmarks/ablation/record, which is under version control. The table is built from this record,
and recorded runs are skipped. Unfinished runs continue from their checkpoint; runs of another configuration are an
error. All rows run with the first seed before the next one, and the table is rewritten after every run. `--jobs` runs
go side by side and share the cores. `--steps` is for trials: their runs, record and table go to
runs/ablation_<steps>_steps, and warm-up and the steps of a first phase are shortened in proportion.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.ablation import table as ablation_table
from benchmarks.ablation.rows import SEEN, STUDIES, UNSEEN, AblationError, Measured, Row, Study
from softmask.arguments import positive
from softmask.evaluation.captioning import CaptionOptions
from softmask.files import write_atomically
from softmask.training.checkpoint.state import CheckpointError, read_json
from softmask.training.config import Config, ConfigError, flatten, load_config
from softmask.training.launchers import free_port
from softmask.training.logs import say

SCRIPTS = Path(__file__).resolve().parents[2] / "train"
TEST_DATA = {UNSEEN: "data/artists/test-*.tar", SEEN: "data/artists/seen-*.tar"}
GALLERY = 256  # images in the retrieval gallery
SEEDS = 5  # per row
PHASES = ("contrast_steps", "caption_whole_steps")  # options of the models: first steps that differ from the others
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
    jobs: int = 1  # runs side by side
    steps: int = 0  # steps per run; 0: those of the configuration
    runs: Path = Path("runs/ablation")
    record: Path = Path("benchmarks/ablation/record")
    table: Path = Path("benchmarks/ablation/README.md")
    studies: tuple[Study, ...] = STUDIES
    test_data: Mapping[str, str] = field(default_factory=lambda: TEST_DATA)


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
    """Overrides for fewer steps, with warm-up and phases shortened in proportion."""
    share = steps / config.train.steps
    overrides = [f"train.steps={steps}", f"optimizer.warmup_steps={round(share * config.optimizer.warmup_steps)}"]
    phases = {name: getattr(config.model, name) for name in PHASES if hasattr(config.model, name)}
    return overrides + [f"model.{name}={round(share * length)}" for name, length in phases.items()]


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


def finished_metrics(run: Run, folder: Path, *, test_data: Mapping[str, str]) -> Measured | None:
    """The metrics in a folder, if all are of the last step, these test data and the default beams; else None.

    Raises:
        AblationError: the run has another configuration.
        CheckpointError: an unreadable file of metrics.
    """
    check_configuration(run, folder)
    found = {hand: metrics for hand in test_data if (metrics := hand_metrics(run, folder, hand, test_data[hand]))}
    return found if len(found) == len(test_data) else None


def hand_metrics(run: Run, folder: Path, hand: str, data: str) -> dict | None:
    """The metrics on one hand's data; None if there are none of this run's last step."""
    path = folder / f"{hand}.json"
    if not path.is_file():
        return None
    metrics = read_json(path)
    beams = metrics.get("captioning", {}).get("beams", CaptionOptions.beams)
    measured = metrics["training"]["steps"], metrics["evaluation"]["data"], beams
    return metrics if measured == (run.config.train.steps, data, CaptionOptions.beams) else None


def launcher() -> list[str]:
    """The DeepSpeed launcher with one rank, because the batch and so every loss depends on the number of ranks.

    A free port avoids conflicts with other runs on the machine.
    """
    program = Path(sys.executable).with_name("deepspeed")
    return [str(program), "--num_accelerators", "1", "--master_port", str(free_port())]


def carry_out(run: Run, *, test_data: Mapping[str, str], start: Start) -> bool:
    """Trains, evaluates and records a run, skipping completed steps. False: the run was already recorded.

    Raises:
        AblationError: the run has another configuration, or a command did not finish.
    """
    if finished_metrics(run, run.record, test_data=test_data):
        return False
    check_configuration(run, run.folder)
    train(run, start=start)
    for hand, data in test_data.items():
        evaluate(run, hand=hand, data=data, start=start)
    run.record.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", *(f"{hand}.json" for hand in test_data)):
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


def evaluate(run: Run, *, hand: str, data: str, start: Start) -> None:
    if hand_metrics(run, run.folder, hand, data):
        return
    output = run.folder / f"{hand}.json"
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), str(run.folder)]
    start([*command, "--data", data, "--pairs", str(GALLERY), "--output", str(output)])
    if not hand_metrics(run, run.folder, hand, data):
        raise AblationError(f"{output}: evaluation wrote no metrics of step {run.config.train.steps} on {data}")


def start_process(command: Sequence[str], *, jobs: int) -> None:
    """Runs a command to its end. Success is judged by its files, because ranks exit with 0 after a stop signal.

    Ctrl-C reaches the command too, which then writes its checkpoint.
    """
    threads = max((os.cpu_count() or 1) // jobs, 1)
    environment = os.environ if jobs == 1 else os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, env=environment, check=False)


# -- all runs, and the table ------------------------------------------------------------------------------------------


def collect(plan: Plan, study: Study) -> ablation_table.Results:
    """The metrics of all recorded runs of a study, independent of the plan's rows and seeds."""
    found = {row.name: dict(recorded_metrics(plan, study, row)) for row in study.rows}
    steps = make_run(plan, study, study.rows[0], 0).config.train.steps
    seeds = max(SEEDS, *map(len, found.values()))
    return ablation_table.Results(study, steps=steps, seeds=seeds, measured=found)


def recorded_metrics(plan: Plan, study: Study, row: Row) -> Iterator[tuple[int, Measured]]:
    """Seeds and their metrics."""
    for folder in sorted((plan.record / study.method / row.name).glob("seed_*")):
        seed = int(folder.name.removeprefix("seed_"))
        run = make_run(plan, study, row, seed)
        if measured := finished_metrics(run, folder, test_data=plan.test_data):
            yield seed, measured


def write_table(plan: Plan) -> None:
    text = ablation_table.render([collect(plan, study) for study in plan.studies])
    plan.table.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(plan.table, text)


def run_all(plan: Plan, *, start: Start | None = None) -> None:
    """Carries out every planned run. Writing the table first finds other configurations before hours of work.

    After a failed run no other one starts; those that run are finished and recorded.
    """
    write_table(plan)
    runs = list(planned_runs(plan))
    with ThreadPoolExecutor(plan.jobs) as pool:
        started = [
            pool.submit(carry_out_and_say, plan, run, f"{number} of {len(runs)}", start=start)
            for number, run in enumerate(runs, 1)
        ]
        try:
            for finished in as_completed(started):
                if finished.result():
                    write_table(plan)
        finally:
            pool.shutdown(cancel_futures=True)
            write_table(plan)


def carry_out_and_say(plan: Plan, run: Run, number: str, *, start: Start | None) -> bool:
    say(f"ablation: run {number}: {run.folder}")
    new = carry_out(run, test_data=plan.test_data, start=start or partial(start_process, jobs=plan.jobs))
    if not new:
        say(f"ablation: already recorded: {run.folder}")
    return new


def parse(argv: list[str] | None) -> tuple[Plan, bool]:
    """The plan, and whether to write only the table."""
    names = [row.name for study in STUDIES for row in study.rows]
    parser = argparse.ArgumentParser(
        description="Train and evaluate the rows of both ablations, and write their table."
    )
    seeds = range(1, ablation_table.MOST_SEEDS + 1)
    parser.add_argument(
        "--seeds", type=int, choices=seeds, default=SEEDS, metavar="N",
        help=f"seeds per row, from 0, at most {seeds[-1]} (default {SEEDS})",
    )  # fmt: skip
    parser.add_argument("--jobs", type=positive, default=1, help="runs side by side, which share the cores (default 1)")
    parser.add_argument("--steps", type=positive, default=0, help="shorter trial runs, in a folder of their own")
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--table-only", action="store_true", help="only write the table from the record")
    options = parser.parse_args(argv)
    plan = {"rows": tuple(options.rows), "seeds": options.seeds, "jobs": options.jobs}
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
