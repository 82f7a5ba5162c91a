"""On every rank: evaluate a run on data, and write its similarities and matching scores beside the figures.

score_gallery.py RUN DATA FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from softmask.data import open_source
from softmask.evaluation import command, evaluate, ranks, retrieval
from softmask.evaluation.gallery import build_gallery
from softmask.evaluation.readers import Reader


def main(run: str, data: str, folder: str) -> int:
    ranks.start()
    options = [run, "--data", data, "--batch-size", "2", "--pairs", "7", "--output", f"{folder}/metrics.json"]
    status = evaluate.main(options)
    for place in ("device", "host"):
        scorer = command.load_scorer(Path(run) / "checkpoints" / "step_00000005", batch_size=2, gallery=place)
        gallery = build_gallery(scorer, Reader(open_source(data)))
        wanted = torch.rand(gallery.relevant.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        scores = retrieval.match_scores(scorer, gallery, wanted)
        own = sum(piece.tokens is not None for piece in gallery.pieces)
        torch.save((own, gallery.similarity, scores), f"{folder}/{place}.{ranks.rank()}.pt")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
