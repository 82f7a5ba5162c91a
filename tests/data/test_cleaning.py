"""Captions as ALBEF reads them: cleaned, without [SEP], one per image and epoch."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

from softmask.data import DataConfig, Loader, SampleError, open_source, train_wordpiece
from softmask.data.cleaning import plain_words
from softmask.data.loader import require_words
from softmask.data.order import Images
from tests.support.data_files import make_image, write_tar


@pytest.mark.parametrize(
    ("caption", "plain"),
    [
        ("A Dog, on the beach!", "a dog on the beach"),
        ("<PERSON> and <person>'s dog", "person and persons dog"),
        ("black-and-white  and/or\tgrey ", "black and white and or grey"),
        ("Tom &amp; Jerry &#39;s &lt;3 &quot;cat&quot; &nbsp;x", "tom & jerry s <3 cat x"),
        ("fish & chips; &unknown; R&D", "fish & chips &unknown r&d"),
        ('?!.,"()*#:;~', ""),
        ("  ", ""),
        ("CAFÉ Straße", "café straße"),
        ("(left) a , b", "left a b"),
    ],
)
def test_captions_are_cleaned_as_by_albef(caption: str, plain: str) -> None:
    assert plain_words(caption).text == plain


def test_cleaned_characters_keep_their_positions() -> None:
    caption = "Tom &amp; <person>, İ-x"
    found = plain_words(caption)
    assert len(found.text) == len(found.places)
    came = {text: "".join(caption[s:e] for s, e in dict.fromkeys(found.places[m.start() : m.end()]))
            for m in re.finditer(r"\S+", found.text) for text in [m.group()]}  # fmt: skip
    assert came == {"tom": "Tom", "&": "&amp;", "person": "person", "i̇": "İ", "x": "x"}


def test_captions_are_cut_to_30_words() -> None:
    words = [f"w{number}" for number in range(31)]
    assert plain_words(" ".join(words[:30]))[::2] == (" ".join(words[:30]), False)
    assert plain_words(" ".join(words))[::2] == (" ".join(words[:30]), True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    captions = ["a red apple and the person beside a tree", "two cherries & a dodo"] * 3
    return train_wordpiece(captions, tmp_path_factory.mktemp("words"), vocab_size=120)


def test_tokens_of_cleaned_captions_point_into_the_caption(tokenizer) -> None:
    caption = "A red-apple, and <person>!"
    batch = tokenizer([caption], max_length=25, clean=True)
    assert tokenizer.decode(batch.input_ids) == ["a red apple and person"]
    words = {}
    for word, (start, end) in zip(batch.word_ids[0].tolist(), batch.offsets[0].tolist(), strict=True):
        if word >= 0:
            first, _ = words.get(word, (start, end))
            words[word] = (first, end)
    assert [caption[start:end] for start, end in words.values()] == ["A", "red", "apple", "and", "person"]


def test_without_sep_one_more_token_fits(tokenizer) -> None:
    long = "a " * 40
    with_sep, without = (tokenizer([long, "a dodo"], max_length=25, append_sep=sep) for sep in (True, False))
    assert (with_sep.input_ids == tokenizer.sep_id).sum() == 2 and not (without.input_ids == tokenizer.sep_id).any()
    assert [int(batch.attention_mask[0].sum()) for batch in (with_sep, without)] == [25, 25]
    assert [int((batch.word_ids[0] >= 0).sum()) for batch in (with_sep, without)] == [23, 24]
    assert int(without.attention_mask[1].sum()) == int(with_sep.attention_mask[1].sum()) - 1
    assert with_sep.cut.tolist() == without.cut.tolist() == [True, False]
    for batch in (with_sep, without):
        assert batch.input_ids.shape == batch.word_ids.shape == batch.offsets.shape[:2] == (2, 25)
    assert tokenizer(["a"], max_length=2, append_sep=False).input_ids.shape == (1, 2)
    with pytest.raises(ValueError, match=r"max_length: expected at least 2 \(\[CLS\], a token\), got 1"):
        tokenizer(["a"], max_length=1, append_sep=False)


def test_huge_captions_are_fast(tokenizer, tmp_path) -> None:
    begin = time.perf_counter()
    for text in ("a dodo " * 1_000_000, "w" * 5_000_000):
        batch = tokenizer([text], max_length=25)
        assert batch.cut.tolist() == [True] and batch.input_ids.shape[1] <= 25
    train_wordpiece(["a dodo", "w" * 5_000_000, "x" * 99], tmp_path, vocab_size=60)
    assert time.perf_counter() - begin < 20


def test_captions_cut_by_words_are_marked(tokenizer) -> None:
    words = "a " * 31
    assert tokenizer([words], max_length=60, clean=True).cut.tolist() == [True]
    assert tokenizer([words], max_length=60).cut.tolist() == [False]


# -- what an epoch reads ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Nine captions of five images in two shards; one image is in both."""
    folder = tmp_path_factory.mktemp("several")
    for shard, numbers in enumerate([{0: 3, 1: 1, 2: 2}, {3: 1, 0: 1, 4: 1}]):
        members = []
        for number, lines in numbers.items():
            text = "\n".join(f"a red apple {number} {shard} {line}" for line in range(lines))
            members += [(f"{number:04d}.png", make_image(number)), (f"{number:04d}.txt", text.encode())]
        write_tar(folder / f"train-{shard}.tar", members)
    return open_source(str(folder / "train-{0..1}.tar"))


