"""train.profile: what it writes, and that it changes nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from softmask.training.checkpoint.store import find_checkpoint
from softmask.training.config import Config, ConfigError, load_config
from tests.support.train_fixtures import different, make_config, rows, run_here, saved_state

pytestmark = pytest.mark.usefixtures("plain_linear")
RANGES = {f"softmask/{part}" for part in ("data", "forward", "backward", "optimizer", "momentum", "queue")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = make_config(tmp_path_factory.mktemp("plain"), "train.steps=5", "train.checkpoint_every=2")
    run_here(config)
    return config


def recorded(config: Config) -> list[str]:
    """Names of the events in the trace, once per call."""
    trace = json.loads((Path(config.output) / "profile" / "trace.json").read_text())
    return [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]


def losses(config: Config) -> list[dict]:
    return [{key: row[key] for key in row.keys() - {"seconds", "samples_per_second"}} for row in rows(config.output)]


def test_profiling_is_off_by_default(plain: Config) -> None:
    assert plain.train.profile.steps == 0 and not (Path(plain.output) / "profile").exists()


def test_profiling_records_a_window_and_changes_no_bit(
    plain: Config, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    options = ["train.steps=5", "train.checkpoint_every=2", "train.profile={start: 1, steps: 2}"]
    config = make_config(tmp_path, *options, data=Path(plain.data.train))
    run_here(config)
    names = recorded(config)
    assert {name: names.count(name) for name in RANGES} == dict.fromkeys(RANGES, 2)
    table = (Path(config.output) / "profile" / "table.txt").read_text()
    assert all(name in table for name in RANGES) and "aten::" in table
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("profile")]
    assert "2 optimizer steps from step 2 on" in line and "trace.json" in line
    assert losses(config) == losses(plain)
    assert different(saved_state(config.output), saved_state(plain.output)) == []


def test_window_counts_optimizer_steps_under_accumulation(plain: Config, tmp_path: Path) -> None:
    options = ["train.steps=2", "train.accumulation=2", "train.profile={start: 0, steps: 1}"]
    config = make_config(tmp_path, *options, data=Path(plain.data.train))
    run_here(config)
    assert recorded(config).count("softmask/forward") == 2 and recorded(config).count("softmask/momentum") == 1


def test_window_is_counted_from_the_resumed_step(plain: Config, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """The window may be set or changed when a run is resumed."""
    checkpoint = find_checkpoint(Path(plain.output) / "checkpoints" / "step_00000004")
    config = make_config(tmp_path, "train.steps=7", "train.profile={start: 1, steps: 9}", data=Path(plain.data.train))
    run_here(config, checkpoint=checkpoint)
    assert recorded(config).count("softmask/forward") == 2  # the run ends within the window
    assert "2 optimizer steps from step 6 on" in capfd.readouterr().err


def test_run_that_ends_before_the_window_reports_it(plain: Config, tmp_path: Path, capfd) -> None:
    config = make_config(tmp_path, "train.steps=1", "train.profile={steps: 1}", data=Path(plain.data.train))
    run_here(config)
    assert "profile  nothing recorded: the run ended before optimizer step 11" in capfd.readouterr().err
    assert not (Path(config.output) / "profile").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{start: -1}", "train.profile.start: expected an integer >= 0, got -1"),
        ("{steps: -1}", "train.profile.steps: expected an integer >= 0 .*, got -1"),
        ("{steps: 1.5}", "train.profile.steps: expected int, got float 1.5"),
        ("{stop: 3}", "train.profile.stop: unknown key; did you mean"),
        ("true", "train.profile: expected a mapping, got bool True"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, value: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text("output: here\ntrain: {steps: 1}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "config.yaml", [f"train.profile={value}"])
