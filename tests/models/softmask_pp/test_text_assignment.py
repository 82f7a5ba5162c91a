"""Text assignment against copies of pictures, written plainly."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks.step.plain_tasks import PlainTasks
from softmask.batch import Batch
from softmask.models.layers.packing import Packing
from softmask.models.softmask_pp.masking import two_negatives
from softmask.models.softmask_pp.text_assignment import TextAssignment, have_others, two_pictures
from softmask.tasks.downstream import NoOptions
from tests.support.model_fixtures import SPECIAL, small_batch, small_config


def small_model() -> TextAssignment:
    torch.manual_seed(0)
    model = TextAssignment(small_config(), NoOptions(), special_ids=SPECIAL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(4.0) if parameter.ndim > 1 else parameter.normal_(std=0.1)
    return model.double().eval()  # BatchNorm would count copies of pictures


def distinct(batch: Batch) -> Batch:
    return replace(batch, image_id=torch.arange(len(batch.images)))


def plain_logits(model: TextAssignment, batch: Batch, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Every caption with a copy of its left and of its right picture."""
    network = model.backbone
    network.head = network.assignment
    pictures = torch.stack([batch.images[left], batch.images[right]], dim=1).flatten(0, 1)
    return PlainTasks(model).classify(pictures, batch.input_ids, batch.attention_mask)


def test_every_caption_has_its_place() -> None:
    place = torch.tensor([0, 1, 2, 0])
    left, right = two_pictures(place, (torch.tensor([3, 2, 1, 2]), torch.tensor([2, 0, 3, 1])))
    assert left.tolist() == [0, 2, 1, 3] and right.tolist() == [3, 1, 3, 2]


def test_loss_and_gradients_equal_those_of_copied_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = small_model(), distinct(small_batch(6, dtype=torch.float64))
    plain_model = copy.deepcopy(model)
    drawn = {}

    def kept(place: torch.Tensor, wrong: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        drawn.update(place=place, pictures=two_pictures(place, wrong))
        return drawn["pictures"]

    monkeypatch.setattr("softmask.models.softmask_pp.text_assignment.two_pictures", kept)
    loss = model(batch).loss
    loss.backward()
    expected = torch.nn.functional.cross_entropy(plain_logits(plain_model, batch, *drawn["pictures"]), drawn["place"])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert sorted(drawn["place"].tolist()) == [0, 0, 1, 1, 2, 2]
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    plain = {name: parameter.grad for name, parameter in plain_model.named_parameters() if parameter.grad is not None}
    names = {name.replace("backbone.head.", "backbone.assignment.") for name in plain}
    assert ours.keys() == names and not any("projection" in name for name in ours)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name.replace("backbone.head.", "backbone.assignment.")], value, msg=name)


def test_prediction_takes_the_most_similar_wrong_pictures() -> None:
    model, batch = small_model(), distinct(small_batch(6, dtype=torch.float64))
    place = torch.arange(6) % 3
    given = batch.images, batch.input_ids, batch.attention_mask
    found = model.predict(*given, ids=batch.image_id, place=place)
    network = model.backbone
    plain = copy.deepcopy(model)
    features = network.encode_image(batch.images).feature
    texts = []
    for ids, mask in zip(*given[1:], strict=True):
        alone = Packing.full(1, int(mask.sum()), mask.device)
        texts.append(network.text_feature(network.text(ids[None, mask], alone), alone, alone.mask))
    similarity = (torch.cat(texts) @ features.T).fill_diagonal_(-torch.inf)
    first, second = similarity.topk(2, dim=1).indices.unbind(1)
    expected = plain_logits(plain, batch, *two_pictures(place, (first, second))).softmax(1)
    torch.testing.assert_close(found, expected.detach())


def test_wrong_pictures_are_of_other_images_and_drawn_by_similarity() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([7, 8, 7, 9, 9, 5])
    logits = torch.zeros(6, 6)
    logits[:, 5] = 3.0
    counts = torch.zeros(6, 6)
    for _ in range(400):
        first, second = two_negatives(logits, ids, draw=True)
        assert (ids[first] != ids).all() and (ids[second] != ids).all() and (first != second).all()
        counts[torch.arange(6), first] += 1
    share = counts[0, 5] / counts[0].sum()
    expected = logits[0, [1, 3, 4, 5]].softmax(0)[-1]
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 400).sqrt()
    assert counts[:, 5].argmax() != 5


def test_a_single_other_picture_is_taken_twice() -> None:
    first, second = two_negatives(torch.randn(2, 2), torch.tensor([0, 1]), draw=True)
    assert first.tolist() == second.tolist() == [1, 0]


def test_captions_without_another_image_in_the_batch_do_not_count() -> None:
    model = small_model()
    alone = replace(small_batch(3, dtype=torch.float64), image_id=torch.tensor([4, 4, 4]))
    output = model(alone)
    output.loss.backward()
    assert output.loss == 0 and all(
        parameter.grad is None or not parameter.grad.any() for parameter in model.parameters()
    )
    single = small_batch(1, dtype=torch.float64)
    given = single.images, single.input_ids, single.attention_mask
    assert model.predict(*given, ids=single.image_id, place=torch.tensor([2])).shape == (1, 3)
    assert have_others(torch.tensor([0, 0, 1, 2])).all() and not have_others(alone.image_id).any()
