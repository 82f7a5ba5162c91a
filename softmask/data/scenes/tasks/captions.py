"""Five captions per picture in Karpathy's format: `captions.json`."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Any

from softmask.data.scenes.captions import write_caption
from softmask.data.scenes.tasks.scenes import IMAGES, Shown

CAPTIONS = 5


def captions_file(shown: Iterable[Shown], seed: int) -> dict[str, Any]:
    """Name -> content of the file with all splits."""
    images = []
    for number, one in enumerate(shown):
        texts = five_captions(one, Random(f"{seed}/tasks/captions/{one.image_id}"))
        ids = range(number * CAPTIONS, (number + 1) * CAPTIONS)
        sentences = [
            {"tokens": text.replace(",", "").split(), "raw": text, "imgid": number, "sentid": sentid}
            for text, sentid in zip(texts, ids, strict=True)
        ]
        image = {"filepath": IMAGES, "filename": one.file, "imgid": number, "cocoid": one.image_id}
        mark = {"unseen": True} if one.unseen else {}
        images.append({**image, "split": one.split, "sentids": list(ids), "sentences": sentences, **mark})
    return {"captions.json": {"dataset": "scenes", "images": images}}


def five_captions(one: Shown, rng: Random) -> list[str]:
    """Different true captions, each of which names every concept."""
    texts: dict[str, None] = {}
    while len(texts) < CAPTIONS:
        texts[write_caption(one.groups, one.background.name, rng).text] = None
    return list(texts)
