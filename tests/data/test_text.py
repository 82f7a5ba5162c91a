"""Tokens, their words and their characters; the trained WordPiece."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast

from softmask.data import CaptionTokenizer, train_wordpiece

CAPTIONS = [
    "A dodo above a red apple and two cherries", "a red apple, beside the dodo", "two cherries and a don't-care dodo!",
    "the cherry tree; an apple tree", "Café crème beside a dodo",
] * 3  # fmt: skip
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "apple",
    "cher",
    "##ries",
    "##ry",
    ",",
    "!",
    "'",
    "don",
    "t",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("wordpiece")
    return train_wordpiece(CAPTIONS, path, vocab_size=120), path


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizerFast(vocab={token: i for i, token in enumerate(VOCABULARY)}).save_pretrained(folder)
    return folder


def test_tokens_words_and_offsets(bert_folder):
    tokenizer = CaptionTokenizer.load(bert_folder)
    captions = ["a red Apple, cherries!", "  don't a cherry"]
    batch = tokenizer(captions, max_length=25)
    i = VOCABULARY.index
    assert batch.input_ids.tolist() == [
        [2, i("a"), i("red"), i("apple"), i(","), i("cher"), i("##ries"), i("!"), 3],
        [2, i("don"), i("'"), i("t"), i("a"), i("cher"), i("##ry"), 3, 0],
    ]
    assert batch.attention_mask.tolist() == [[True] * 9, [True] * 8 + [False]]
    assert batch.word_ids.tolist() == [[-1, 0, 1, 2, -1, 3, 3, -1, -1], [-1, 0, -1, 1, 2, 3, 3, -1, -1]]
    spans = [[c[s:e] for s, e in row if e] for c, row in zip(captions, batch.offsets.tolist(), strict=True)]
    assert spans == [["a", "red", "Apple", ",", "cher", "ries", "!"], ["don", "'", "t", "a", "cher", "ry"]]
    assert batch.offsets[0, 0].tolist() == batch.offsets[0, -1].tolist() == batch.offsets[1, -2].tolist() == [0, 0]
    assert {t.dtype for t in (batch.input_ids, batch.word_ids, batch.offsets)} == {torch.int64}
    assert batch.attention_mask.dtype == torch.bool


def test_equals_transformers_on_plain_captions(bert_folder):
    theirs = AutoTokenizer.from_pretrained(bert_folder)
    ours = CaptionTokenizer.load(bert_folder)
    captions = ["a red apple", "Cherries, a cherry, don't a zebra! " * 4, "a"]
    for max_length in (4, 9, 25):
        expected = theirs(captions, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        batch = ours(captions, max_length=max_length)
        assert torch.equal(batch.input_ids, expected["input_ids"])
        assert torch.equal(batch.attention_mask, expected["attention_mask"].bool())
    assert (ours.pad_id, ours.cls_id, ours.sep_id, ours.mask_id) == (0, 2, 3, 4) == ours.special_ids
    assert ours.vocab_size == len(VOCABULARY)


def test_truncation_keeps_both_ends(bert_folder):
    batch = CaptionTokenizer.load(bert_folder)(["a red apple cherries", "a"], max_length=4)
    assert batch.input_ids.tolist() == [[2, 5, 6, 3], [2, 5, 3, 0]]
    assert batch.word_ids.tolist() == [[-1, 0, 1, -1], [-1, 0, -1, -1]]
    with pytest.raises(ValueError, match="max_length: expected at least 3"):
        CaptionTokenizer.load(bert_folder)(["a"], max_length=2)


def test_caption_cannot_spell_special_tokens(bert_folder):
    tokenizer = CaptionTokenizer.load(bert_folder)
    for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        row = copy(["a [MASK] [PAD] [SEP] red"], max_length=25).input_ids[0].tolist()
        assert not {0, 2, 3, 4} & set(row[1:-1])


def test_empty_batch(bert_folder):
    batch = CaptionTokenizer.load(bert_folder)([], max_length=25)
    assert (batch.input_ids.shape, batch.offsets.shape) == ((0, 0), (0, 0, 2))


def test_saved_tokenizer_loads_equal(bert_folder, tmp_path):
    first = CaptionTokenizer.load(bert_folder)
    first.save(tmp_path / "copy")
    second = CaptionTokenizer.load(tmp_path / "copy")
    text = ["a red cherry, don't [MASK]"]
    for one, other in zip(
        vars(first(text, max_length=25)).values(), vars(second(text, max_length=25)).values(), strict=True
    ):
        assert torch.equal(one, other)
    assert second.special_ids == first.special_ids
    assert second.vocab_size == first.vocab_size


def test_incomplete_tokenizers_are_refused(tmp_path, bert_folder):
    PreTrainedTokenizerFast(
        tokenizer_file=str(bert_folder / "tokenizer.json"), cls_token="[CLS]", pad_token="[PAD]"
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks the special tokens sep, mask"):
        CaptionTokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        CaptionTokenizer.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded"):
        CaptionTokenizer.load(tmp_path / "empty")


def test_trained_wordpiece_knows_its_captions(trained):
    tokenizer, path = trained
    unknown = AutoTokenizer.from_pretrained(path).unk_token_id
    batch = tokenizer(CAPTIONS, max_length=60)
    assert not (batch.input_ids == unknown).any()
    assert tokenizer.vocab_size <= 120
    assert tokenizer.special_ids == (0, 2, 3, 4)
    once = tokenizer(["a dodo", "A DODO"], max_length=25)
    assert torch.equal(once.input_ids[0], once.input_ids[1]), "lower-cased"
    pieces = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    assert {"apple", "dodo", "##o"} <= set(pieces), "frequent words are whole, inner characters are included"
    word = tokenizer(["dodox cafe"], max_length=25)
    assert word.word_ids[0].tolist()[1] == 0 and len(set(word.word_ids[0].tolist())) == 3


def test_trained_wordpiece_in_transformers(trained):
    tokenizer, path = trained
    for theirs in (AutoTokenizer.from_pretrained(path), PreTrainedTokenizerFast.from_pretrained(path)):
        expected = theirs(CAPTIONS, padding=True, return_tensors="pt")
        assert torch.equal(tokenizer(CAPTIONS, max_length=99).input_ids, expected["input_ids"])
        assert theirs.decode(expected["input_ids"][1], skip_special_tokens=True) == "a red apple, beside the dodo"
        assert theirs.mask_token_id == tokenizer.mask_id
    loaded = CaptionTokenizer.load(path)
    assert torch.equal(loaded(CAPTIONS, max_length=25).word_ids, tokenizer(CAPTIONS, max_length=25).word_ids)


def test_training_is_deterministic_over_processes(trained, tmp_path):
    """Hash seeds differ between processes; the WordPiece trainer of the tokenizers library fails this."""
    code = (
        "import sys, json; from softmask.data import train_wordpiece;"
        "train_wordpiece(json.load(sys.stdin), sys.argv[1], vocab_size=120)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], input=json.dumps(CAPTIONS), text=True, check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (trained[1] / name).read_bytes()


def test_rare_characters_do_not_crowd_out_words(tmp_path):
    """Frequent characters and pieces stay in the vocabulary; the rest is [UNK]."""
    rare = "".join(map(chr, range(0x4E00, 0x4E80)))
    tokenizer = train_wordpiece([*["apple tree"] * 50, rare], tmp_path, vocab_size=60)
    assert tokenizer.vocab_size <= 60
    assert len(tokenizer(["apple tree"], max_length=25).input_ids[0]) == 4


def test_training_refuses_no_words_and_a_small_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="no words"):
        train_wordpiece([" ", ""], tmp_path)
    with pytest.raises(ValueError, match="vocab_size"):
        train_wordpiece(["a b"], tmp_path, vocab_size=6)


def test_folder_without_its_vocabulary_is_refused(tmp_path) -> None:
    """transformers would load it as a tokenizer with special tokens only."""
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(ValueError, match=r"knows no word, only \d special tokens|cannot be loaded"):
        CaptionTokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2\n")
    with pytest.raises(ValueError, match=r"vocab.txt is a pointer of git-lfs"):
        CaptionTokenizer.load(tmp_path)


def test_unknown_is_the_share_of_unk_tokens(tmp_path) -> None:
    tokenizer = train_wordpiece(["red green red"], tmp_path)
    assert tokenizer.unknown(["red green"]) == 0.0
    assert tokenizer.unknown(["red \u4e00", "\u4e00 \u4e01"]) == 0.75
    assert tokenizer.unknown([]) == 0.0


def test_trained_wordpiece_reads_letters_and_digits_that_its_captions_lack(tmp_path):
    tokenizer = train_wordpiece(["red green red"], tmp_path)
    texts = ["how many cats are there? 2", "0", "what's at 17:30?"]
    assert tokenizer.unknown(texts[:2]) == 0 and tokenizer.unknown(texts[2:]) > 0
    crowded = train_wordpiece(["red green red"], tmp_path / "crowded", vocab_size=20)
    assert crowded.vocab_size == 20 and crowded.unknown(["red green"]) == 0
