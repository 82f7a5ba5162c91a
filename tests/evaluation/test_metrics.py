"""Metrics against naive loops, with ties, duplicates, chance levels and small maps."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from softmask.evaluation import metrics


def naive_recall(scores, relevant, k):
    """Sort each row, wrong items first among ties, and count the wrong ones before the first right one."""
    hits = 0
    for row, right in zip(scores.tolist(), relevant.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], right[j]))
        wrong_before = 0
        for j in order:
            if right[j]:
                break
            wrong_before += 1
        hits += wrong_before < k
    return hits / len(scores)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [3, 1000])
def test_recall_equals_naive_loop_with_ties_and_duplicates(seed, levels):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (23, 17), generator=draw).float()
    relevant = metrics.right_answers(torch.arange(23) % 7, torch.arange(17) % 7)
    result = metrics.recall(scores, relevant)
    assert list(result) == ["r1", "r5", "r10"]
    for k in (1, 5, 10):
        assert result[f"r{k}"] == naive_recall(scores, relevant, k)


def test_recall_of_a_perfect_and_of_a_constant_model():
    relevant = torch.eye(40, dtype=torch.bool)
    assert metrics.recall(relevant.float(), relevant) == {"r1": 1.0, "r5": 1.0, "r10": 1.0}
    assert metrics.recall(torch.zeros(40, 40), relevant) == {"r1": 0.0, "r5": 0.0, "r10": 0.0}
    assert metrics.recall(-relevant.float(), relevant, ks=(39, 40)) == {"r39": 0.0, "r40": 1.0}


def test_every_caption_of_the_image_is_right():
    caption_of = torch.tensor([0, 0, 1, 2, 2])
    relevant = metrics.right_answers(torch.tensor([0, 1, 2]), caption_of)
    scores = torch.tensor([[1.0, 9, 5, 0, 0], [8, 1, 5, 1, 9], [0, 0, 9, 1, 2]])
    assert metrics.best_ranks(scores, relevant).tolist() == [0, 2, 1]
    assert metrics.recall(scores, relevant, ks=(1, 2, 3)) == {"r1": 1 / 3, "r2": 2 / 3, "r3": 1.0}


def test_recall_refuses_input_that_would_count_as_a_hit():
    relevant = torch.eye(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="finite, got 1 NaN"):
        metrics.recall(torch.tensor([[torch.nan, 0], [0, 1]]), relevant)
    with pytest.raises(ValueError, match="none for query 1"):
        metrics.recall(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))
    with pytest.raises(ValueError, match=r"got \[2, 2\] for \[2, 3\]"):
        metrics.recall(torch.zeros(2, 3), relevant)


def test_chance_equals_the_mean_over_all_orders():
    relevant = torch.tensor([[True, False, False, True, False], [False, False, True, False, False]])
    for k in (1, 2, 3, 5, 9):
        hits = [any(row[j] for j in order[:k]) for row in relevant.tolist() for order in permutations(range(5))]
        expected = sum(hits) / len(hits)
        assert metrics.chance_recall(relevant, ks=(k,))[f"r{k}"] == pytest.approx(expected, rel=1e-12)


def test_candidates_are_exactly_k_even_with_ties():
    scores = torch.tensor([[1.0, 3, 3, 3, 2], [0, 0, 0, 0, 0]])
    assert metrics.top_candidates(scores, 2).int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert metrics.top_candidates(scores, 16).all()


@pytest.mark.parametrize("k", [1, 4, 9, 30])
def test_rerank_orders_candidates_by_match_and_the_rest_by_score(k):
    draw = torch.Generator().manual_seed(k)
    scores = torch.randn(11, 9, generator=draw)
    match = 50 * torch.randn(11, 9, generator=draw)
    candidates = metrics.top_candidates(scores, k)
    result = metrics.rerank(scores, candidates, match.masked_fill(~candidates, torch.nan))
    for row in range(11):
        first = sorted(scores[row].argsort(descending=True)[:k].tolist(), key=lambda j, r=row: -match[r, j])
        rest = scores[row].argsort(descending=True)[k:].tolist()
        assert result[row].argsort(descending=True).tolist() == first + rest


def test_rerank_cannot_lose_a_right_answer_from_the_first_k_places():
    draw = torch.Generator().manual_seed(0)
    scores, relevant = torch.randn(30, 30, generator=draw), torch.eye(30, dtype=torch.bool)
    match = torch.randn(30, 30, generator=draw)
    result = metrics.rerank(scores, metrics.top_candidates(scores, 5), match)
    assert metrics.recall(result, relevant)["r5"] == metrics.recall(scores, relevant)["r5"]
    assert metrics.recall(result, relevant)["r1"] != metrics.recall(scores, relevant)["r1"]


# "a red apple , dog" with CLS, SEP and padding; "apple" in two pieces
OFFSETS = torch.tensor([[0, 0], [0, 1], [2, 5], [6, 8], [8, 11], [12, 13], [14, 17], [0, 0], [0, 0]])


@pytest.mark.parametrize(
    ("span", "tokens"),
    [
        ((2, 11), [2, 3, 4]),
        ((6, 11), [3, 4]),
        ((7, 9), [3, 4]),  # overlaps half of each piece
        ((0, 1), [1]),
        ((14, 17), [6]),
        ((14, 21), []),  # its end was truncated
        ((20, 25), []),
        ((11, 12), []),  # white space
    ],
)
def test_tokens_of_a_span(span, tokens):
    assert metrics.tokens_of_span(OFFSETS, span) == tokens


def test_stack_words_pads_with_minus_one():
    assert metrics.stack_words([[[3], [4, 5]], []]).tolist() == [[[3, -1], [4, 5]], [[-1, -1], [-1, -1]]]
    assert metrics.stack_words([[]]).tolist() == [[[-1]]]


def naive_bilinear(plane, size):
    """Interpolate at each pixel's centre in patch coordinates, clamped to the patch centres (fp64)."""
    (gh, gw), (h, w) = plane.shape, size
    out = torch.zeros(h, w, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            py, px = max((y + 0.5) * gh / h - 0.5, 0), max((x + 0.5) * gw / w - 0.5, 0)
            y0, x0 = min(int(py), gh - 1), min(int(px), gw - 1)
            y1, x1 = min(y0 + 1, gh - 1), min(x0 + 1, gw - 1)
            fy, fx = py - y0, px - x0
            top = plane[y0, x0] * (1 - fx) + plane[y0, x1] * fx
            bottom = plane[y1, x0] * (1 - fx) + plane[y1, x1] * fx
            out[y, x] = top * (1 - fy) + bottom * fy
    return out


def test_upsampling_is_bilinear_between_patch_centres():
    maps = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    result = metrics.upsample_maps(maps, (3, 4), (15, 22))
    for got, patches in zip(result, maps, strict=True):
        truth = naive_bilinear(patches.double().reshape(3, 4), (15, 22))
        rounding = 4 * torch.finfo(torch.float32).eps  # four products of numbers below 1
        assert (got.double() - truth).abs().max() <= rounding
    with pytest.raises(ValueError, match=r"\[W, 3 \* 4\]"):
        metrics.upsample_maps(maps[:, :11], (3, 4), (15, 22))


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("column", range(4))
def test_peak_lies_in_its_patch_centre_on_all_sides(row, column):
    maps = torch.zeros(4, 4)
    maps[row, column] = 1
    y, x = metrics.peak(metrics.upsample_maps(maps.reshape(1, -1), (4, 4), (44, 44))[0])
    assert (y, x) == (11 * row + 5, 11 * column + 5)


def test_peak_of_constant_and_nan_maps():
    assert metrics.peak(torch.full((5, 7), 0.3)) is None
    with pytest.raises(ValueError, match="finite"):
        metrics.peak(torch.tensor([[0.0, torch.nan]]))


def test_pointing_game_needs_the_peak_inside_the_mask():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:4, 5:7] = True
    inside, outside = torch.zeros(8, 8), torch.zeros(8, 8)
    inside[3, 5], inside[0, 0] = 2, 1
    outside[3, 4], outside[3, 5] = 2, 1
    assert metrics.pointing_hit(inside, mask)
    assert not metrics.pointing_hit(outside, mask)
    assert not metrics.pointing_hit(torch.ones(8, 8), torch.ones(8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[8, 8\], got \[8, 7\]"):
        metrics.pointing_hit(inside, mask[:, :7])


def test_matrices_by_rows_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, match = torch.rand(2, 12, 7, generator=torch.Generator().manual_seed(0))
    found = []
    for rows in (5, 256):
        monkeypatch.setattr(metrics, "ROWS", rows)
        candidates = metrics.top_candidates(scores, 3)
        ranked = metrics.rerank(scores, candidates, match)
        found.append((candidates, ranked, metrics.best_ranks(ranked, scores > 0.1)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
