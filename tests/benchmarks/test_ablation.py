"""The ablation: each row adds one change, runs resume, and the table shows the recorded runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.ablation import run as ablation
from benchmarks.ablation import table as ablation_table
from benchmarks.ablation.rows import STUDIES, Study
from benchmarks.ablation.run import AblationError, Plan, Run, carry_out, run_all
from benchmarks.ablation.table import Results, order, render
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


def test_expected_order_covers_all_rows_and_matches_the_paper() -> None:
    for study in STUDIES:
        named = {name for pairs in study.order.values() for pair in pairs for name in pair}
        assert named == {row.name for row in study.rows} and study.order.keys() == study.figures.keys()
    assert len(SYCOCA.order["mTR"]) == len(SYCOCA.order["mIR"]) == 10
    assert ("random_tgmim", "coca") in SYCOCA.order["mTR"] and ("attentive_ic", "sycoca") in SYCOCA.order["mIR"]


# -- resuming ---------------------------------------------------------------------------------------------------------


def made_metrics(*, itc: float = 0.5, itm: float = 0.5, pointing: float = 0.5, steps: int = STEPS, images: int = 256):
    """metrics.json in which all recalls of a stage are equal."""
    stages = {name: {way: dict.fromkeys(("r1", "r5", "r10"), share) for way in ("i2t", "t2i")}
              for name, share in (("itc", itc), ("itm", itm))}  # fmt: skip
    return {
        "retrieval": {"images": images, **stages},
        "grounding": {"pointing": pointing},
        "training": {"steps": steps},
        "evaluation": {"data": ablation.TEST_DATA},
    }


class Fake:
    """Replaces the two commands: writes the files they would write, and records the calls."""

    def __init__(self, *, stops: int = 0, metrics: dict | None = None) -> None:
        self.calls: list[str] = []
        self.stops = stops  # number of trainings that end early
        self.metrics = metrics or made_metrics()

    def __call__(self, command: Sequence[str]) -> None:
        scripts = [Path(word).stem for word in command if word.endswith(".py")]
        self.calls += scripts
        if scripts == ["pretrain"]:
            self.train(command[command.index("auto") + 1 :])
        else:
            folder = Path(command[command.index("--data") - 1])
            (folder / "metrics.json").write_text(json.dumps(self.metrics))

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
    assert fake.calls == ["pretrain", "evaluate"] * 4
    run_all(dataclasses.replace(plan, seeds=3), start=fake)
    assert fake.calls == ["pretrain", "evaluate"] * 6
    folders = sorted(path.parent.relative_to(plan.record).as_posix() for path in plan.record.rglob("metrics.json"))
    assert folders == [f"sycoca/{row}/seed_{seed}" for row in ("coca", "sycoca") for seed in range(3)]


def test_record_alone_gives_the_table_and_skips_the_run(tmp_path: Path) -> None:
    """As in a new clone, which has a record but no runs."""
    plan, fake = make_plan(tmp_path, "coca", seeds=1), Fake()
    run_all(plan, start=fake)
    table = plan.table.read_text(encoding="utf-8")
    assert line_of(table, "CoCa (ITC + IC)")[2:5] == ["1 of 3, not finished", "50.0", "50.0"]
    shutil.rmtree(plan.runs)
    plan.table.unlink()
    run_all(plan, start=fake)
    assert plan.table.read_text(encoding="utf-8") == table and fake.calls == ["pretrain", "evaluate"]


def test_table_shows_all_recorded_rows_not_only_the_planned(tmp_path: Path) -> None:
    fake = Fake()
    run_all(make_plan(tmp_path, "coca", seeds=4), start=fake)
    plan = make_plan(tmp_path, "itc", seeds=1)
    run_all(plan, start=fake)
    table = plan.table.read_text(encoding="utf-8")
    assert line_of(table, "CoCa (ITC + IC)")[2] == "4" and line_of(table, "ITC")[2] == "1 of 4, not finished"


def test_a_finished_run_without_a_record_is_recorded(tmp_path: Path) -> None:
    run, fake = one_run(tmp_path), Fake()
    carry_out(run, test_data=ablation.TEST_DATA, start=fake)
    shutil.rmtree(run.record)
    assert carry_out(run, test_data=ablation.TEST_DATA, start=fake)
    assert fake.calls == ["pretrain", "evaluate"]
    for name in ("config.yaml", "metrics.json"):
        assert (run.record / name).read_text() == (run.folder / name).read_text()


def test_readme_is_generated_from_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also checks that every recorded run has the current configuration of its row."""
    monkeypatch.chdir(Path(ablation.__file__).resolve().parents[2])
    plan, _ = ablation.parse([])
    results = [ablation.collect(plan, study) for study in plan.studies]
    assert render(results) == plan.table.read_text(encoding="utf-8"), "python -m benchmarks.ablation.run --table-only"
    recorded = len(list(plan.record.rglob("metrics.json")))
    assert recorded == sum(len(row) for study in results for row in study.metrics.values())


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
    assert fake.calls == ["pretrain", "pretrain", "evaluate"]


