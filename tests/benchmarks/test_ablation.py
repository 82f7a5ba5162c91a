"""The ablation: each row adds one change, runs resume, and the table shows the recorded runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.ablation import run as ablation
from benchmarks.ablation.rows import SEEN, STUDIES, UNSEEN
from benchmarks.studies import command, runs
from benchmarks.studies.command import run_all
from benchmarks.studies.runs import Plan, Run, carry_out
from benchmarks.studies.study import Study, StudyError
from benchmarks.studies.table import render
from softmask.evaluation import evaluate
from softmask.training import pretrain
from softmask.training.config import flatten, load_config
from tests.support.evaluation_files import write_scenes
from tests.support.study_fixtures import ALONE, STEPS, Fake, assert_starts, line_of, made_metrics, make_plan
from tests.support.train_fixtures import make_config, make_sycoca_config, rows, run_here
from tests.support.train_fixtures import write_shard as write_training_shard

STARTS, SYCOCA, SOFTMASK_PP = STUDIES
TABLES = (SYCOCA, SOFTMASK_PP)


def keys_of(study: Study, name: str) -> dict:
    (row,) = [row for row in study.rows if row.name == name]
    return flatten(load_config(study.config, row.overrides))


def differences(study: Study, one: str, other: str) -> dict:
    """Keys that differ between two rows, with the values of the second."""
    before, after = keys_of(study, one), keys_of(study, other)
    return {key: after[key] for key in after if before[key] != after[key]}


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", TABLES, ids=lambda study: study.name)
def test_rows_are_configurations_of_their_method_and_set_the_same_keys(study: Study) -> None:
    for row in study.rows:
        assert load_config(study.config, row.overrides).method == study.name
    (keys,) = {tuple(override.partition("=")[0] for override in row.overrides) for row in study.rows}
    varied = {key for row in study.rows for key in differences(study, study.rows[0].name, row.name)}
    assert varied == set(keys)
    names = [row.name for one in STUDIES for row in one.rows]
    assert len(set(names)) == len(names)


def test_sycoca_rows_add_one_change_each() -> None:
    assert differences(SYCOCA, "itc", "coca") == {"model.weights.caption": 2.0}
    assert differences(SYCOCA, "coca", "attentive_ic") == {"model.caption_masking": "tokens"}
    assert differences(SYCOCA, "coca", "random_tgmim") == {"model.reconstruct": True, "model.masks": "random"}
    assert differences(SYCOCA, "attentive_ic", "sycoca") == {"model.reconstruct": True}
    assert keys_of(SYCOCA, "sycoca") == flatten(load_config(SYCOCA.config)), "the demo must be the full SyCoCa"


@pytest.mark.parametrize("name", [row.name for study in TABLES for row in study.rows])
def test_rows_can_start_from_their_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dataclasses.replace(make_plan(tmp_path, name, seeds=1), studies=STUDIES)
    (run,) = runs.planned_runs(plan)
    assert_starts(run, tmp_path, monkeypatch)


def test_softmask_rows_add_one_change_to_albef_and_the_last_has_all() -> None:
    added = {
        "soft_mask": {"model.soft_mask": True},
        "focal": {"model.gamma": 1.0},
        "augmentation": {"model.mask_text": "all", "data.distort": True},
    }
    for name, expected in added.items():
        assert differences(SOFTMASK_PP, "albef", name) == expected
    together = {key: value for keys in added.values() for key, value in keys.items()}
    assert differences(SOFTMASK_PP, "albef", "all") == together
    albef = keys_of(SOFTMASK_PP, "albef")
    assert (albef["model.soft_mask"], albef["model.gamma"], albef["model.mask_text"]) == (False, 0.0, "mlm")


@pytest.mark.parametrize("study", TABLES, ids=lambda study: study.name)
def test_every_row_but_the_first_adds_to_another_and_has_the_papers_figures(study: Study) -> None:
    first, *others = study.rows
    names = [row.name for row in study.rows]
    assert not first.base and all(row.base in names[: names.index(row.name)] for row in others)
    assert all(len(row.published) == len(study.published) for row in study.rows)


def test_rows_of_a_seed_start_from_the_same_run_of_the_contrastive_loss_alone() -> None:
    for study, start, first in zip(TABLES, STARTS.rows[::-1], ("itc", "albef"), strict=True):
        assert {row.init for row in study.rows} == {f"{STARTS.name}/{start.name}"}
        own = flatten(load_config(start.config or STARTS.config, start.overrides))
        base = keys_of(study, first)
        changed = {key for key in own if own[key] != base[key]}
        phase = {"model.contrast_steps"} if study is SOFTMASK_PP else set()
        assert changed == {"train.steps", "optimizer.lr", "optimizer.warmup_steps"} | phase
        assert own.get("model.contrast_steps", 700) == own["train.steps"] == 700


# -- resuming ---------------------------------------------------------------------------------------------------------


def one_run(folder: Path, **options) -> Run:
    (run,) = runs.planned_runs(make_plan(folder, "coca", seeds=1, **options))
    return run


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    plan, fake = make_plan(tmp_path, "coca", "sycoca", seeds=2), Fake()
    run_all(plan, start=fake)
    assert fake.calls == ["pretrain", "evaluate", "evaluate"] * 4
    run_all(dataclasses.replace(plan, seeds=3), start=fake)
    assert fake.calls == ["pretrain", "evaluate", "evaluate"] * 6
    folders = sorted(path.parent.relative_to(plan.record).as_posix() for path in plan.record.rglob("seen.json"))
    assert folders == [f"sycoca/{row}/seed_{seed}" for row in ("coca", "sycoca") for seed in range(3)]


def test_record_alone_gives_the_table_and_skips_the_run(tmp_path: Path) -> None:
    """As in a new clone, which has a record but no runs."""
    plan, fake = make_plan(tmp_path, "coca", seeds=1), Fake()
    run_all(plan, start=fake)
    table = plan.table.read_text(encoding="utf-8")
    assert line_of(table, "CoCa (ITC + IC)")[2:5] == ["1 of 5, not finished", "50.0", ""]
    shutil.rmtree(plan.runs)
    plan.table.unlink()
    run_all(plan, start=fake)
    assert plan.table.read_text(encoding="utf-8") == table and fake.calls == ["pretrain", "evaluate", "evaluate"]


def test_table_shows_all_recorded_rows_not_only_the_planned(tmp_path: Path) -> None:
    fake = Fake()
    run_all(make_plan(tmp_path, "coca", seeds=6), start=fake)
    plan = make_plan(tmp_path, "itc", seeds=1)
    run_all(plan, start=fake)
    table = plan.table.read_text(encoding="utf-8")
    assert line_of(table, "CoCa (ITC + IC)")[2] == "6" and line_of(table, "ITC")[2] == "1 of 6, not finished"


def test_a_finished_run_without_a_record_is_recorded(tmp_path: Path) -> None:
    run, fake = one_run(tmp_path), Fake()
    carry_out(run, start=fake)
    shutil.rmtree(run.record)
    assert carry_out(run, start=fake)
    assert fake.calls == ["pretrain", "evaluate", "evaluate"]
    for name in ("config.yaml", "unseen.json", "seen.json"):
        assert (run.record / name).read_text() == (run.folder / name).read_text()


def test_readme_is_generated_from_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also checks that every recorded run has the current configuration of its row."""
    monkeypatch.chdir(Path(ablation.__file__).resolve().parents[2])
    plan = ablation.WHOLE
    results = [command.collect(plan, study) for study in plan.studies]
    expected = render(plan.introduction, results)
    assert expected == plan.table.read_text(encoding="utf-8"), "python -m benchmarks.ablation.run --table-only"
    recorded = len(list(plan.record.rglob("config.yaml")))
    assert recorded == sum(len(row) for study in results for row in study.measured.values())