def captions_of(source, tokenizer, *, epochs: int, batch_size: int = 5, **options) -> list[list[int]]:
    """The image_id of every sample, epoch by epoch. Another test checks that captions differ between epochs."""
    config = DataConfig(image_size=16, captions="random", **options)
    loader = Loader(source, config, tokenizer, batch_size=batch_size)
    assert loader.batches_per_epoch == 5 // batch_size
    batches = iter(loader)
    return [next(batches).image_id.tolist() for _ in range(epochs * loader.batches_per_epoch)]


def test_each_image_is_read_once_per_epoch(several, tokenizer) -> None:
    assert (len(several), several.images) == (9, 5)
    for ids in captions_of(several, tokenizer, epochs=6):
        assert sorted(ids) == sorted(set(several.image_ids.tolist()))


def test_captions_of_an_image_are_drawn_equally_often(several) -> None:
    images = Images(several.group_sizes, several.image_ids)
    assert images.group_sizes.tolist() == [3, 2]  # the image in both shards belongs to the first
    everything = np.arange(5)
    drawn = np.stack([images.captions(everything, seed=3, epoch=epoch) for epoch in range(4000)])
    assert (several.image_ids[drawn] == several.image_ids[drawn[0]]).all()
    counts = np.bincount(drawn.ravel(), minlength=9)
    for image in set(several.image_ids.tolist()):
        own = counts[several.image_ids == image]
        assert abs(own - 4000 / len(own)).max() < 5 * (4000 / len(own)) ** 0.5
    again = images.captions(everything[::-1], seed=3, epoch=7)
    assert again[::-1].tolist() == drawn[7].tolist()  # in any order


def test_captions_without_words_are_skipped_when_cleaned(tmp_path, tokenizer) -> None:
    members = []
    for number, caption in enumerate(["a red apple", "!!!", "two cherries"]):
        members += [(f"{number}.png", make_image(number)), (f"{number}.txt", caption.encode())]
    source = open_source(str(write_tar(tmp_path / "train.tar", members)))
    with pytest.raises(SampleError, match=r"train.tar:1: caption '!!!' has no words after cleaning"):
        require_words(source.read(1))
    for clean, skipped in ((True, 1), (False, 0)):
        config = DataConfig(image_size=16, clean_captions=clean)
        batch = next(iter(Loader(source, config, tokenizer, batch_size=3)))
        assert len(batch.skipped) == skipped
