"""Text to token ids and back, from a Hugging Face folder, from a GGUF file, or from nothing.

Text is data here: a special token's spelling inside a text is encoded like any other text (a Py150 prompt begins with a
literal "<s> "), and special tokens reach a sequence by their ids only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from mora_jax.errors import MoraError, unknown
from mora_jax.models.gguf import GGUFFile, open_gguf
from mora_jax.models.hf import read_json


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


# `tokenizer.ggml.pre` -> pre-tokenizer; the regexes behind the names are in llama.cpp (llama-vocab.cpp, the
# LLAMA_VOCAB_PRE_TYPE_* cases). smollm is GPT-2's regex after every digit has been split off.
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _byte_level,
    "smollm": _single_digits,
}
# `tokenizer.ggml.model` that we rebuild: byte-level BPE.
MODELS = ("gpt2",)
# `tokenizer.ggml.token_type` (llama.h, llama_token_type).
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


class Tokenizer:
    """A `tokenizers.Tokenizer` that adds no special tokens and parses none out of a text.

    `bos_id` is the beginning-of-sequence token that the tokenizer has, whether or not it asks to be added (None where
    there is none); `eos_id` ends an answer; `pad_id` falls back to `eos_id`, padding is masked anyway. `vocab_size` is
    one more than the largest id, `reach` one more than the largest that a text, bos or eos has: special tokens that
    were added to a vocabulary come from no text, and a model's embedding need not have rows for them. Added tokens that
    are not special (a model's own markup such as runs of spaces) are ordinary vocabulary and are recognised in text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        eos_id: int | None,
        pad_id: int | None = None,
        source: object = "tokenizer",
    ):
        """Take over `backend`; `source` names it in errors.

        Raises MoraError for a missing `eos_id`, an id outside the vocabulary, and a vocabulary in which the spelling of
        bos or eos is also ordinary text, because a text could then end a sequence.
        """
        if eos_id is None:
            raise MoraError(f"{source}: no end-of-sequence token; name one (eos_token in tokenizer_config.json)")
        # A stored truncation or padding would silently change what encode returns.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        added = (token for token, content in backend.get_added_tokens_decoder().items() if not content.special)
        ends = (token for token in (bos_id, eos_id) if token is not None)
        self.reach = 1 + max([*backend.get_vocab(with_added_tokens=False).values(), *added, *ends])
        for kind, token in (("bos", bos_id), ("eos", eos_id), ("pad", self.pad_id)):
            spelling = None if token is None else backend.id_to_token(token)
            if token is not None and spelling is None:
                raise MoraError(f"{source}: {kind} id {token} is not in the vocabulary (0 to {self.vocab_size - 1})")
            if kind != "pad" and spelling is not None and token in self.encode(spelling):
                raise MoraError(f"{source}: the text {spelling!r} is encoded as the {kind} token {token} itself")

    def __reduce__(self) -> tuple[Any, ...]:
        # The backend pickles as JSON, which drops `encode_special_tokens`; the constructor sets it again.
        return _restore, (self._backend.to_str(), self.bos_id, self.eos_id, self.pad_id)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, nothing added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of every text, nothing added and nothing padded, encoded in parallel."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids. Special tokens and ids outside the vocabulary are skipped."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def for_rows(self, rows: int) -> Tokenizer:
        """The tokenizer for an embedding of so many rows: where pad has none, as in some fine-tunes, eos is the pad."""
        if self.pad_id < rows:
            return self
        return Tokenizer(self._backend, bos_id=self.bos_id, eos_id=self.eos_id)

    @property
    def special_ids(self) -> dict[str, int | None]:
        """bos, eos and pad by their names in Hugging Face's config files."""
        return {"bos_token_id": self.bos_id, "eos_token_id": self.eos_id, "pad_token_id": self.pad_id}

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `from_folder` and transformers read.

        By them a text begins with bos where there is one, as every sequence that a decoder of ours reads, and nothing
        else is added.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        ids = {name.removesuffix("_id"): number for name, number in self.special_ids.items()}
        named = {name: None if number is None else backend.id_to_token(number) for name, number in ids.items()}
        bos = named["bos_token"]
        backend.post_processor = bos and processors.TemplateProcessing([bos, "$A"], special_tokens=[(bos, self.bos_id)])
        backend.save(str(folder / "tokenizer.json"))
        content = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
        (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_gguf(cls, path: str | Path | GGUFFile) -> Tokenizer:
        """Rebuild the byte-level BPE that a GGUF file carries.

        Raises MoraError for another tokenizer model, an unknown pre-tokenizer or missing tokenizer fields.
        """
        file = open_gguf(path)
        model, pre = _field(file, "model"), _field(file, "pre")
        if model not in MODELS:
            raise MoraError(f"{file.path}: {unknown('tokenizer.ggml.model', model, MODELS)}")
        if pre not in PRE_TOKENIZERS:
            raise MoraError(f"{file.path}: {unknown('tokenizer.ggml.pre', pre, PRE_TOKENIZERS)}")
        tokens, kinds = _field(file, "tokens"), _field(file, "token_type")
        if len(tokens) != len(kinds):
            raise MoraError(
                f"{file.path}: {len(tokens)} tokens but {len(kinds)} token types; there must be one for each"
            )
        merges = [tuple(merge.split(" ", 1)) for merge in _field(file, "merges")]
        backend = _byte_level_bpe(tokens, merges, PRE_TOKENIZERS[pre](), file.path)
        named = [(kind, _added(token, kind != _USER_DEFINED)) for token, kind in zip(tokens, kinds, strict=True)]
        backend.add_special_tokens([token for kind, token in named if kind in (_UNKNOWN, _CONTROL)])
        backend.add_tokens([token for kind, token in named if kind == _USER_DEFINED])
        ids = {name: file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")}
        return cls(backend, bos_id=ids["bos"], eos_id=ids["eos"], pad_id=ids["padding"], source=file.path)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json` of a Hugging Face folder.

        bos, eos and pad are those of tokenizer_config.json, else of special_tokens_map.json, else of config.json; the
        first file that has the key decides, also when it says null. Raises MoraError for a folder without
        `tokenizer.json`, a broken file, or a special token that the vocabulary lacks.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.exists():
            raise MoraError(f"{path}: no tokenizer.json, the one tokenizer format read from a folder")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        # The Rust library raises bare Exception.
        except Exception as error:
            raise MoraError(f"{file}: not a readable tokenizer ({error})") from error
        ids = {name: _folder_id(path, name, backend) for name in ("bos", "eos", "pad")}
        return cls(backend, bos_id=ids["bos"], eos_id=ids["eos"], pad_id=ids["pad"], source=path)

    @classmethod
    def byte_level(cls) -> Tokenizer:
        """One token for each byte, then <bos> = 256 and <eos> = <pad> = 257: for tiny random models, no download."""
        backend = _byte_level_bpe(
            sorted(pre_tokenizers.ByteLevel.alphabet()),
            [],
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            "byte-level tokenizer",
        )
        backend.add_special_tokens([_added("<bos>", special=True), _added("<eos>", special=True)])
        return cls(backend, bos_id=256, eos_id=257)


def _restore(state: str, bos_id: int | None, eos_id: int, pad_id: int) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(state), bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)


def _added(token: str, special: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, special=special, normalized=False)


def _byte_level_bpe(
    tokens: Sequence[str], merges: list[Any], pre: pre_tokenizers.PreTokenizer, source: object
) -> tokenizers.Tokenizer:
    try:
        model = models.BPE({token: number for number, token in enumerate(tokens)}, merges)
    # The Rust library raises bare Exception, here for a merge whose parts or result are no tokens.
    except Exception as error:
        raise MoraError(f"{source}: tokens and merges do not fit together ({error})") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()
    return backend


def _field(file: GGUFFile, name: str) -> Any:
    key = f"tokenizer.ggml.{name}"
    if key not in file.fields:
        raise MoraError(f"{file.path}: no field {key!r}; a GGUF file with a byte-level BPE tokenizer has it")
    return file.fields[key]


def _folder_id(folder: Path, name: str, backend: tokenizers.Tokenizer) -> int | None:
    """The id of the bos, eos or pad token by the first file of a folder that speaks of it, or None."""
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        content = read_json(file) if file.exists() else {}
        if f"{name}_token" not in content:
            continue
        # Older files spell an AddedToken out as an object.
        token = content[f"{name}_token"]
        token = token.get("content") if isinstance(token, dict) else token
        number = None if token is None else backend.token_to_id(token)
        if token is not None and number is None:
            raise MoraError(f"{file}: {name}_token {token!r} is not in the vocabulary of tokenizer.json")
        return number
    file = folder / "config.json"
    number = read_json(file).get(f"{name}_token_id") if file.exists() else None
    # Chat models list several ends of sequence; the first is the tokenizer's own.
    return number[0] if isinstance(number, list) else number
