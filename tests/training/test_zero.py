"""ZeRO 0 to 3 on two ranks train alike and resume exactly; a common stop under the `deepspeed` launcher."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from softmask.training.checkpoint.state import CheckpointError
from softmask.training.checkpoint.store import check_resumable, find_checkpoint
from softmask.training.config import load_config, save_config
from tests.support.train_fixtures import (
    PRETRAIN,
    assert_rows_close,
    different,
    launch,
    make_config,
    make_trainer,
    rows,
    run_here,
    run_on_two_ranks,
    saved_state,
)

STAGES = (0, 1, 2, 3)
NOTHING_KEPT = (  # no parameter stays gathered after its module
    "{stage: 3, stage3_param_persistence_threshold: 0, stage3_max_live_parameters: 0, stage3_max_reuse_distance: 0, "
    "stage3_prefetch_bucket_size: 0}"
)
CROSSED = {0: 3, 3: 1, 2: 0}  # stage: the stage it resumes in; 1 and 2 are alike
# Both ranks run every stage to the end, and resume its checkpoint of step 2 in the same and in another stage.
WORKER = """
import dataclasses, sys
from softmask.training.checkpoint.store import find_checkpoint
from softmask.training.config import load_config
from softmask.training.trainer import train

base = load_config(sys.argv[-1])

def run(stage, name, source=None):
    zero = {"zero_optimization": {"stage": stage}}
    config = dataclasses.replace(base, deepspeed=zero, output=f"{base.output}-{name}")
    train(config, checkpoint=source and find_checkpoint(f"{base.output}-{source}-whole/checkpoints/step_00000002"))

for stage in (0, 1, 2, 3):
    run(stage, f"{stage}-whole")
    run(stage, f"{stage}-resumed", source=str(stage))
for stage, other in {0: 3, 3: 1, 2: 0}.items():
    run(other, f"{stage}-crossed", source=str(stage))
"""


def test_all_stages_train_alike_and_resume_exactly(tmp_path) -> None:
    overrides = ["train.steps=4", "train.batch_size=4", "train.accumulation=2", "train.clip_grad=1"]
    overrides += ["train.checkpoint_every=2", "model.vision.conv_vit.depth=1"]
    # The first step has no gradient for the fusion layers, the second resumes with one.
    config = make_config(tmp_path, *overrides, "model.contrast_steps=1")
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "worker.py").write_text(WORKER)
    run_on_two_ranks(tmp_path / "worker.py", str(tmp_path / "config.yaml"))

    reference = rows(f"{config.output}-0-whole")
    assert len(reference) == 4 and reference[-1]["epoch"] == 1.0
    assert "itm" not in reference[0] and "itm" in reference[1]
    for stage in STAGES:
        whole, resumed = (saved_state(f"{config.output}-{stage}-{name}") for name in ("whole", "resumed"))
        assert different(whole, resumed) == []
        assert any("optim_states" in name for name in whole) == (stage > 0)
        # The stages sum the same gradients in different orders, so they differ by rounding.
        assert_rows_close(rows(f"{config.output}-{stage}-whole"), reference)
    for stage in CROSSED:
        assert_rows_close(rows(f"{config.output}-{stage}-crossed"), reference[2:])

    checkpoint = find_checkpoint(f"{config.output}-1-whole")
    with pytest.raises(CheckpointError, match=r"number of ranks \(was 2, now 1\)"):
        check_resumable(checkpoint, load_config(checkpoint / "config.yaml"), world_size=1)


@pytest.mark.usefixtures("plain_linear")
@pytest.mark.parametrize(
    "overrides",
    [
        ["deepspeed.zero_optimization={stage: 3}"],
        [f"deepspeed.zero_optimization={NOTHING_KEPT}", "train.activation_checkpointing=true"],
    ],
    ids=["small parameters kept", "nothing kept, checkpointing"],
)
def test_stage_3_trains_as_stage_0(tmp_path, overrides: list[str]) -> None:
    common = ["train.steps=4", "train.clip_grad=1", "model.alpha_warmup_steps=0"]  # every step uses all modules
    run_here(make_config(tmp_path, *common))
    run_here(make_config(tmp_path, *common, *overrides, f"output={tmp_path / 'three'}"))
    assert_rows_close(rows(tmp_path / "three"), rows(tmp_path / "run"))


@pytest.mark.usefixtures("plain_linear")
def test_stage_3_releases_every_parameter_after_use(tmp_path, monkeypatch) -> None:
    """Including the fusion layers, which have two backward passes and a third one for the word map."""
    gathered, fetch = [], PartitionedParameterCoordinator.fetch_sub_module

    def watched(self, module, forward):
        fetch(self, module, forward)
        gathered.append(sum(parameter.numel() for parameter in trainer.model.parameters()))

    overrides = [f"deepspeed.zero_optimization={NOTHING_KEPT}", "model.text.fusion_layers=6", "train.steps=2"]
    trainer = make_trainer(make_config(tmp_path, *overrides))
    monkeypatch.setattr(PartitionedParameterCoordinator, "fetch_sub_module", watched)
    trainer.run()
    largest = max(sum(p.ds_numel for p in m.parameters(recurse=False)) for m in trainer.model.modules())
    assert max(gathered) < 2 * largest < sum(p.ds_numel for p in trainer.model.parameters()) / 30


@pytest.mark.slow  # beside test_resume.py::test_sigterm_writes_a_checkpoint
def test_launcher_forwards_the_stop_signal(tmp_path) -> None:
    """SIGTERM to the launcher's process group, as from a batch system: both ranks save at the same step."""
    overrides = ["train.steps=100000", "data.workers=1", "deepspeed.zero_optimization.stage=2"]
    config = make_config(tmp_path, *overrides)
    save_config(config, tmp_path / "config.yaml")
    process = launch(PRETRAIN, "--config", str(tmp_path / "config.yaml"))
    log, deadline = Path(config.output) / "log.jsonl", time.monotonic() + 200
    while not (log.exists() and log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert "stopped, go on with --resume auto" in output and "Traceback" not in output, output
    checkpoint = find_checkpoint(config.output)
    assert json.loads((checkpoint / "trainer.json").read_text())["step"] == rows(config.output)[-1]["step"]
    states = [torch.load(path, weights_only=False) for path in sorted(checkpoint.glob("*optim_states.pt"))]
    assert len(states) == 2
