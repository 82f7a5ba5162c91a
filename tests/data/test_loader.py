"""Order, determinism, resume, replacement and failure of the loader."""

from __future__ import annotations

import itertools
import pickle
import random

import numpy as np
import pytest
import torch

from softmask.data import Batch, DataConfig, DataError, Loader, open_source, train_wordpiece
from softmask.data.loader import check_bad_share
from softmask.data.order import epoch_order
from tests.support.data_files import CAPTION, make_image, sample, write_shards, write_tar

SMALL = {"image_size": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three shards of seven good samples each, and a tokenizer."""
    folder = tmp_path_factory.mktemp("shards")
    source = open_source(write_shards(folder, 3, 7))
    return source, train_wordpiece(source.captions(), folder / "tokenizer", vocab_size=80)


def take(loader: Loader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def assert_equal(one: Batch, other: Batch) -> None:
    for name, value in vars(one).items():
        same = (
            torch.equal(value, getattr(other, name))
            if isinstance(value, torch.Tensor)
            else value == getattr(other, name)
        )
        assert same, name


def test_batch_holds_images_tokens_and_ids(data):
    source, tokenizer = data
    batch = take(Loader(source, DataConfig(**SMALL), tokenizer, batch_size=4), 1)[0]
    tokens = tokenizer([source.read(i).caption for i in batch.image_id.tolist()], max_length=25)
    assert batch.images.shape == (4, 3, 16, 16) and batch.images.dtype == torch.float32
    for name in ("input_ids", "attention_mask", "word_ids"):
        assert torch.equal(getattr(batch, name), getattr(tokens, name))
    assert batch.image_id.dtype == torch.int64 and batch.skipped == []
    assert batch.num_tokens == int(tokens.attention_mask.sum())
    moved = batch.to("cpu")
    assert_equal(batch, moved)


def test_every_sample_once_per_epoch_and_epochs_differ(data):
    source, tokenizer = data
    loader = Loader(source, DataConfig(**SMALL), tokenizer, batch_size=7)
    assert loader.batches_per_epoch == 3
    ids = torch.cat([batch.image_id for batch in take(loader, 9)]).view(3, 21).tolist()
    assert [sorted(epoch) for epoch in ids] == [list(range(21))] * 3
    assert ids[0] != ids[1] != ids[2] != ids[0]
    other = torch.cat(
        [batch.image_id for batch in take(Loader(source, DataConfig(**SMALL), tokenizer, batch_size=7, seed=1), 3)]
    )
    assert other.tolist() != ids[0]


def test_same_sample_looks_different_in_the_next_epoch(data):
    source, tokenizer = data
    batches = take(Loader(source, DataConfig(**SMALL), tokenizer, batch_size=21), 2)
    views = [dict(zip(b.image_id.tolist(), b.images, strict=True)) for b in batches]
    assert not any(torch.equal(views[0][n], views[1][n]) for n in range(21))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_read_what_one_rank_reads(data, world_size):
    """Also across the end of an epoch, which drops the remainder: 21 samples, 3 batches of 6."""
    source, tokenizer = data
    config = DataConfig(**SMALL)
    one = Loader(source, config, tokenizer, batch_size=6)
    ranks = [
        Loader(source, config, tokenizer, batch_size=6 // world_size, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    assert {loader.batches_per_epoch for loader in (one, *ranks)} == {3}
    for whole, *parts in zip(take(one, 5), *(take(loader, 5) for loader in ranks), strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert torch.equal(whole.image_id, torch.cat([part.image_id for part in parts]))
        tokens = [
            row[mask].tolist() for part in parts for row, mask in zip(part.input_ids, part.attention_mask, strict=True)
        ]
        assert [row[mask].tolist() for row, mask in zip(whole.input_ids, whole.attention_mask, strict=True)] == tokens


def test_resume_and_workers_give_the_same_bits(data):
    source, tokenizer = data
    config = DataConfig(**SMALL, rand_augment=True)
    straight = take(Loader(source, config, tokenizer, batch_size=4), 9)
    for start in (1, 5, 6):  # an epoch has 5 batches
        resumed = take(Loader(source, config, tokenizer, batch_size=4, start_batch=start), 9 - start)
        for one, other in zip(straight[start:], resumed, strict=True):
            assert_equal(one, other)
    config.workers = 2
    for one, other in zip(
        straight[3:], take(Loader(source, config, tokenizer, batch_size=4, start_batch=3), 6), strict=True
    ):
        assert_equal(one, other)


def test_global_generators_are_left_alone(data):
    source, tokenizer = data
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    take(Loader(source, DataConfig(**SMALL, rand_augment=True), tokenizer, batch_size=4), 2)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1][1]) and np.random.get_state()[2] == states[1][2]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_reader_for_workers_can_be_pickled(data):
    source, tokenizer = data
    loader = Loader(source, DataConfig(**SMALL, rand_augment=True), tokenizer, batch_size=4)
    plan = next(iter(loader._plans))
    assert_equal(pickle.loads(pickle.dumps(loader._reader))[plan], loader._reader[plan])


# order


def test_order_is_a_local_permutation():
    sizes = np.array([5, 0, 9, 3, 8])
    owner = np.repeat(np.arange(5), sizes)
    order = epoch_order(sizes, seed=3, epoch=2, window=8)
    assert sorted(order.tolist()) == list(range(25))
    assert order.tolist() == epoch_order(sizes, seed=3, epoch=2, window=8).tolist()
    assert order.tolist() != epoch_order(sizes, seed=3, epoch=3, window=8).tolist()
    assert order.tolist() != epoch_order(sizes, seed=4, epoch=2, window=8).tolist()
    # Shards are read one after the other: the samples of a shard stay within its window of shards.
    for shard in (0, 2, 3, 4):
        places = np.flatnonzero(owner[order] == shard)
        assert places.max() - places.min() < 8 + sizes.max()


def test_small_data_is_shuffled_in_full():
    """Every sample comes first about equally often, within 4 standard deviations of the binomial."""
    sizes = np.array([3, 3])
    firsts = np.bincount([epoch_order(sizes, seed=0, epoch=e)[0] for e in range(1200)], minlength=6)
    assert (np.abs(firsts - 200) <= 4 * (1200 * 5 / 36) ** 0.5).all()


# bad samples


@pytest.fixture
def broken(tmp_path):
    """30 samples, 3 of them unreadable in different ways."""
    members = [member for n in range(27) for member in sample(n)]
    members += [("cut.png", make_image(1)[:200]), ("cut.txt", CAPTION.encode())]
    members += sample(98, b"  ") + sample(99, b"\xff\xfe")
    return open_source(str(write_tar(tmp_path / "a.tar", members)))


def test_unreadable_samples_are_replaced_and_named(broken, data):
    config = DataConfig(**SMALL, max_bad_share=0.5)
    loader = Loader(broken, config, data[1], batch_size=10)
    batches = take(loader, 3)
    assert all(len(batch.images) == 10 for batch in batches)
    ids = torch.cat([batch.image_id for batch in batches])
    assert ids.max() < 27
    skipped = [line for batch in batches for line in batch.skipped]
    for start in (
        "a.tar:cut: image cannot be decoded",
        "a.tar:000098: caption is empty",
        "a.tar:000099: caption is not",
    ):
        assert any(line.startswith(start) for line in skipped), start
    for one, other in zip(
        batches[1:], take(Loader(broken, config, data[1], batch_size=10, start_batch=1), 2), strict=True
    ):
        assert_equal(one, other)


@pytest.mark.parametrize(
    ("bad", "read", "allowed"),
    [(1, 1, 0.0), (5, 5, 0.01), (13, 26, 0.01), (100, 4000, 0.01), (1300, 100_000, 0.01), (400, 400, 0.9)],
)
def test_too_many_bad_samples_raise(bad, read, allowed):
    with pytest.raises(DataError, match=rf"^{bad} of {read} samples are unreadable, .*max_bad_share=.*: a; b$"):
        check_bad_share(bad, read, allowed=allowed, names=["a", "b"])


@pytest.mark.parametrize(
    ("bad", "read", "allowed"),
    [(0, 0, 0.0), (0, 10, 0.0), (3, 3, 0.01), (5, 100, 0.01), (1050, 100_000, 0.01), (9, 9, 1.0), (1, 2, 0.5)],
)
def test_a_few_bad_samples_are_tolerated(bad, read, allowed):
    check_bad_share(bad, read, allowed=allowed, names=[])


def test_half_the_allowed_bad_share_never_raises():
    """1,000 runs over 5,000 samples, 0.5 % bad, 1 % allowed. Without the confidence bound a quarter would raise."""
    bad = np.random.default_rng(0).random((1000, 5000)) < 0.005
    for counts in bad.cumsum(1)[:, 99::100]:
        for number, count in enumerate(counts.tolist(), start=1):
            check_bad_share(count, 100 * number, allowed=0.01, names=[])


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_sample_is_one_line(tmp_path, data, workers):
    write_tar(tmp_path / "a.tar", [m for n in range(4) for m in sample(n, b" ")])
    loader = Loader(open_source(str(tmp_path / "a.tar")), DataConfig(**SMALL, workers=workers), data[1], batch_size=4)
    with pytest.raises(
        DataError, match=r"^32 samples in a row are unreadable, the last: a\.tar:00000\d: caption is empty$"
    ):
        next(iter(loader))


def test_fewer_samples_than_a_batch_are_refused(data):
    with pytest.raises(DataError, match="21 samples are fewer than one batch of 2 x 11"):
        Loader(*data[:1], DataConfig(**SMALL), data[1], batch_size=11, world_size=2)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"rank": 2}, {"seed": -1}, {"start_batch": -1}])
def test_wrong_arguments_are_refused(data, wrong):
    with pytest.raises(ValueError, match="expected batch_size >= 1"):
        Loader(data[0], DataConfig(**SMALL), data[1], **{"batch_size": 2, "world_size": 2} | wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"image_size": 0}, {"max_length": 2}, {"workers": -1}, {"crop_scale": (0.5, 0.2)}, {"max_bad_share": 1.5},
     {"blur_probability": -0.1}, {"jitter": (0.4, 0.4, 0.4, 0.6)}, {"std": (0.0, 1.0, 1.0)}, {"vocab_size": 3}],
)  # fmt: skip
def test_wrong_configuration_names_its_key(wrong):
    with pytest.raises(ValueError, match=rf"^data\.{next(iter(wrong))}: expected"):
        DataConfig(**wrong)
