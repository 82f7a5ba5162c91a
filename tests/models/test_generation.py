"""SyCoCa's generated captions against full passes without a cache, exhaustive search and the nucleus."""

from __future__ import annotations

from functools import wraps
from itertools import product

import pytest
import torch
from torch import Tensor

from softmask.models.layers.packing import Packed, Packing
from softmask.models.sycoca.generation import CaptionGenerator, generate_captions, search_captions
from tests.support.model_fixtures import COCA, POOLED, SPECIAL, VOCABULARY, small_batch, small_sycoca


@pytest.fixture(
    scope="module",
    params=[
        {},
        pytest.param(COCA | POOLED, marks=pytest.mark.slow),
        pytest.param({"style": "open_clip"}, marks=pytest.mark.slow),
    ],
    ids=["SyCoCa", "CoCa with its pooler", "open_clip's style"],
)
def model(request: pytest.FixtureRequest):
    return small_sycoca(**request.param).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return small_batch(dtype=torch.float64).images


@torch.no_grad()
def log_probabilities(model, images: Tensor, input_ids: Tensor) -> Tensor:
    """[B, T, V] of the token after every token, by the training pass over whole captions."""
    _, image = model.backbone.pool(model.backbone.vision(images))
    texts = model.backbone.encode_texts(input_ids, Packing.full(*input_ids.shape, input_ids.device))
    states = model.caption_decoder(texts, Packed.full(image))
    return model.caption_head(states).log_softmax(-1).unflatten(0, input_ids.shape)


def test_greedy_decoding_takes_the_likeliest_token(model, images: Tensor) -> None:
    got = generate_captions(model, images, max_length=10)
    assert (got[:, 0] == SPECIAL.cls).all()
    first = log_probabilities(model, images, got[:, :1])[:, 0]
    assert (first[1:] - first[0]).abs().max() > 1e-3, "all images give the same probabilities: the test shows nothing"
    expected = got[:, :1]
    done = torch.zeros(len(images), dtype=torch.bool)
    for _ in range(got.shape[1] - 1):
        best = log_probabilities(model, images, expected)[:, -1].argmax(-1).masked_fill(done, SPECIAL.pad)
        done |= best == SPECIAL.sep
        expected = torch.cat([expected, best[:, None]], 1)
    assert torch.equal(got, expected)


def test_each_decoding_step_reads_one_token(model, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    forward = CaptionGenerator.forward

    @wraps(forward)
    def spy(self, input_ids: Tensor, **given: object):
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, **given)

    monkeypatch.setattr(CaptionGenerator, "forward", spy)
    generate_captions(model, images, max_length=6)
    assert len(lengths) > 1
    assert set(lengths) == {1}


PROMPT = (55, 42, 13)


def forced(log_p: Tensor, *, least: int, written: int) -> Tensor:
    """Log-probabilities [B, V] of the next token where [SEP] is not allowed before `least` tokens."""
    return log_p.index_fill(-1, torch.tensor(SPECIAL.sep), -torch.inf) if written < least else log_p


@pytest.mark.parametrize("prompt", [(), PROMPT], ids=["no prompt", "prompt"])
@pytest.mark.parametrize("least", [0, 4])
def test_greedy_decoding_goes_on_from_the_prompt_to_the_least_length(
    terse_model, images: Tensor, prompt: tuple[int, ...], least: int
) -> None:
    got = generate_captions(terse_model, images, max_length=12, min_length=least, prompt=prompt)
    whole = torch.tensor([SPECIAL.cls, *prompt]).expand(len(images), -1)
    done = torch.zeros(len(images), dtype=torch.bool)
    for written in range(got.shape[1] - 1):
        log_p = forced(log_probabilities(terse_model, images, whole)[:, -1], least=least, written=written)
        best = log_p.argmax(-1).masked_fill(done, SPECIAL.pad)
        done |= best == SPECIAL.sep
        whole = torch.cat([whole, best[:, None]], 1)
    assert torch.equal(got, torch.cat([whole[:, :1], whole[:, 1 + len(prompt) :]], 1))
    shortest = min(row.tolist().index(SPECIAL.sep) for row in got if SPECIAL.sep in row) - 1
    assert shortest >= least and (least or shortest < 4), "no caption is shorter than the least: the test shows nothing"


def test_prompt_and_least_length_change_captions_and_none_changes_nothing(terse_model, images: Tensor) -> None:
    for beams in (1, 3):
        options = {"max_length": 12, "num_beams": beams, "rerank": beams > 1}
        plain = generate_captions(terse_model, images, **options)
        assert torch.equal(generate_captions(terse_model, images, **options, min_length=0, prompt=()), plain)
        for more in ({"min_length": 4}, {"prompt": PROMPT}):
            other = generate_captions(terse_model, images, **options, **more)
            assert other.shape != plain.shape or not torch.equal(other, plain)