def test_only_evaluation_is_repeated_if_metrics_are_missing_or_differ(tmp_path: Path) -> None:
    run, fake = one_run(tmp_path), Fake()
    carry_out(run, test_data=ablation.TEST_DATA, start=fake)
    for folder in (run.folder, run.record):
        (folder / "metrics.json").unlink()
    assert carry_out(run, test_data=ablation.TEST_DATA, start=fake)
    for other in (made_metrics(steps=250), made_metrics() | {"captioning": {"beams": 6}}):
        for folder in (run.folder, run.record):
            (folder / "metrics.json").write_text(json.dumps(other))
        assert carry_out(run, test_data=ablation.TEST_DATA, start=fake)
    assert fake.calls == ["pretrain", "evaluate", "evaluate", "evaluate", "evaluate"]
    with pytest.raises(AblationError, match=f"seed_0: evaluation wrote no metrics.json of step {STEPS} on other.tar"):
        carry_out(run, test_data="other.tar", start=fake)


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
    assert fake.calls == ["pretrain", "evaluate"]


def test_shorter_runs_keep_the_proportions_and_have_their_own_folder() -> None:
    plan, table_only = ablation.parse(["--steps", "70", "--rows", "all", "--seeds", "1"])
    (run,) = ablation.planned_runs(plan)
    config = run.config
    assert (config.train.steps, config.optimizer.warmup_steps, config.model.contrast_steps) == (70, 5, 21)
    assert plan.table == Path("runs/ablation_70_steps/ablation.md") and plan.table.parent in run.folder.parents
    assert plan.table.parent in run.record.parents
    assert not table_only and ablation.parse(["--table-only"])[1]
    whole = ablation.parse([])[0]
    assert (whole.runs, whole.record) == (Path("runs/ablation"), Path("benchmarks/ablation/record"))


# -- the table --------------------------------------------------------------------------------------------------------


def sycoca_results(shares: dict[str, list[float]], *, seeds: int = 2) -> Results:
    metrics = {row.name: [made_metrics(itc=share) for share in shares.get(row.name, [])] for row in SYCOCA.rows}
    return Results(SYCOCA, steps=700, seeds=seeds, metrics=metrics)


IN_ORDER = {
    "itc": [0.1, 0.12], "random_tgmim": [0.2, 0.22], "coca": [0.3, 0.32], "attentive_ic": [0.4, 0.42],
    "sycoca": [0.5, 0.52],
}  # fmt: skip