def test_all_rows_run_one_seed_before_the_next(tmp_path: Path) -> None:
    planned = list(runs.planned_runs(make_plan(tmp_path, "itc", "albef", seeds=2)))
    assert [(run.folder.parent.name, run.config.seed) for run in planned] == [
        ("itc", 0), ("albef", 0), ("itc", 1), ("albef", 1),
    ]  # fmt: skip
    assert all(run.config.output == str(run.folder) for run in planned)


def test_stopped_run_continues_and_the_error_names_it(tmp_path: Path) -> None:
    run, fake = one_run(tmp_path), Fake(stops=1)
    with pytest.raises(StudyError, match="coca/seed_0: training stopped before the end"):
        carry_out(run, start=fake)
    assert carry_out(run, start=fake)
    assert fake.calls == ["pretrain", "pretrain", "evaluate", "evaluate"]


def test_only_the_evaluation_whose_metrics_are_missing_or_differ_is_repeated(tmp_path: Path) -> None:
    run, fake = one_run(tmp_path), Fake()
    carry_out(run, start=fake)
    for folder in (run.folder, run.record):
        (folder / "unseen.json").unlink()
    assert carry_out(run, start=fake)
    options = list(run.evaluations[SEEN])
    for other in (
        made_metrics(steps=STEPS - 1) | {"options": options},
        made_metrics() | {"options": [*options, "--beams", "6"]},
        made_metrics(),
    ):
        for folder in (run.folder, run.record):
            (folder / "seen.json").write_text(json.dumps(other))
        assert carry_out(run, start=fake)
    assert fake.calls == ["pretrain", *["evaluate"] * 6]
    fake.metrics["training"]["steps"] = STEPS - 1
    with pytest.raises(StudyError, match=f"seen.json: evaluation wrote no metrics of step {STEPS}"):
        carry_out(dataclasses.replace(run, evaluations=run.evaluations | {SEEN: ("--data", "other.tar")}), start=fake)


