"""SyCoCa's part of the report: generated captions, and patches reconstructed with the help of captions."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

import torch
from PIL import Image
from torch import Tensor

from softmask.evaluation.captioning import WRITING, CaptionOptions, write_captions
from softmask.evaluation.one_pass import encode
from softmask.evaluation.readers import Sample, Scorer, batches
from softmask.evaluation.reconstruction import Reconstructions, reconstruct, with_another
from softmask.report.images import data_uri, limited
from softmask.report.page import section

SHOWN = 256  # pixels of an image's longer side
PATCH_VARIANCE_EPS = 1e-6  # of ops.masked_patch_loss


@dataclass
class CaptionView:
    """An image, its generated caption and its true one."""

    image: str
    generated: str
    true: str


@dataclass
class ReconstructionView:
    """An image, the same with hidden patches, and its reconstructions with two captions. Images are data URIs."""

    whole: str
    hidden: str
    right: str
    wrong: str
    caption: str
    wrong_caption: str
    errors: tuple[float, float]  # with the right caption and the wrong one


@dataclass
class Generated:
    """Generated captions and reconstructions, empty for other models. `hidden` says which patches were hidden."""

    captions: list[CaptionView] = field(default_factory=list)
    reconstructions: list[ReconstructionView] = field(default_factory=list)
    hidden: str = ""


def generated(scorer: Scorer, samples: list[Sample], metrics: dict) -> Generated:
    """A caption and reconstructions of each sample, if metrics.json has these sections."""
    found = Generated()
    if "captioning" in metrics:
        given = {name: metrics["captioning"][name] for name in WRITING if name in metrics["captioning"]}
        for batch in batches(samples, scorer.batch_size):
            seen = encode(scorer, batch)
            texts = write_captions(scorer, seen, CaptionOptions(**given)).chosen
            for sample, picture in zip(batch, seen.picture, strict=True):
                image = data_uri(limited(sample.seen, SHOWN))
                found.captions.append(CaptionView(image, texts[picture], sample.caption))
    if "reconstruction" in metrics:
        found.reconstructions = reconstruction_views(scorer, samples)
        found.hidden = scorer.config.find_task().hidden_patches(scorer.config.model)
    return found


def reconstruction_views(scorer: Scorer, samples: list[Sample]) -> list[ReconstructionView]:
    """Reconstructions of each sample with its caption and with the next image's."""
    drawn = []
    for batch in batches(with_another(samples), scorer.batch_size):
        ours, others = [sample for sample, _ in batch], [other for _, other in batch]
        one = reconstruct(scorer, encode(scorer, ours), others)
        errors = zip(one.right_error.tolist(), one.wrong_error.tolist(), strict=True)
        views = zip(*reconstruction_images(scorer, one), strict=True)
        for sample, other, view, error in zip(ours, others, views, errors, strict=True):
            whole, hidden, right, wrong = map(data_uri, view)
            drawn.append(ReconstructionView(whole, hidden, right, wrong, sample.caption, other, error))
    return drawn


# -- pixels ----------------------------------------------------------------------------------------


def reconstruction_images(scorer: Scorer, one: Reconstructions) -> tuple[list[Image.Image], ...]:
    """Images, the same with hidden patches in the mean colour, and reconstructions with the right and a wrong caption.

    Reconstructions show visible patches as they are.
    """
    size, grid = scorer.reconstructor.patch_size, scorer.reconstructor.patch_grid
    true = to_patches(one.images, size)
    hidden = one.hidden[..., None]
    right, wrong = (
        torch.where(hidden, restored(paint, true, normalized=scorer.config.model.normalize_pixels), true)
        for paint in (one.right, one.wrong)
    )
    rows = (true, true.masked_fill(hidden, 0.0), right, wrong)
    return tuple(to_images(scorer, from_patches(row, size, grid)) for row in rows)


def restored(paint: Tensor, true: Tensor, *, normalized: bool) -> Tensor:
    """Predicted patches in the image's range. Normalized ones get the true mean and deviation, as in MAE's figures."""
    if not normalized:
        return paint
    variance, mean = torch.var_mean(true, dim=-1, keepdim=True)
    return paint * (variance + PATCH_VARIANCE_EPS).sqrt() + mean