def line_of(text: str, title: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_has_mean_spread_and_unfinished_rows() -> None:
    text = render([sycoca_results({"itc": [0.1, 0.2], "coca": [0.3]})])
    assert line_of(text, "ITC")[2:] == ["2", "15.0 ± 7.1", "15.0 ± 7.1", "", "", "13.5 / 14.8"]
    assert line_of(text, "CoCa (ITC + IC)")[2:] == ["1 of 2, not finished", "30.0", "30.0", "", "", "16.1 / 16.0"]
    assert line_of(text, "SyCoCa")[2:] == ["0 of 2, not finished", "", "", "", "", "18.3 / 18.4"]
    assert "`sycoca_demo.yaml`, 700 steps; retrieval among 256 images." in text
    assert "\n20 of 20 comparisons wait for unfinished rows.\n" in text


def test_additional_figures_are_empty_for_rows_without_them() -> None:
    results = sycoca_results({"itc": [0.1, 0.2], "coca": [0.3, 0.3], "sycoca": [0.3, 0.3]})
    for row in ("coca", "sycoca"):
        for metrics, cider in zip(results.metrics[row], (1.0, 1.2), strict=True):
            metrics["captioning"] = {"cider": cider}
    for metrics in results.metrics["sycoca"]:
        metrics["reconstruction"] = {"gap": 0.05}
    text = render([results])
    assert line_of(text, "ITC")[5:7] == ["", ""]
    assert line_of(text, "CoCa (ITC + IC)")[5:7] == ["110.0 ± 14.1", ""]
    assert line_of(text, "SyCoCa")[5:7] == ["110.0 ± 14.1", "5.0 ± 0.0"]
    assert line_of(text, "row")[3:] == ["mTR", "mIR", "CIDEr", "gap", "paper: mTR / mIR"]


def test_softmask_figures_come_from_their_sections() -> None:
    metrics = {row.name: [] for row in SOFTMASK_PP.rows} | {"albef": [made_metrics(itc=0.1, itm=0.2, pointing=0.3)]}
    metrics["albef"][0]["retrieval"]["itc"]["i2t"] = {"r1": 0.1, "r5": 0.2, "r10": 0.6}
    text = render([Results(SOFTMASK_PP, steps=700, seeds=3, metrics=metrics)])
    assert line_of(text, "ALBEF")[2:] == ["1 of 3, not finished", "30.0", "10.0", "20.0", "20.0", "30.0"]


def test_order_that_agrees_with_the_paper() -> None:
    assert order(sycoca_results(IN_ORDER)) == (
        "20 of 20 comparisons (of two rows by one figure) agree with the paper's order."
    )


def test_order_names_each_reversed_pair_and_whether_it_exceeds_the_spread() -> None:
    shares = IN_ORDER | {"sycoca": [0.37, 0.41], "itc": [0.24, 0.25]}
    results = sycoca_results(shares)
    for metrics in results.metrics["itc"]:
        metrics["retrieval"]["itc"]["t2i"] = dict.fromkeys(("r1", "r5", "r10"), 0.0)
    assert order(results) == (
        "17 of 20 comparisons (of two rows by one figure) agree with the paper's order. The others:\n\n"
        "- mTR: ITC above CoCa + TG-MIM with random masks by 3.5 points (more than the spread of 1.4), "
        "CoCa + attentive masking on IC above SyCoCa by 2.0 points (within the spread of 2.8)\n"
        "- mIR: CoCa + attentive masking on IC above SyCoCa by 2.0 points (within the spread of 2.8)"
    )


def test_order_skips_unfinished_rows_and_notes_single_seeds() -> None:
    partial = sycoca_results({"itc": [0.5, 0.5], "coca": [0.3, 0.3], "sycoca": [0.1]})
    assert "order. 18 of 20 comparisons wait for unfinished rows. The others:" in " ".join(order(partial).split())
    assert "0 of 2 comparisons" in order(partial) and "SyCoCa" not in order(partial)
    single = order(sycoca_results({"itc": [0.5], "coca": [0.3]}, seeds=1))
    assert "ITC above CoCa (ITC + IC) by 20.0 points (one seed has no spread)" in single


def test_galleries_of_different_sizes_are_refused() -> None:
    results = sycoca_results(IN_ORDER)
    results.metrics["itc"][0]["retrieval"]["images"] = 12
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


def test_two_rows_from_data_to_table(tmp_path: Path) -> None:
    """ITC trains without a gradient for the caption decoder; SoftMask++ has every figure."""
    write_training_shard(tmp_path / "train.tar", count=32)
    make_config(tmp_path)  # writes base.yaml, of SoftMask++
    make_sycoca_config(tmp_path, "sycoca")
    configs = (tmp_path / "sycoca.yaml", tmp_path / "base.yaml")
    studies = tuple(dataclasses.replace(study, config=path) for study, path in zip(STUDIES, configs, strict=True))
    test_data = write_scenes(tmp_path / "test.tar")
    plan = make_plan(tmp_path, "itc", "all", seeds=1, steps=2, studies=studies, test_data=test_data)
    run_all(plan, start=run_in_this_process)
    text = plan.table.read_text(encoding="utf-8")
    for study, title in zip(studies, ("ITC", "SoftMask++ (all)"), strict=True):
        cells = line_of(text, title)[3:]
        assert all(0 <= float(cell) <= 100 for cell in cells[: len(study.figures)])
    assert text.count("retrieval among 12 images") == 2 and text.count("0 of 3, not finished") == 8
    assert rows(plan.runs / "sycoca/itc/seed_0")[-1].keys() & {"itc", "caption"} == {"itc"}