def test_a_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    """Even where only keys differ that the trainer lets a resumed run change."""
    run, fake = one_run(tmp_path), Fake()
    carry_out(run, start=fake)
    harmless = load_config(run.file, [*run.overrides, "train.log_every=5", "data.workers=0"])
    assert not carry_out(dataclasses.replace(run, config=harmless), start=fake)
    changed = load_config(run.file, [*run.overrides, "optimizer.lr=0.5", "train.steps=9"])
    differing = rf"train.steps \(was {STEPS}, now 9\), optimizer.lr \(was 0.0005, now"
    message = f"seed_0: run with another configuration: {differing}"
    with pytest.raises(StudyError, match=message):
        carry_out(dataclasses.replace(run, config=changed), start=fake)
    shutil.rmtree(run.record)
    with pytest.raises(StudyError, match="runs/.*" + message):
        carry_out(dataclasses.replace(run, config=changed), start=fake)
    run.record.mkdir()
    (run.record / "config.yaml").write_text("output: here\ntrain: {steps: 1}\nmodel: {forgotten: 1}\n")
    with pytest.raises(StudyError, match=r"config.yaml: not a configuration of this version: model.forgotten"):
        run_all(make_plan(tmp_path, "itc", seeds=1), start=fake)
    assert fake.calls == ["pretrain", "evaluate", "evaluate"]


def test_after_a_failed_run_no_other_one_starts(tmp_path: Path) -> None:
    fake = Fake(stops=1)
    with pytest.raises(StudyError, match="itc/seed_0: training stopped before the end"):
        run_all(make_plan(tmp_path, "itc", "coca", "sycoca", seeds=1), start=fake)
    assert fake.calls.count("pretrain") <= 2  # the pool's one worker may have taken the next run before the error came


def test_runs_side_by_side_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.os, "cpu_count", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    for jobs, expected in ((1, "5"), (2, "3"), (9, "1")):
        path = tmp_path / str(jobs)
        program = f"import os, pathlib; pathlib.Path({str(path)!r}).write_text(os.environ['OMP_NUM_THREADS'])"
        runs.start_process([sys.executable, "-c", program], jobs=jobs)
        assert path.read_text() == expected
    met = threading.Barrier(2, timeout=30)  # broken unless two runs are there at once

    class Meeting(Fake):
        def train(self, config: str, overrides: Sequence[str]) -> None:
            met.wait()
            super().train(config, overrides)

    plan = make_plan(tmp_path, "itc", "coca", seeds=1, jobs=2)
    run_all(plan, start=Meeting())
    assert len(list(plan.record.rglob("seen.json"))) == 2


def parsed(*argv: str) -> tuple[Plan, bool]:
    return command.parse(list(argv), ablation.WHOLE, description="")


def test_shorter_runs_keep_the_proportions_and_have_their_own_folder() -> None:
    plan, table_only = parsed("--steps", "78", "--rows", "all", "--seeds", "1")
    (run,) = runs.planned_runs(plan)
    config = run.config
    assert (config.train.steps, config.optimizer.warmup_steps, config.model.contrast_steps) == (78, 7, 0)
    assert plan.table == Path("runs/ablation_78_steps/table.md") and plan.table.parent in run.folder.parents
    assert plan.table.parent in run.record.parents
    assert not table_only and parsed("--table-only")[1]
    whole = parsed()[0]
    assert (whole.runs, whole.record) == (Path("runs/ablation"), Path("benchmarks/ablation/record"))


# -- the commands themselves ------------------------------------------------------------------------------------------


def run_in_this_process(command: Sequence[str]) -> None:
    """Run what the two scripts run, without a launcher or a new process."""
    script = next(number for number, word in enumerate(command) if word.endswith(".py"))
    arguments = list(command[script + 1 :])
    if command[script].endswith("evaluate.py"):
        assert evaluate.main(arguments) == 0
        return
    options = pretrain.parse_arguments(arguments)
    config = load_config(options.config, options.overrides)
    assert run_here(config, checkpoint=pretrain.choose_checkpoint(config, options.resume)).finished


def test_two_rows_from_data_to_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ITC trains without a gradient for the caption decoder; SoftMask++ has every figure."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # for the main thread, and this runs in another one
    write_training_shard(tmp_path / "train.tar", count=32)
    make_config(tmp_path)  # writes base.yaml, of SoftMask++
    make_sycoca_config(tmp_path, "sycoca")
    configs = (tmp_path / "sycoca.yaml", tmp_path / "base.yaml")
    data = dict.fromkeys((UNSEEN, SEEN), ("--data", write_scenes(tmp_path / "test.tar"), "--pairs", "256"))
    studies = tuple(
        dataclasses.replace(study, config=path, evaluations=data) for study, path in zip(ALONE, configs, strict=True)
    )
    plan = make_plan(tmp_path, "itc", "all", seeds=1, steps=2, studies=studies)
    run_all(plan, start=run_in_this_process)
    text = plan.table.read_text(encoding="utf-8")
    for study, title in zip(studies, ("ITC", "SoftMask++ (all)"), strict=True):
        cells = line_of(text, title)[3 : 3 + len(study.figures)]
        assert all(0 <= float(cell) <= 100 for cell in cells if cell) and sum(map(bool, cells)) >= 2
    assert text.count("retrieval among 12 images") == 2 and text.count("0 of 5, not finished") == 8
    assert rows(plan.runs / "sycoca/itc/seed_0")[-1].keys() & {"itc", "caption"} == {"itc"}
