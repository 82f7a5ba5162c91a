"""Captions to tokens, with the words and characters that the tokens come from."""

from __future__ import annotations

import json
import os
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tokenizers import Encoding, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from softmask.data.cleaning import Plain, plain_words
from softmask.lfs import refuse_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
NEEDED = ("pad", "cls", "sep", "mask")  # every tokenizer must have these
NO_WORD = -1  # word number of special tokens, padding and punctuation
NO_SPAN = (0, 0)  # character span of special tokens and padding
_PRIVATE_USE = 0xF0000
BASIC = tuple(f"{start}{one}" for start in ("", "##") for one in string.digits + string.ascii_lowercase) + tuple(
    ",.?!'-&"
)
"""Pieces that a trained WordPiece has even if its captions lack them, while there is room: captions are not all that a
model will read."""
LONGEST_TOKEN = 400  # characters, white space around it included
LONGEST_WORD = 100  # characters; a WordPiece reads longer words as [UNK]


@dataclass
class TokenBatch:
    """Tokens of B captions, padded to the longest (T tokens)."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] bool, True = real token
    word_ids: Tensor  # [B, T] int64: number of the word in its caption, or NO_WORD
    offsets: Tensor  # [B, T, 2] int64: character span in the caption, or NO_SPAN
    cut: Tensor  # [B] bool, True = the caption was truncated


class CaptionTokenizer:
    """A Hugging Face tokenizer that encloses captions in [CLS] ... [SEP] and knows the words of tokens."""

    def __init__(self, tokenizer: Tokenizer, *, pad_id: int, cls_id: int, sep_id: int, mask_id: int, tokens: dict):
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A caption that contains "[MASK]" must not become a mask token.
        self._tokenizer.encode_special_tokens = True
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = pad_id, cls_id, sep_id, mask_id
        self.special_ids: tuple[int, ...] = (pad_id, cls_id, sep_id, mask_id)
        # Added tokens may follow the model's vocabulary, with gaps.
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._tokens = tokens

    @classmethod
    def load(cls, path: str | os.PathLike) -> CaptionTokenizer:
        """Load any Hugging Face tokenizer folder.

        Raises:
            ValueError: it cannot be loaded, has no fast tokenizer (which gives the offsets), or lacks one of the tokens
                cls, sep, pad and mask.
        """
        from transformers import AutoTokenizer  # takes seconds to import

        path = os.fspath(path)
        if not os.path.isdir(path):
            raise ValueError(f"tokenizer: {path} is not a folder")
        _refuse_pointers(path)
        try:
            loaded = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # tokenizers raises bare Exceptions
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(f"tokenizer: {path} cannot be loaded ({reason})") from error
        return cls.from_hugging_face(loaded, name=path)

    @classmethod
    def from_hugging_face(cls, loaded: PreTrainedTokenizerBase, *, name: str) -> CaptionTokenizer:
        """From a transformers tokenizer; `name` appears in errors."""
        backend = getattr(loaded, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"tokenizer: {name} has no fast tokenizer (tokenizer.json), got {type(loaded).__name__}")
        ids = {token: getattr(loaded, f"{token}_token_id") for token in NEEDED}
        lacking = [token for token, value in ids.items() if value is None]
        if lacking:
            raise ValueError(f"tokenizer: {name} lacks the special tokens {', '.join(lacking)}")
        special = {token.content for token in loaded.added_tokens_decoder.values()} | set(loaded.all_special_tokens)
        if not set(backend.get_vocab(with_added_tokens=True)) - special:
            raise ValueError(
                f"tokenizer: {name} knows no word, only {len(special)} special tokens: is vocab.txt missing?"
            )
        tokens = {key: getattr(loaded, key) for key in SPECIAL_TOKENS if getattr(loaded, key) is not None}
        return cls(backend, tokens=tokens, **{f"{token}_id": value for token, value in ids.items()})

    def unknown(self, captions: Iterable[str]) -> float:
        """The share of [UNK] among the tokens of captions, without special tokens."""
        texts = list(captions)
        counts = Counter(i for one in self._tokenizer.encode_batch(texts, add_special_tokens=False) for i in one.ids)
        unknown = self._tokenizer.token_to_id(self._tokens.get("unk_token", ""))
        return 0.0 if unknown is None else counts[unknown] / max(1, sum(counts.values()))

    def same_words(self, other: CaptionTokenizer) -> bool:
        """Whether both have the same vocabulary, special tokens included."""
        words, others = (one._tokenizer.get_vocab(with_added_tokens=True) for one in (self, other))
        return words == others and self.special_ids == other.special_ids

    def save(self, path: str | os.PathLike) -> None:
        """Write a folder that `load` and transformers' AutoTokenizer read."""
        os.makedirs(path, exist_ok=True)
        self._tokenizer.save(os.path.join(path, "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self._tokens}
        with open(os.path.join(path, "tokenizer_config.json"), "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2, ensure_ascii=False)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_tokenizer": self._tokenizer.to_str()}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _tokenizer=Tokenizer.from_str(state["_tokenizer"]))
        self._tokenizer.encode_special_tokens = True  # not part of the tokenizer's own state

    def __call__(
        self, captions: Sequence[str], *, max_length: int, append_sep: bool = True, clean: bool = False
    ) -> TokenBatch:
        """Tokens of [CLS] caption [SEP], padded to the longest of the batch.

        Args:
            captions: B texts.
            max_length: tokens per caption, [CLS] and [SEP] included.
            append_sep: False: no [SEP], as in ALBEF.
            clean: clean the captions as ALBEF does (cleaning.py). Offsets refer to the captions as given.
        """
        if max_length < (least := 2 + append_sep):
            tokens = "[CLS], a token, [SEP]" if append_sep else "[CLS], a token"
            raise ValueError(f"max_length: expected at least {least} ({tokens}), got {max_length}")
        room, ends = max_length - 1 - append_sep, [self.sep_id] * append_sep
        longest = LONGEST_TOKEN * max_length  # do not tokenize megabytes
        read = [plain_words(text[:longest]) if clean else Plain(text[:longest]) for text in captions]
        shortened = [plain.cut or len(text) > longest for plain, text in zip(read, captions, strict=True)]
        encodings = self._tokenizer.encode_batch([plain.text for plain in read], add_special_tokens=False)
        rows = [self._row(plain, encoding, room, ends) for plain, encoding in zip(read, encodings, strict=True)]
        width = max((len(row[0]) for row in rows), default=0)

        def padded(column: int, value: int | tuple[int, int]) -> Tensor:
            return torch.tensor([row[column] + [value] * (width - len(row[column])) for row in rows], dtype=torch.int64)

        counts = torch.tensor([len(encoding.ids) for encoding in encodings], dtype=torch.int64)
        lengths = torch.tensor([len(row[0]) for row in rows], dtype=torch.int64)
        return TokenBatch(
            input_ids=padded(0, self.pad_id).view(len(rows), width),
            attention_mask=torch.arange(width) < lengths[:, None],
            word_ids=padded(1, NO_WORD).view(len(rows), width),
            offsets=padded(2, NO_SPAN).view(len(rows), width, 2),
            cut=torch.tensor(shortened, dtype=torch.bool) | (counts > room),
        )

    def decode(self, input_ids: Tensor) -> list[str]:
        """[B, T] -> captions, without special tokens."""
        return self._tokenizer.decode_batch(input_ids.tolist(), skip_special_tokens=True)

    def _row(self, plain: Plain, encoding: Encoding, room: int, ends: list) -> tuple[list, ...]:
        """Ids, word numbers and character spans of one caption, special tokens included."""
        text, places = plain.text, plain.places
        numbers: dict[int | None, int] = {}
        words, spans = [NO_WORD], [NO_SPAN]
        for word, (start, end) in zip(encoding.word_ids[:room], encoding.offsets[:room], strict=True):
            while start < end and text[start].isspace():  # SentencePiece includes the space before a word
                start += 1
            spans.append((places[start][0], places[end - 1][1]) if places and start < end else (start, end))
            words.append(NO_WORD if _is_punctuation(text[start:end]) else numbers.setdefault(word, len(numbers)))
        ids = [self.cls_id, *encoding.ids[:room], *ends]
        return ids, [*words, *[NO_WORD] * len(ends)], [*spans, *[NO_SPAN] * len(ends)]


def _refuse_pointers(folder: str) -> None:
    for name in sorted(os.listdir(folder)):
        if os.path.isfile(path := os.path.join(folder, name)):
            refuse_pointer(path, "tokenizer")


def _is_punctuation(text: str) -> bool:
    """No letter, digit or part of one; also for the empty text."""
    return not text.isalnum() and all(unicodedata.category(character)[0] in "PSZC" for character in text)


def train_wordpiece(captions: Iterable[str], path: str | os.PathLike, *, vocab_size: int = 4096) -> CaptionTokenizer:
    """Train a lower-case BERT-style WordPiece on `captions` and save it as a Hugging Face folder. Where there is room,
    it has all letters and digits of ASCII, too.

    The same captions give the same vocabulary, byte for byte.

    Raises:
        ValueError: no words, or a `vocab_size` without room for the special tokens and the alphabet.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for chunk, n in Counter(chunk for caption in captions for chunk in caption.split()).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(chunk[: 10 * LONGEST_WORD])):
            if len(word) <= LONGEST_WORD:
                counts[word] += n
    if not counts:
        raise ValueError("train: its captions have no words to train a WordPiece on")
    if vocab_size < len(SPECIAL_TOKENS) + 2:
        raise ValueError(f"vocab_size: expected at least {len(SPECIAL_TOKENS) + 2}, got {vocab_size}")
    room = vocab_size - len(SPECIAL_TOKENS)
    learned = _learn_pieces(counts, room)
    # Questions and answers have letters and digits that captions may lack.
    tokens = [
        *SPECIAL_TOKENS.values(),
        *learned,
        *[piece for piece in BASIC if piece not in learned][: room - len(learned)],
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    ids = {f"{name}_id": vocabulary[SPECIAL_TOKENS[f"{name}_token"]] for name in NEEDED}
    trained = CaptionTokenizer(tokenizer, tokens=SPECIAL_TOKENS, **ids)
    trained.save(path)
    return trained


def _learn_pieces(counts: Counter[str], size: int) -> list[str]:
    """At most `size` word pieces; "##" marks those inside a word.

    `tokenizers`' WordPieceTrainer numbers the "##" characters in the order of a randomly seeded hash map, so its
    vocabulary changes from run to run. Its BPE trainer is deterministic. Inner characters are therefore replaced by
    private-use characters, which BPE distinguishes from initial ones, and restored afterwards.
    """
    alphabet = sorted({character for word in counts for character in word})
    inner = {character: chr(_PRIVATE_USE + number) for number, character in enumerate(alphabet)}
    outer = {code: character for character, code in inner.items()}
    coded = {word[0] + "".join(inner[character] for character in word[1:]): n for word, n in counts.items()}
    kept = _frequent_characters(coded, size // 2)
    lines = (line for word, n in sorted(coded.items()) if kept.issuperset(word) for line in _repeat(word, n))

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    codes = bpe.get_vocab()
    ranked = sorted(codes, key=codes.__getitem__)
    return [("##" if code[0] in outer else "") + "".join(outer.get(c, c) for c in code) for code in ranked]


def _frequent_characters(words: dict[str, int], limit: int) -> set[str]:
    """The `limit` most frequent characters. Words with others (rare scripts) would become [UNK] anyway."""
    counts: Counter[str] = Counter()
    for word, n in words.items():
        for character in word:
            counts[character] += n
    return set(sorted(counts, key=lambda character: (-counts[character], character))[:limit])


def _repeat(word: str, times: int, longest: int = 10_000) -> Iterator[str]:
    """`word` repeated `times` times, in lines of bounded length: the trainer takes text, not counts."""
    for start in range(0, times, longest):
        yield " ".join([word] * min(longest, times - start))
