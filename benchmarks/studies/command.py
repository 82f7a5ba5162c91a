"""The command of studies: carries out the planned runs and writes their tables after each one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from benchmarks.studies import table as tables
from benchmarks.studies.runs import Plan, Run, Start, carry_out, finished_metrics, make_run, planned_runs, start_process
from benchmarks.studies.study import Measured, Row, Study, StudyError
from softmask.arguments import positive
from softmask.files import write_atomically
from softmask.training.checkpoint.state import CheckpointError
from softmask.training.config import ConfigError
from softmask.training.logs import say


def collect(plan: Plan, study: Study) -> tables.Results:
    """The metrics of all recorded runs of a study, independent of the plan's rows and seeds."""
    found = {row.name: dict(recorded_metrics(plan, study, row)) for row in study.rows}
    steps = make_run(plan, study, study.rows[0], 0).config.train.steps
    seeds = max(plan.expected, *map(len, found.values()))
    return tables.Results(study, steps=steps, seeds=seeds, measured=found)


def recorded_metrics(plan: Plan, study: Study, row: Row) -> Iterator[tuple[int, Measured]]:
    """Seeds and their metrics."""
    for folder in sorted((plan.record / study.name / row.name).glob("seed_*")):
        seed = int(folder.name.removeprefix("seed_"))
        run = make_run(plan, study, row, seed)
        if measured := finished_metrics(run, folder):
            yield seed, measured


def write_table(plan: Plan) -> None:
    text = tables.render(plan.introduction, [collect(plan, study) for study in plan.studies])
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
    say(f"{plan.table.parent.name}: run {number}: {run.folder}")
    new = carry_out(run, start=start or partial(start_process, jobs=plan.jobs))
    if not new:
        say(f"{plan.table.parent.name}: already recorded: {run.folder}")
    return new


def parse(argv: list[str] | None, whole: Plan, *, description: str) -> tuple[Plan, bool]:
    """The plan, a part of the whole one, and whether to write only the table."""
    names = [row.name for study in whole.studies for row in study.rows]
    parser = argparse.ArgumentParser(description=description)
    seeds = range(1, tables.MOST_SEEDS + 1)
    parser.add_argument(
        "--seeds", type=int, choices=seeds, default=whole.seeds, metavar="N",
        help=f"seeds per row, from 0, at most {seeds[-1]} (default {whole.seeds})",
    )  # fmt: skip
    parser.add_argument("--jobs", type=positive, default=1, help="runs side by side, which share the cores (default 1)")
    parser.add_argument("--steps", type=positive, default=0, help="shorter trial runs, in a folder of their own")
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--table-only", action="store_true", help="only write the table from the record")
    options = parser.parse_args(argv)
    places = {"runs": whole.runs, "record": whole.record, "table": whole.table}
    if options.steps:
        folder = whole.runs.with_name(f"{whole.runs.name}_{options.steps}_steps")
        places = {"runs": folder, "record": folder / "record", "table": folder / "table.md"}
    plan = Plan(
        studies=whole.studies,
        rows=tuple(options.rows),
        seeds=options.seeds,
        expected=whole.seeds,
        jobs=options.jobs,
        steps=options.steps,
        introduction=whole.introduction,
        **places,
    )
    return plan, options.table_only


def main(argv: list[str] | None, whole: Plan, *, description: str) -> int:
    """The command line. Returns the exit status."""
    plan, table_only = parse(argv, whole, description=description)
    name = whole.table.parent.name
    try:
        write_table(plan) if table_only else run_all(plan)
    except (StudyError, CheckpointError, ConfigError, OSError) as error:
        say(f"{name}: {error}")
        return 1
    except KeyboardInterrupt:
        say(f"{name}: interrupted; run the command again to continue")
        return 130
    print(f"table: {plan.table}")
    return 0


def whole_plan(folder: Path, studies: tuple[Study, ...], *, seeds: int, introduction: str) -> Plan:
    """All rows of the studies in benchmarks/`folder`."""
    names = tuple(row.name for study in studies for row in study.rows)
    return Plan(
        studies=studies,
        rows=names,
        seeds=seeds,
        expected=seeds,
        runs=Path("runs") / folder.name,
        record=folder / "record",
        table=folder / "README.md",
        introduction=introduction,
    )
