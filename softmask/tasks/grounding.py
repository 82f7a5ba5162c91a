"""Grounding: which object does an expression name? A pre-trained SoftMask++ is measured; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from softmask.tasks.base import Split
from softmask.tasks.downstream import DownstreamTask, paths_of

if TYPE_CHECKING:
    from softmask.data import DataConfig, Source


class GroundingTask(DownstreamTask):
    models = {"softmask_pp": "softmask.models.softmask_pp.model:SoftMaskPP"}
    frozen_section = "softmask.evaluation.tasks.grounding:BoxGrounding"
    name = "grounding"

    def open(self, paths: str | Sequence[str], data: DataConfig, *, split: Split) -> Source:
        from softmask.data.formats.refcoco import open_refcoco

        return open_refcoco(paths_of(paths), image_root=data.image_root, split=split)
