"""Tasks after pre-training beside their baselines: what each row starts from, and runs that others share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.downstream import run as downstream
from benchmarks.downstream.rows import STUDIES, TEST
from benchmarks.studies import command, runs
from benchmarks.studies.runs import Plan, Run
from benchmarks.studies.study import Study
from benchmarks.studies.table import render
from softmask.training.config import flatten, load_config
from tests.support.study_fixtures import Fake, assert_starts
from tests.support.train_fixtures import ROOT


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def made_plan(folder: Path, *rows: str, **options: Any) -> Plan:
    places = {"runs": folder / "runs", "record": folder / "record", "table": folder / "table.md"}
    return Plan(**{"studies": STUDIES, "rows": rows, "seeds": 1, "expected": 3} | places | options)


def run_of(folder: Path, name: str) -> Run:
    (run,) = runs.planned_runs(made_plan(folder, name))
    return run


@pytest.mark.parametrize("study", STUDIES[1:], ids=lambda study: study.name)
def test_baselines_differ_from_the_task_in_one_thing(study: Study, tmp_path: Path) -> None:
    found = {row.name: run_of(tmp_path, row.name) for row in study.rows}
    tuned = found[study.name]
    assert tuned.config.task == study.name and tuned.base is not None
    assert tuned.file == Path(f"train/configs/demo_tasks/{study.name}.yaml"), "the row must be what make finetune runs"
    assert len(tuned.overrides) == 3, "seed, output and init alone"

    def changed(name: str) -> dict[str, Any]:
        before, after = flatten(tuned.config), flatten(found[name].config)
        return {key: after[key] for key in after if before.get(key) != after[key] and key not in ("init", "output")}

    assert changed(f"{study.name}_scratch") == {}
    assert changed(f"{study.name}_longer") == {"train.steps": 3 * tuned.config.train.steps}
    if f"{study.name}_text" in found:
        assert changed(f"{study.name}_text") == {"data.blank": True}
    for ending in ("_scratch", "_longer"):
        first = found[study.name + ending].base
        while first.base is not None:
            first = first.base
        assert first.config.train.steps == 1 and first.config.optimizer.lr < 1e-20
    continued = found.get(f"{study.name}_continued")
    if continued is not None:
        assert continued.script == "pretrain" and continued.config.train.steps == tuned.config.train.steps
        assert continued.base == tuned.base


@pytest.mark.parametrize(
    "name", [row.name for study in STUDIES for row in study.rows if row.init and row.script is not None]
)
def test_rows_can_start_from_their_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_starts(run_of(tmp_path, name), tmp_path, monkeypatch)


class Commands(Fake):
    """Its metrics are of the last step of the evaluated run."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluated: list[tuple[Path, Path]] = []  # run, output

    def evaluate(self, run: Path, data: str, output: Path) -> None:
        self.evaluated.append((run, output))
        self.metrics["training"]["steps"] = load_config(run / "config.yaml").train.steps
        super().evaluate(run, data, output)


def test_runs_that_others_start_from_are_trained_once_and_when_needed(tmp_path: Path) -> None:
    fake = Commands()
    plan = made_plan(tmp_path, "snli_ve", "snli_ve_text", "retrieval_zero_shot")
    command.run_all(plan, start=fake)
    assert fake.calls == ["pretrain", "finetune", "evaluate", "finetune", "evaluate", "evaluate"]
    measured, output = fake.evaluated[-1]
    assert measured == tmp_path / "runs/bases/demo/seed_0"
    assert output == tmp_path / f"runs/retrieval/retrieval_zero_shot/seed_0/{TEST}.json"
    recorded = sorted(path.parent.parent.name for path in plan.record.rglob("config.yaml"))
    assert recorded == ["retrieval_zero_shot", "snli_ve", "snli_ve_text"]
    command.run_all(plan, start=fake)
    assert len(fake.calls) == 6
    shutil.rmtree(plan.runs)
    command.run_all(plan, start=fake)
    assert len(fake.calls) == 6, "the record alone is enough"


def test_text_assignment_comes_before_nlvr2(tmp_path: Path) -> None:
    fake = Commands()
    command.run_all(made_plan(tmp_path, "nlvr2", "nlvr2_scratch"), start=fake)
    assert fake.calls == ["pretrain", "finetune", "finetune", "evaluate"] * 2
    folders = sorted(path.parent.relative_to(tmp_path / "runs").as_posix() for path in tmp_path.rglob("done.json"))
    assert folders == [
        "bases/assigned/seed_0", "bases/assigned_scratch/seed_0", "bases/demo/seed_0", "bases/untrained/seed_0",
        "nlvr2/nlvr2/seed_0", "nlvr2/nlvr2_scratch/seed_0",
    ]  # fmt: skip


def test_the_best_checkpoints_metrics_count_as_the_runs(tmp_path: Path) -> None:
    fake = Commands()
    plan = made_plan(tmp_path, "snli_ve")
    command.run_all(plan, start=fake)
    (path,) = plan.record.rglob(f"{TEST}.json")
    metrics = json.loads(path.read_text())
    for steps, calls in ((250, 3), (5000, 4)):
        path.write_text(json.dumps(metrics | {"training": {"steps": steps}}))
        (plan.runs / "snli_ve/snli_ve/seed_0" / path.name).write_text(path.read_text())
        command.run_all(plan, start=fake)
        assert len(fake.calls) == calls


def test_readme_is_generated_from_the_record() -> None:
    plan = downstream.WHOLE
    expected = render(plan.introduction, [command.collect(plan, study) for study in plan.studies])
    assert expected == plan.table.read_text(encoding="utf-8"), "python -m benchmarks.downstream.run --table-only"