def to_patches(images: Tensor, size: int) -> Tensor:
    """[B, 3, S, S] -> [B, P, 3 * size**2], pixels ordered rows, columns, channels."""
    return images.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def from_patches(patches: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `to_patches`."""
    rows = patches.unflatten(1, grid).unflatten(-1, (size, size, 3))  # [B, rows, columns, row, column, channel]
    return rows.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def to_images(scorer: Scorer, images: Tensor) -> list[Image.Image]:
    """Normalized pixels as images of the size that is shown."""
    data = scorer.config.data
    mean, std = (images.new_tensor(values)[:, None, None] for values in (data.mean, data.std))
    pixels = (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).cpu().numpy()
    return [Image.fromarray(one).resize((SHOWN, SHOWN), Image.Resampling.NEAREST) for one in pixels]


# -- markup ----------------------------------------------------------------------------------------


def caption_cards(captions: list[CaptionView]) -> str:
    cards = "".join(
        f'<div class="card"><img src="{one.image}" alt="{escape(one.true)}"><div><p class="quote">'
        f"{escape(one.generated)}</p><small>true caption: {escape(one.true)}</small></div></div>"
        for one in captions
    )
    return f'<div class="cards">{cards}</div>'


def reconstruction_rows(views: list[ReconstructionView]) -> str:
    return "".join(map(_reconstruction_row, views))


def _reconstruction_row(one: ReconstructionView) -> str:
    views = [
        (one.whole, "Image", one.caption),
        (one.hidden, "Visible patches", ""),
        (one.right, f"Own caption, error {one.errors[0]:.3f}", one.caption),
        (one.wrong, f"Other caption, error {one.errors[1]:.3f}", one.wrong_caption),
    ]
    figures = "".join(
        f'<figure><img src="{uri}" alt="{escape(name)}"><figcaption>{escape(name)}</figcaption>'
        f"<small>{escape(text)}</small></figure>"
        for uri, name, text in views
    )
    return f'<div class="reconstruction">{figures}</div>\n'


def caption_table(captioning: dict) -> str:
    """Scores of the model, of the decoder alone and of the comparisons, if present."""
    scores = [("cider", "CIDEr"), ("bleu4", "BLEU-4"), ("rouge_l", "ROUGE-L"), ("meteor", "METEOR")]
    scores = [(key, name) for key, name in scores if key in captioning]
    nearest = f"Caption of the nearest of {captioning.get('neighbours', 0):,} training images"
    beams, alone = f"{captioning['beams']} beams", captioning.get("beams_alone")
    rows = {
        f"Best of {beams} by both heads" if alone else "Generated": captioning,
        f"Best of {beams} by the caption decoder": alone,
        nearest: captioning.get("nearest"),
        "Random training caption": captioning.get("random"),
    }
    head = "".join(f'<th scope="col">{name}</th>' for _, name in scores)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{100 * row[key]:.1f}</td>" for key, _ in scores)}</tr>'
        for name, row in rows.items()
        if row
    )
    images = f"Captions of {captioning['samples']:,} images{_wanted(captioning)}"
    return (
        f'<div class="scroll apart"><table>\n<thead><tr><th scope="col" rowspan="1">{images}</th>{head}</tr>'
        f"</thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def _wanted(captioning: dict) -> str:
    """How the captions had to begin and how long they had to be, in words of HTML."""
    prompt, least = captioning.get("prompt"), captioning.get("min_length")
    parts = [f"after the prompt <q>{escape(prompt)}</q>"] if prompt else []
    return ", ".join(["", *parts, *([f"of at least {least} tokens"] if least else [])])


def reconstruction_note(result: dict) -> str:
    right, wrong, gap, low, high = (f"{result[key]:.4f}" for key in ("right", "wrong", "gap", "low", "high"))
    return (
        f'<p class="note apart">Hidden patches of {result["samples"]:,} images: error {right} with the right '
        f"caption, {wrong} with another image's. The gap is {gap} (95 % interval {low} to {high}).</p>\n"
    )


def generated_sections(found: Generated) -> list[str]:
    sections = []
    if found.captions:
        note = "Generated captions of images spaced evenly over the data, not selected."
        sections.append(section("captions", "Captions", note, caption_cards(found.captions)))
    if found.reconstructions:
        note = (
            f"{found.hidden}, and reconstructed from the rest and a caption: the image's own, or the next image's. "
            "Normalized patches are shown with the true mean and contrast, as in MAE's figures."
        )
        sections.append(section("reconstructions", "Reconstructions", note, reconstruction_rows(found.reconstructions)))
    return sections
