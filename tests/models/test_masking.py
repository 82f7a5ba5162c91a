"""Masked text, chosen words and hard negatives: distributions and exclusions."""

from __future__ import annotations

import torch

from softmask.models.softmask_pp.masking import IGNORE, mask_tokens, pick_words, sample_negatives, word_positions
from tests.support.model_fixtures import SPECIAL, VOCABULARY, small_batch


def test_masking_rates_and_exclusions():
    torch.manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (400, 100))
    ids[:, 0], ids[:, -10], ids[:, -9:] = SPECIAL.cls, SPECIAL.sep, SPECIAL.pad
    masked = mask_tokens(ids, SPECIAL, vocab_size=VOCABULARY, probability=0.15)
    chosen = masked.labels != IGNORE
    assert not chosen[:, 0].any() and not chosen[:, -10:].any()
    assert torch.equal(masked.labels[chosen], ids[chosen])
    assert torch.equal(masked.input_ids[~chosen], ids[~chosen])
    # 35,600 candidates: five standard deviations of the rate are 0.0095
    assert abs(chosen[:, 1:-10].float().mean() - 0.15) < 0.0095
    became = masked.input_ids[chosen]
    assert abs((became == SPECIAL.mask).float().mean() - 0.8) < 0.03
    kept = (became == ids[chosen]).float().mean()
    assert abs(kept - 0.1) < 0.025
    assert ((became != SPECIAL.mask) & (became != ids[chosen])).any()


def test_every_allowed_word_is_picked_equally_often_and_no_other():
    torch.manual_seed(0)
    word_ids = torch.tensor([[-1, 0, 1, 1, 1, 2, -1, 3, -1]]).expand(8000, -1)
    allowed = torch.ones_like(word_ids, dtype=torch.bool)
    allowed[:, 3] = False  # one token of word 1 is masked, so the word is out
    counts = torch.bincount(pick_words(word_ids, allowed), minlength=4)
    assert counts[1] == 0 and counts.sum() == 8000
    assert (counts[[0, 2, 3]] - 8000 / 3).abs().max() < 5 * (8000 * 2 / 9) ** 0.5
    assert (pick_words(word_ids, torch.zeros_like(allowed)) == -1).all()


def test_word_positions_are_the_words_tokens():
    word_ids = torch.tensor([[-1, 0, 1, 1, 1, 2, -1], [-1, 0, 0, 1, -1, -1, -1]])
    assert word_positions(word_ids, torch.tensor([1, 0]), max_tokens=4).tolist() == [[2, 3, 4, -1], [1, 2, -1, -1]]
    assert word_positions(word_ids, torch.tensor([1, -1]), max_tokens=2).tolist() == [[2, 3], [-1, -1]]


def test_batch_fixture_words_lie_on_real_tokens():
    batch = small_batch()
    assert (batch.input_ids[batch.word_ids >= 0] > SPECIAL.mask).all()


def test_negatives_follow_the_softmax_without_the_own_image():
    torch.manual_seed(0)
    similarity = torch.tensor([[9.0, 1.0, 0.0, 2.0]] * 4)
    ids = torch.tensor([0, 1, 2, 1])
    drawn = torch.stack([sample_negatives(similarity, ids) for _ in range(4000)])
    weights = torch.tensor([1.0, 0.0, 2.0]).exp() / torch.tensor([1.0, 0.0, 2.0]).exp().sum()
    share = torch.bincount(drawn[:, 0], minlength=4) / 4000
    assert share[0] == 0
    assert (share[[1, 2, 3]] - weights).abs().max() < 0.04
    assert not torch.isin(drawn[:, 1], torch.tensor([1, 3])).any()
    assert not torch.isin(drawn[:, 3], torch.tensor([1, 3])).any()


def test_saturated_or_identical_rows_still_have_a_negative():
    similarity = torch.eye(4) * 1e4
    assert (sample_negatives(similarity, torch.arange(4)) != torch.arange(4)).all()
    assert (sample_negatives(similarity, torch.zeros(4, dtype=torch.int64)) != torch.arange(4)).all()
