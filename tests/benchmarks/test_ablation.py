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
from benchmarks.ablation import table as ablation_table
from benchmarks.ablation.rows import SEEN, STUDIES, UNSEEN, Study
from benchmarks.ablation.run import AblationError, Plan, Run, carry_out, run_all
from benchmarks.ablation.table import Difference, Results, difference, render
from softmask.evaluation import evaluate
from softmask.training import pretrain
from softmask.training.config import flatten, load_config, save_config
from tests.support.evaluation_files import write_scenes
from tests.support.train_fixtures import make_config, make_sycoca_config, rows, run_here
from tests.support.train_fixtures import write_shard as write_training_shard

SYCOCA, SOFTMASK_PP = STUDIES
STEPS = load_config(SYCOCA.config).train.steps


def keys_of(study: Study, name: str) -> dict:
    (row,) = [row for row in study.rows if row.name == name]
    return flatten(load_config(study.config, row.overrides))


def differences(study: Study, one: str, other: str) -> dict:
    """Keys that differ between two rows, with the values of the second."""
    before, after = keys_of(study, one), keys_of(study, other)
    return {key: after[key] for key in after if before[key] != after[key]}


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.method)
def test_rows_are_configurations_of_their_method_and_set_the_same_keys(study: Study) -> None:
    for row in study.rows:
        assert load_config(study.config, row.overrides).method == study.method
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


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.method)
def test_every_row_but_the_first_adds_to_another_and_has_the_papers_figures(study: Study) -> None:
    first, *others = study.rows
    names = [row.name for row in study.rows]
    assert not first.base and all(row.base in names[: names.index(row.name)] for row in others)
    assert all(len(row.published) == len(study.published) for row in study.rows)


# -- resuming ---------------------------------------------------------------------------------------------------------


def made_metrics(*, itc: float = 0.5, itm: float = 0.5, pointing: float = 0.5, steps: int = STEPS, images: int = 256):
    """metrics.json in which all recalls of a stage are equal, without its test data."""
    stages = {name: {way: dict.fromkeys(("r1", "r5", "r10"), share) for way in ("i2t", "t2i")}
              for name, share in (("itc", itc), ("itm", itm))}  # fmt: skip
    return {
        "retrieval": {"images": images, **stages},
        "grounding": {"pointing": pointing},
        "training": {"steps": steps},
    }


def measured_of(unseen: dict, seen: dict | None = None) -> dict[str, dict]:
    return {UNSEEN: unseen, SEEN: seen or made_metrics()}


class Fake:
    """Replaces the two commands: writes the files they would write, and records the calls."""

    def __init__(self, *, stops: int = 0, steps: int = STEPS) -> None:
        self.calls: list[str] = []
        self.stops = stops  # number of trainings that end early
        self.metrics = made_metrics(steps=steps)

    def __call__(self, command: Sequence[str]) -> None:
        scripts = [Path(word).stem for word in command if word.endswith(".py")]
        self.calls += scripts
        if scripts == ["pretrain"]:
            self.train(command[command.index("auto") + 1 :])
        else:
            data, output = (command[command.index(option) + 1] for option in ("--data", "--output"))
            Path(output).write_text(json.dumps(self.metrics | {"evaluation": {"data": data}}))

    def train(self, overrides: Sequence[str]) -> None:
        (output,) = [word.removeprefix("output=") for word in overrides if word.startswith("output=")]
        study = next(study for study in STUDIES if study.method in Path(output).parts)
        Path(output).mkdir(parents=True, exist_ok=True)
        save_config(load_config(study.config, overrides), Path(output) / "config.yaml")
        if self.stops:
            self.stops -= 1
        else:
            (Path(output) / "done.json").write_text("{}")


def make_plan(folder: Path, *rows: str, **options) -> Plan:
    return Plan(rows=rows, runs=folder / "runs", record=folder / "record", table=folder / "ablation.md", **options)


