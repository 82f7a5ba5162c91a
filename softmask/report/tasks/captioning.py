"""Fine-tuned captioning: scores, and generated captions beside the true ones."""

from __future__ import annotations

from typing import Any

from softmask.report.generated import caption_table, generated, generated_sections
from softmask.report.metrics_file import SCORES
from softmask.report.page import percent, section, tile
from softmask.report.view import Given, Shown, View, spread

NAMES = {"cider": "CIDEr", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L"}


class CaptioningView(View):
    """Scores beside those of other captions, as far as metrics.json has them, and captions of a few images."""

    @property
    def needed(self) -> dict[str, Any]:
        return {"captioning": SCORES | {"samples": int, "beams": int}}

    def show(self, given: Given) -> Shown:
        result = given.result["captioning"]
        detail = f"{result['samples']:,} images"
        tiles = [tile(percent(result[key]), name, detail, unit="") for key, name in NAMES.items()]
        samples = list(given.reader.read(spread(len(given.reader.source), given.count)))
        figures = section("task", "Captioning", "All scores are times 100.", caption_table(result))
        return Shown(tiles, [figures, *generated_sections(generated(given.scorer, samples, given.result))])