@torch.no_grad()
def all_captions(
    model, image: Tensor, *, prompt: tuple[int, ...] = (), least: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Every caption of up to two tokens after [CLS] and a prompt: ids [C, 3] without the prompt, their number of tokens
    [C], log-probability [C]. -inf for those that are shorter than `least` before [SEP]."""
    pairs = product(range(VOCABULARY), repeat=2)
    captions = torch.tensor(
        [(SPECIAL.cls, *pair) for pair in pairs if pair[0] != SPECIAL.sep or pair[1] == SPECIAL.pad]
    )
    whole = torch.cat([captions[:, :1], torch.tensor(prompt).long().expand(len(captions), -1), captions[:, 1:]], 1)
    log_p = log_probabilities(model, image.expand(len(captions), -1, -1, -1), whole)
    tokens = log_p[:, len(prompt) : -1].gather(-1, captions[:, 1:, None])[..., 0]  # [C, 2]
    for written in range(least):
        tokens[captions[:, 1 + written] == SPECIAL.sep, written] = -torch.inf
    count = 3 - (captions[:, 1] == SPECIAL.sep).long()
    return captions, count, tokens[:, 0] + tokens[:, 1] * (count - 2)


@torch.no_grad()
@pytest.mark.parametrize("prompt, least", [((), 0), (PROMPT, 0), (PROMPT, 1), ((), 2)])
def test_beams_find_the_likeliest_caption(model, images: Tensor, prompt: tuple[int, ...], least: int) -> None:
    """With as many beams as there are first tokens, the best of all captions of up to two tokens after the prompt."""
    options = {"max_length": 3 + len(prompt), "min_length": least, "prompt": prompt}
    got = generate_captions(model, images[:2], **options, num_beams=VOCABULARY)
    for image, caption in zip(images[:2], got, strict=True):
        captions, count, log_p = all_captions(model, image, prompt=prompt, least=least)
        best = captions[(log_p / (count - 1)).argmax()]
        assert torch.equal(caption[: len(best)], best[: len(caption)])


@torch.no_grad()
def test_rerank_adds_log_probability_and_similarity(model, images: Tensor) -> None:
    """Among the beams, ordered by mean log-probability per token, the best by log-probability plus similarity."""
    options = {"max_length": 3, "num_beams": VOCABULARY}
    got = generate_captions(model, images, **options, rerank=True)
    assert not torch.equal(got, generate_captions(model, images, **options)), (
        "reranking changes no caption: the test shows nothing"
    )
    for image, caption in zip(images, got, strict=True):
        captions, count, log_p = all_captions(model, image)
        kept = (log_p / (count - 1)).topk(VOCABULARY).indices
        _, text = model.encode_text(captions[kept], torch.arange(3) < count[kept, None])
        _, feature = model.encode_image(image[None])
        best = captions[kept[(log_p[kept] + model.logit_scale.exp() * text @ feature[0]).argmax()]]
        assert torch.equal(caption[: len(best)], best[: len(caption)])


@pytest.mark.parametrize("rerank", [False, True])
def test_images_of_a_batch_do_not_mix(model, images: Tensor, rerank: bool) -> None:
    options = {"max_length": 8, "num_beams": 3, "rerank": rerank}
    together = generate_captions(model, images, **options)
    for row, image in enumerate(images):
        (alone,) = generate_captions(model, image[None], **options)
        assert torch.equal(together[row, : len(alone)], alone)
        assert (together[row, len(alone) :] == SPECIAL.pad).all()


@pytest.fixture(scope="module")
def terse_model():
    """A model with so likely a [SEP] that captions end early."""
    model = small_sycoca().eval()
    with torch.no_grad():
        model.caption_head.weight[SPECIAL.sep] *= 3.0
    return model


@torch.no_grad()
@pytest.mark.parametrize("prompt, least", [((), 0), (PROMPT, 1)])
def test_beams_of_several_lengths_have_both_scores(
    terse_model, images: Tensor, prompt: tuple[int, ...], least: int
) -> None:
    """Both of the caption without the prompt; the log-probability is that of the tokens behind it."""
    limits = {"max_length": 8 + len(prompt), "min_length": least, "prompt": prompt}
    beams = search_captions(terse_model, images, **limits, num_beams=4)
    captions = beams.captions.flatten(0, 1)
    ends = captions == SPECIAL.sep
    count = torch.where(ends.any(1), ends.long().argmax(1) + 1, captions.shape[1])
    assert len(set(count.tolist())) > 2
    mask = torch.arange(captions.shape[1]) < count[:, None]
    of_beams = images.repeat_interleave(4, 0)
    whole = torch.cat([captions[:, :1], torch.tensor(prompt).long().expand(len(captions), -1), captions[:, 1:]], 1)
    log_p = log_probabilities(terse_model, of_beams, whole)[:, len(prompt) : -1]
    log_p = log_p.gather(-1, captions[:, 1:, None])[..., 0]
    expected = (log_p * mask[:, 1:]).sum(1).view(-1, 4)
    torch.testing.assert_close(beams.log_prob, expected.float())  # transformers adds up in fp32
    _, texts = terse_model.encode_text(captions, mask)
    similarity = (texts * terse_model.encode_image(of_beams)[1]).sum(1).view(-1, 4)
    torch.testing.assert_close(beams.similarity, terse_model.logit_scale.exp() * similarity)
    mean = beams.log_prob / (count.view(-1, 4) - 1)
    assert (mean.diff(dim=1) <= 1e-6).all()
    options = {**limits, "num_beams": 4}
    for rerank, number in (
        (False, torch.zeros(len(images), dtype=torch.long)),
        (True, (expected + beams.similarity).argmax(1)),
    ):
        got = generate_captions(terse_model, images, **options, rerank=rerank)
        chosen = beams.captions[torch.arange(len(images)), number]
        assert torch.equal(got, chosen[:, : got.shape[1]]) and (chosen[:, got.shape[1] :] == SPECIAL.pad).all()


@pytest.mark.parametrize("rerank", [False, True])
def test_captions_are_padded_after_sep(terse_model, images: Tensor, rerank: bool) -> None:
    got = generate_captions(terse_model, images, max_length=8, num_beams=3, rerank=rerank)
    lengths = [row.tolist().index(SPECIAL.sep) + 1 if SPECIAL.sep in row else got.shape[1] for row in got]
    assert min(lengths) < max(lengths) == got.shape[1]
    for row, length in zip(got, lengths, strict=True):
        assert (row[length:] == SPECIAL.pad).all()


def test_samples_come_from_the_nucleus(model, images: Tensor) -> None:
    torch.manual_seed(0)
    start = torch.full((1, 1), SPECIAL.cls)
    order = log_probabilities(model, images[:1], start)[0, -1].exp().sort(descending=True)
    size = 1 + int((order.values.cumsum(0) < 0.6).sum())
    drawn = generate_captions(model, images[:1].expand(256, -1, -1, -1), max_length=2, top_p=0.6)[:, 1]
    assert set(drawn.tolist()) == set(order.indices[:size].tolist())
    assert size > 1
    least = generate_captions(model, images, max_length=8, top_p=1e-6)
    assert torch.equal(least, generate_captions(model, images, max_length=8))
    assert torch.equal(least, generate_captions(model, images, max_length=8, rerank=True))  # of one beam


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, r"max_length: expected 2 to text.max_positions = 16, got 1"),
        ({"max_length": 17}, r"max_length: expected 2 to .* 16, got 17"),
        ({"max_length": 5, "min_length": 5}, r"min_length: expected 0 to 4, as max_length = 5 leaves, got 5"),
        ({"max_length": 5, "min_length": -1}, r"min_length: expected 0 to 4, .* got -1"),
        (
            {"max_length": 6, "min_length": 3, "prompt": PROMPT},
            r"min_length: expected 0 to 2, as max_length = 6 leaves behind a prompt of 3, got 3",
        ),
        ({"max_length": 4, "prompt": PROMPT}, r"prompt: expected fewer than 3 tokens, got 3"),
        ({"max_length": 5, "num_beams": 0}, r"num_beams: expected at least 1, got 0"),
        ({"max_length": 5, "top_p": 1.5}, r"top_p: expected a number in \(0, 1\], got 1.5"),
        ({"max_length": 5, "top_p": 0.5, "rerank": True}, r"rerank: expected beam search without top_p, got top_p 0.5"),
    ],
)
def test_bad_options_are_refused(model, images: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_captions(model, images, **options)


def test_empty_batch_is_refused(model, images: Tensor) -> None:
    message = r"images: expected at least one image \[B, 3, S, S\], got shape \[0, 3, "
    with pytest.raises(ValueError, match=message):
        generate_captions(model, images[:0], max_length=5)
    with pytest.raises(ValueError, match=message):
        search_captions(model, images[:0], max_length=5, num_beams=2)


def test_search_with_one_beam_is_refused(model, images: Tensor) -> None:
    with pytest.raises(ValueError, match="num_beams: expected at least 2, got 1"):
        search_captions(model, images, max_length=5, num_beams=1)


def test_generation_keeps_modes_and_statistics_of_a_training_model(model, images: Tensor) -> None:
    """Captions equal those in evaluation mode; neither running statistics nor modes change."""
    expected = generate_captions(model, images, max_length=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.backbone.text.eval()
    try:
        assert torch.equal(generate_captions(model, images, max_length=6), expected)
        assert model.training and model.backbone.vision.training and not model.backbone.text.training
    finally:
        model.eval()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