def one_run(folder: Path, **options) -> Run:
    (run,) = ablation.planned_runs(make_plan(folder, "coca", seeds=1, **options))
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
    carry_out(run, test_data=ablation.TEST_DATA, start=fake)
    shutil.rmtree(run.record)
    assert carry_out(run, test_data=ablation.TEST_DATA, start=fake)
    assert fake.calls == ["pretrain", "evaluate", "evaluate"]
    for name in ("config.yaml", "unseen.json", "seen.json"):
        assert (run.record / name).read_text() == (run.folder / name).read_text()


def test_readme_is_generated_from_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also checks that every recorded run has the current configuration of its row."""
    monkeypatch.chdir(Path(ablation.__file__).resolve().parents[2])
    plan, _ = ablation.parse([])
    results = [ablation.collect(plan, study) for study in plan.studies]
    assert render(results) == plan.table.read_text(encoding="utf-8"), "python -m benchmarks.ablation.run --table-only"
    recorded = len(list(plan.record.rglob("config.yaml")))
    assert recorded == sum(len(row) for study in results for row in study.measured.values())


def test_all_rows_run_one_seed_before_the_next(tmp_path: Path) -> None:
    runs = list(ablation.planned_runs(make_plan(tmp_path, "itc", "albef", seeds=2)))
    assert [(run.folder.parent.name, run.config.seed) for run in runs] == [
        ("itc", 0), ("albef", 0), ("itc", 1), ("albef", 1),
    ]  # fmt: skip
    assert all(run.config.output == str(run.folder) for run in runs)


def test_stopped_run_continues_and_the_error_names_it(tmp_path: Path) -> None:
    run, fake = one_run(tmp_path), Fake(stops=1)
    with pytest.raises(AblationError, match="coca/seed_0: training stopped before the end"):
        carry_out(run, test_data=ablation.TEST_DATA, start=fake)
    assert carry_out(run, test_data=ablation.TEST_DATA, start=fake)
    assert fake.calls == ["pretrain", "pretrain", "evaluate", "evaluate"]


def test_only_the_evaluation_whose_metrics_are_missing_or_differ_is_repeated(tmp_path: Path) -> None:
    run, fake = one_run(tmp_path), Fake()
    carry_out(run, test_data=ablation.TEST_DATA, start=fake)
    for folder in (run.folder, run.record):
        (folder / "unseen.json").unlink()
    assert carry_out(run, test_data=ablation.TEST_DATA, start=fake)
    data = {"evaluation": {"data": ablation.TEST_DATA[SEEN]}}
    for other in (made_metrics(steps=250) | data, made_metrics() | data | {"captioning": {"beams": 6}}):
        for folder in (run.folder, run.record):
            (folder / "seen.json").write_text(json.dumps(other))
        assert carry_out(run, test_data=ablation.TEST_DATA, start=fake)
    assert fake.calls == ["pretrain", *["evaluate"] * 5]
    fake.metrics["training"]["steps"] = 250
    with pytest.raises(AblationError, match=f"seen.json: evaluation wrote no metrics of step {STEPS} on other.tar"):
        carry_out(run, test_data=ablation.TEST_DATA | {SEEN: "other.tar"}, start=fake)


def test_a_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    """Even where only keys differ that the trainer lets a resumed run change."""
    run, fake = one_run(tmp_path), Fake()
    carry_out(run, test_data=ablation.TEST_DATA, start=fake)
    harmless = load_config(run.file, [*run.overrides, "train.log_every=5", "data.workers=0"])
    assert not carry_out(dataclasses.replace(run, config=harmless), test_data=ablation.TEST_DATA, start=fake)
    changed = load_config(run.file, [*run.overrides, "optimizer.lr=0.5", "train.steps=9"])
    differing = rf"train.steps \(was {STEPS}, now 9\), optimizer.lr \(was 0.001, now"
    message = f"seed_0: run with another configuration: {differing}"
    with pytest.raises(AblationError, match=message):
        carry_out(dataclasses.replace(run, config=changed), test_data=ablation.TEST_DATA, start=fake)
    shutil.rmtree(run.record)
    with pytest.raises(AblationError, match="runs/.*" + message):
        carry_out(dataclasses.replace(run, config=changed), test_data=ablation.TEST_DATA, start=fake)
    run.record.mkdir()
    (run.record / "config.yaml").write_text("output: here\ntrain: {steps: 1}\nmodel: {forgotten: 1}\n")
    with pytest.raises(AblationError, match=r"config.yaml: not a configuration of this version: model.forgotten"):
        run_all(make_plan(tmp_path, "itc", seeds=1), start=fake)
    assert fake.calls == ["pretrain", "evaluate", "evaluate"]


def test_after_a_failed_run_no_other_one_starts(tmp_path: Path) -> None:
    fake = Fake(stops=1)
    with pytest.raises(AblationError, match="itc/seed_0: training stopped before the end"):
        run_all(make_plan(tmp_path, "itc", "coca", "sycoca", seeds=1), start=fake)
    assert fake.calls.count("pretrain") <= 2  # the pool's one worker may have taken the next run before the error came


def test_runs_side_by_side_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation.os, "cpu_count", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    for jobs, expected in ((1, "5"), (2, "3"), (9, "1")):
        path = tmp_path / str(jobs)
        program = f"import os, pathlib; pathlib.Path({str(path)!r}).write_text(os.environ['OMP_NUM_THREADS'])"
        ablation.start_process([sys.executable, "-c", program], jobs=jobs)
        assert path.read_text() == expected
    met = threading.Barrier(2, timeout=30)  # broken unless two runs are there at once

    class Meeting(Fake):
        def train(self, overrides: Sequence[str]) -> None:
            met.wait()
            super().train(overrides)

    plan = make_plan(tmp_path, "itc", "coca", seeds=1, jobs=2)
    run_all(plan, start=Meeting())
    assert len(list(plan.record.rglob("seen.json"))) == 2


def test_shorter_runs_keep_the_proportions_and_have_their_own_folder() -> None:
    plan, table_only = ablation.parse(["--steps", "78", "--rows", "all", "--seeds", "1"])
    (run,) = ablation.planned_runs(plan)
    config = run.config
    assert (config.train.steps, config.optimizer.warmup_steps, config.model.contrast_steps) == (78, 5, 52)
    assert plan.table == Path("runs/ablation_78_steps/ablation.md") and plan.table.parent in run.folder.parents
    assert plan.table.parent in run.record.parents
    assert not table_only and ablation.parse(["--table-only"])[1]
    whole = ablation.parse([])[0]
    assert (whole.runs, whole.record) == (Path("runs/ablation"), Path("benchmarks/ablation/record"))


# -- the table --------------------------------------------------------------------------------------------------------


def sycoca_results(shares: dict[str, list[float]], *, seeds: int = 2) -> Results:
    """One run per share of a row, with seeds from 0 on."""
    made = {name: [measured_of(made_metrics(itc=share)) for share in row] for name, row in shares.items()}
    measured = {row.name: dict(enumerate(made.get(row.name, []))) for row in SYCOCA.rows}
    return Results(SYCOCA, steps=700, seeds=seeds, measured=measured)


def line_of(text: str, title: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_has_means_and_unfinished_rows() -> None:
    text = render([sycoca_results({"itc": [0.1, 0.2], "coca": [0.3]})])
    assert line_of(text, "ITC")[2:] == ["2", "15.0", "", "50.0", "", "13.5 / 14.8"]
    assert line_of(text, "CoCa (ITC + IC)")[2:] == ["1 of 2, not finished", "30.0", "", "50.0", "", "16.1 / 16.0"]
    assert line_of(text, "SyCoCa")[2:] == ["0 of 2, not finished", "", "", "", "", "18.3 / 18.4"]
    assert "`sycoca.yaml`, 700 steps; retrieval among 256 images." in text


def test_figures_of_both_hands_come_from_their_sections() -> None:
    unseen, seen = made_metrics(itc=0.1, itm=0.2, pointing=0.3), made_metrics(itc=0.6, itm=0.7)
    unseen["retrieval"]["itc"]["i2t"] = {"r1": 0.1, "r5": 0.2, "r10": 0.6}
    unseen["retrieval"]["itm"]["i2t"] = {"r1": 0.4, "r5": 0.9, "r10": 0.9}
    measured = {row.name: {} for row in SOFTMASK_PP.rows} | {"albef": {0: measured_of(unseen, seen)}}
    text = render([Results(SOFTMASK_PP, steps=700, seeds=3, measured=measured)])
    assert line_of(text, "ALBEF")[2:] == ["1 of 3, not finished", "20.0", "30.0", "30.0", "60.0", "70.0"]
    assert line_of(text, "row")[3:] == list(SOFTMASK_PP.figures)


def test_differences_are_paired_by_seed_with_a_t_interval() -> None:
    """Expected by hand: of 1, 2 and 6 points the mean is 3, the standard error 1.5275, and t 4.303."""
    results = sycoca_results({"itc": [0.10, 0.30, 0.20, 0.90], "coca": [0.11, 0.32, 0.26]})
    (coca,) = [row for row in SYCOCA.rows if row.name == "coca"]
    found = difference(results, coca, SYCOCA.figures["mR"])
    assert found.mean == pytest.approx(0.03) and found.half == pytest.approx(4.303 * 0.015275, rel=1e-3)
    assert not found.is_beyond_interval and Difference(-0.03, 0.02).is_beyond_interval
    line = line_of(render([results]), "CoCa (ITC + IC) − ITC")
    assert line[1:] == ["3", "+3.0 (-3.6 to +9.6)", "", "+0.0 (+0.0 to +0.0)", ""]


def test_differences_need_two_pairs_for_an_interval_and_runs_of_both_rows_to_be_there() -> None:
    shares = {"itc": [0.1, 0.2], "coca": [0.4], "sycoca": [0.5]}
    text = render([sycoca_results(shares)])
    assert line_of(text, "CoCa (ITC + IC) − ITC")[1:3] == ["1", "+30.0"]
    assert line_of(text, "SyCoCa − CoCa (ITC + IC)")[1:3] == ["1", "+10.0"] and "random masks −" not in text
    certain = render([sycoca_results({"itc": [0.1, 0.2], "coca": [0.3, 0.4001]})])
    assert line_of(certain, "CoCa (ITC + IC) − ITC")[2] == "**+20.0** (+19.9 to +20.1)"
    assert "difference" not in render([sycoca_results({"itc": [0.1]})]).partition("## SyCoCa")[2]
    many = sycoca_results({"itc": [0.1] * 11, "coca": [0.2] * 11})
    with pytest.raises(AblationError, match="sycoca: expected at most 10 seeds, got 11"):
        render([many])


def test_a_figure_that_a_row_lacks_is_empty() -> None:
    results = sycoca_results({"itc": [0.1, 0.2], "coca": [0.3, 0.3]})
    for measured, cider in zip(results.measured["coca"].values(), (1.0, 1.2), strict=True):
        measured[UNSEEN]["captioning"] = {"cider": cider}
    text = render([results])
    assert line_of(text, "ITC")[4] == "" and line_of(text, "CoCa (ITC + IC)")[4] == "110.0"
    assert line_of(text, "CoCa (ITC + IC) − ITC")[3] == ""


def test_galleries_of_different_sizes_are_refused() -> None:
    results = sycoca_results({"itc": [0.1, 0.2]})
    results.measured["itc"][0][SEEN]["retrieval"]["images"] = 12
    with pytest.raises(AblationError, match=r"expected retrieval among equally many images .* got \[12, 256\]"):
        ablation_table.section(results)


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
    studies = tuple(dataclasses.replace(study, config=path) for study, path in zip(STUDIES, configs, strict=True))
    test_data = write_scenes(tmp_path / "test.tar")
    data = {UNSEEN: test_data, SEEN: test_data}
    plan = make_plan(tmp_path, "itc", "all", seeds=1, steps=2, studies=studies, test_data=data)
    run_all(plan, start=run_in_this_process)
    text = plan.table.read_text(encoding="utf-8")
    for study, title in zip(studies, ("ITC", "SoftMask++ (all)"), strict=True):
        cells = line_of(text, title)[3 : 3 + len(study.figures)]
        assert all(0 <= float(cell) <= 100 for cell in cells if cell) and sum(map(bool, cells)) >= 2
    assert text.count("retrieval among 12 images") == 2 and text.count("0 of 5, not finished") == 8
    assert rows(plan.runs / "sycoca/itc/seed_0")[-1].keys() & {"itc", "caption"} == {"itc"}
