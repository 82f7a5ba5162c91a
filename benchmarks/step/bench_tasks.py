"""Tasks after pre-training at full size, beside the published way: re-ranking, ranking of answers, NLVR2's step.

    python -m benchmarks.step.bench_tasks [--case rerank | answers | nlvr2] [--size 384] [--turns 5] [--threads 1]

ViT-B/16, six text and six fusion layers, fp32, random weights, the same for both sides. The published way
(plain_tasks.py) gives every pair its own copy of keys and values, pads texts to the longest and materializes attention.
Values are compared first; then both sides run in turns, and ratios, by the clock and in processor time, are medians of
those within a turn. On a busy machine set OMP_WAIT_POLICY=passive: threads that wait for others do not count as busy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.step.plain_tasks import PlainTasks
from softmask.batch import LabeledBatch
from softmask.data import DataConfig
from softmask.evaluation.gallery import Gallery, Piece
from softmask.evaluation.readers import Scorer
from softmask.evaluation.retrieval import match_scores
from softmask.models import SoftMaskPP, SoftMaskPPConfig, SpecialIds, TextConfig, VisionConfig
from softmask.models.config import Distillation, VqaHead
from softmask.models.distilled import distilled_cross_entropy
from softmask.models.softmask_pp.classifier import Nlvr2
from softmask.models.softmask_pp.vqa import Vqa
from softmask.training.config import Config, TrainConfig

SPECIAL = SpecialIds(pad=0, cls=101, sep=102, mask=103)
VOCABULARY = 30522
ANSWER_LENGTHS = {3: 0.75, 4: 0.15, 5: 0.06, 6: 0.03, 7: 0.01}  # tokens, [CLS] and [SEP] included, and their share
AGREEMENT = 1e-5  # of scores, relative to the largest


@dataclass
class Comparison:
    """Two ways to the same tensor."""

    name: str
    ours: Callable[[], Tensor]
    published: Callable[[], Tensor]


def config(size: int) -> SoftMaskPPConfig:
    text = TextConfig(vocab_size=VOCABULARY, dropout=0.0, attention_dropout=0.0)
    return SoftMaskPPConfig(
        vision=VisionConfig(name="vit_base_patch16_224", image_size=size), text=text, queue_size=0, soft_mask=False
    )


def texts(count: int, *, longest: int, shares: dict[int, float] | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids [N, T] from [CLS] to [SEP] and their mask, of 4 to `longest` tokens, or of lengths with `shares`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, longest + 1, (count,), generator=generator)
    if shares is not None:
        drawn = torch.multinomial(torch.tensor(list(shares.values())), count, replacement=True, generator=generator)
        lengths = torch.tensor(list(shares))[drawn]
    lengths[0] = longest
    ids = torch.randint(1000, VOCABULARY, (count, longest), generator=generator)
    mask = torch.arange(longest) < lengths[:, None]
    ids[:, 0] = SPECIAL.cls
    return ids.scatter(1, lengths[:, None] - 1, SPECIAL.sep).where(mask, SPECIAL.pad), mask


def rerank(size: int) -> Comparison:
    """64 captions of one picture, from encoded tokens, as the evaluation does it."""
    options = config(size)
    model = SoftMaskPP(options, special_ids=SPECIAL).eval()
    ids, mask = texts(64, longest=25)
    with torch.no_grad():
        image, image_feature = model.encode_image(torch.randn(1, 3, size, size))
        text, text_feature = model.encode_text(ids, mask)
    data = DataConfig(train="none.tar", image_size=size)
    run = Config(output="none", train=TrainConfig(steps=1), model=options, data=data)
    scorer = Scorer(model, None, run, batch_size=len(ids))
    number = torch.zeros(len(ids), dtype=torch.int64)
    gallery = Gallery(
        captions=[""] * len(ids), images=[0], image_ids=number[:1], caption_ids=number,
        pieces=[Piece(slice(0, 1), image)], image_features=image_feature, cut=0,
        text_tokens=text, text_features=text_feature, attention_mask=mask,
        unseen_images=number[:1] > 0, unseen_captions=number > 0,
    )  # fmt: skip
    plain, wanted = PlainTasks(model), torch.ones(1, len(ids), dtype=torch.bool)
    return Comparison(
        f"re-ranking of {len(ids)} captions of a picture",
        lambda: match_scores(scorer, gallery, wanted)[0],
        lambda: plain.match_all(image, text, mask)[0],
    )


def answers(size: int) -> Comparison:
    """128 of 3,128 answers to one question, from its fused states. Most answers are one word of one token; the longest
    of the list has 10 tokens."""
    model = Vqa(config(size), VqaHead(alpha=0.0), special_ids=SPECIAL).eval()
    ids, mask = texts(1, longest=14)
    listed, listed_mask = texts(3128, longest=10, shares=ANSWER_LENGTHS, seed=1)
    plain = PlainTasks(model)
    with torch.no_grad():
        read = torch.randn(1, 3, size, size), ids, mask
        questions, states = model.read_questions(*read), plain.question(model.backbone, *read)
        answer_list = model.list_answers(listed, listed_mask)
    return Comparison(
        "ranking of 128 of 3,128 answers",
        lambda: model.rank(questions, answer_list, k=128)[1][0],
        lambda: plain.rank_answers(states, mask, listed, listed_mask, k=128).topk(128).values[0],
    )


def nlvr2(size: int) -> Comparison:
    """A fine-tuning step of two examples without the optimizer: forward passes of model and momentum copy, backward."""
    model = Nlvr2(config(size), Distillation(), special_ids=SPECIAL)
    ids, mask = texts(2, longest=20)
    batch = LabeledBatch(
        torch.randn(4, 3, size, size), ids, mask, torch.full_like(ids, -1), torch.arange(2), labels=torch.tensor([0, 1])
    )
    plain, teacher = PlainTasks(model), PlainTasks(model)

    def published() -> Tensor:
        model.zero_grad()
        with torch.no_grad():
            soft = teacher.classify(batch.images, ids, mask, network=model.momentum_encoder)
        logits = plain.classify(batch.images, ids, mask)
        loss = distilled_cross_entropy(logits, batch.labels, teacher=soft, alpha=0.4)
        loss.backward()
        return loss.detach()[None]

    def ours() -> Tensor:
        model.zero_grad()
        loss = model(batch, alpha=0.4).loss
        loss.backward()
        return loss.detach()[None]

    return Comparison("NLVR2's step, 2 examples", ours, published)


CASES = {"rerank": rerank, "answers": answers, "nlvr2": nlvr2}


def measure(case: Comparison, *, turns: int) -> str:
    """A line with both times and their ratio.

    Raises:
        AssertionError: the values differ.
    """
    expected, got = case.published(), case.ours()
    difference = ((got - expected).abs().max() / expected.abs().max()).item()
    assert difference <= AGREEMENT, f"{case.name}: values differ by {difference:.2g}, relative to the largest"
    taken = [(seconds(case.ours), seconds(case.published)) for _ in range(turns)]
    ours, published = (statistics.median(turn[side][0] for turn in taken) for side in (0, 1))
    faster, work = (statistics.median(theirs[kind] / own[kind] for own, theirs in taken) for kind in (0, 1))
    times = f"{ours:.3f} s, published {published:.3f} s, {faster:.2f} x ({work:.2f} x in processor time)"
    return f"{case.name}: {times}; values differ by {difference:.1g}"


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Time of one call by the clock, and of the processors that it kept busy, which another program does not slow."""
    start, busy = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--size", type=int, default=384, help="side of the pictures in pixels")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{harness.processor()}, {options.threads} threads, torch {torch.__version__}")
    for name in options.case or CASES:
        torch.manual_seed(0)
        print(measure(CASES[name](options.size), turns=options.turns), flush=True)


if __name__ == "__main__":
    main()
