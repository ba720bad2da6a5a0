"""Tokenizers: a pretrained model's, or one learned here; and texts as tokens in memory-mapped files.

Normalisation is part of the tokenizer, so whoever loads it from best/ has the same.
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from data import _cache
from engine.config import DataConfig, UserError

LEARNED = ("bpe", "characters")  # unigram is not, since threads that sum in any order give another tokenizer each time
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}  # tokens 0 to 3


class Tokenizing(DataConfig):
    tokenizer: str = "auto"
    """name or folder of a pretrained one; "bpe" or "characters" is learned from the training part; "auto": the one of
    model.pretrained where that is set, else "characters\""""
    vocabulary: int = Field(8000, ge=8)
    """most tokens of a tokenizer that is learned"""
    normalize: list[Literal["nfc", "nfkc", "nfd", "nfkd", "lower", "accents", "spaces", "repeats"]] = []
    """done to a text before it is cut into tokens, in this order: a Unicode form ("nfd" takes Korean syllables apart), lower case, accents
    off, any white space one space, a character three times or more only twice"""


def made(config: Tokenizing, chunks: Callable[[], Iterable[list[str]]]) -> dict[str, str]:
    """The tokenizer's files, as transformers names them. One that is learned is so from `chunks` of texts. Raises UserError."""
    if config.tokenizer not in (*LEARNED, "auto"):
        return pretrained(config)
    key = _cache.key_of("tokenizer", [config.tokenizer, config.vocabulary, config.normalize], contents(chunks()))
    place = _cache.kept(key, lambda folder: learn(config, chunks()).save(str(folder / "tokenizer.json")))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}
    return {"tokenizer.json": (place / "tokenizer.json").read_text(), "tokenizer_config.json": json.dumps(described, indent=1)}


def contents(chunks: Iterable[list[str]]) -> Iterable[bytes]:
    return ("\0".join(texts).encode() for texts in chunks)


def pretrained(config: Tokenizing) -> dict[str, str]:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    where = f"data.tokenizer = {config.tokenizer!r}"
    try:
        found = AutoTokenizer.from_pretrained(config.tokenizer)
    except Exception as error:  # of many classes, for a folder that is not there, no connection, a file that is no tokenizer's
        said = str(error).split("\n")[0][:200]
        raise UserError(f"{where}: no tokenizer there ({said}); give a folder, a name, or one of {', '.join(LEARNED)}") from None
    if not found.is_fast:
        raise UserError(f"{where}: has no fast tokenizer (tokenizer.json); choose another model")
    if config.normalize:
        from tokenizers import normalizers

        inner = found.backend_tokenizer
        inner.normalizer = normalizers.Sequence([*normalizer(config.normalize), *([inner.normalizer] if inner.normalizer else [])])
    if found.pad_token is None:
        found.pad_token = found.eos_token or found.unk_token or found.convert_ids_to_tokens(0)
    with tempfile.TemporaryDirectory() as folder:
        found.save_pretrained(folder)
        return {path.name: path.read_text() for path in Path(folder).glob("*.json")}


def learn(config: Tokenizing, chunks: Iterable[list[str]]) -> Any:
    """A tokenizer (of the package tokenizers)."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    shared = {"vocab_size": config.vocabulary, "special_tokens": [*SPECIAL.values()], "show_progress": False}
    if config.tokenizer == "bpe":
        tokenizer, trainer = Tokenizer(models.BPE(unk_token="[UNK]")), trainers.BpeTrainer(**shared)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        tokenizer, trainer = Tokenizer(models.WordLevel(unk_token="[UNK]")), trainers.WordLevelTrainer(min_frequency=2, **shared)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    tokenizer.normalizer = normalizers.Sequence(normalizer(config.normalize))
    tokenizer.train_from_iterator(chunks, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def normalizer(names: list[str]) -> list[Any]:
    from tokenizers import Regex, normalizers

    steps = {name: getattr(normalizers, name.upper()) for name in ("nfc", "nfkc", "nfd", "nfkd")}
    steps |= {"lower": normalizers.Lowercase, "accents": normalizers.StripAccents}
    steps["spaces"] = functools.partial(normalizers.Replace, Regex(r"\s+"), " ")
    steps["repeats"] = functools.partial(normalizers.Replace, Regex(r"(?<=(.)\1)\1+"), "")
    return [steps[name]() for name in names]


def opened(text: str, max_length: int = 0) -> Any:
    """The tokenizer (of the package tokenizers) in a tokenizer.json, which cuts texts after max_length tokens; 0: nowhere."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if max_length:
        tokenizer.enable_truncation(max_length)
    return tokenizer


def facts(files: dict[str, str]) -> dict[str, Any]:
    """What a model must know of it: how many tokens there are, and which fills a batch and which ends a text (None: none does)."""
    tokenizer, described = opened(files["tokenizer.json"]), json.loads(files["tokenizer_config.json"])
    named = {key: described.get(f"{key}_token") for key in ("pad", "eos", "sep")}
    numbers = {key: tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token) for key, token in named.items() if token}
    end = numbers.get("eos", numbers.get("sep"))
    return {"vocabulary": tokenizer.get_vocab_size(), "pad": numbers.get("pad", 0), "end": end}


def encode(tokenizer: Any, chunks: Iterable[list[str]], more: dict[str, Any]) -> Iterator[np.ndarray]:
    """int32 tokens of each text; more["cut"] counts the texts that were cut."""
    more["cut"] = 0
    for texts in chunks:
        for found in tokenizer.encode_batch_fast(texts):
            more["cut"] += bool(found.overflowing)
            yield np.array(found.ids, np.int32)


def tokens(tokenizer: Any, chunks: Callable[[], Iterable[list[str]]], pad: int = 0, cache: bool = True) -> _cache.Arrays:
    """As `encode`, memory-mapped from a cache where there is one: cut once, chunk by chunk."""
    key = _cache.key_of("tokens", tokenizer.to_str(), contents(chunks())) if cache else ""
    return dataclasses.replace(_cache.packed(lambda more: encode(tokenizer, chunks(), more), np.int32, key), pad=pad)
