"""Directories of tokenizers of many kinds, as common packages write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from support.tokenizers_for_tests import CORPUS, END
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast, T5Tokenizer, XLMRobertaTokenizer

ROWS = 1000
"""Size of the vocabulary of the model beside the tokenizer. All of their ids are below it."""

Kind = Callable[[Path], None]
"""Writes the tokenizer files, and what else they need, into a directory."""

CHINESE = ["我爱北京天安门。", "今天天气很好、我们去公园玩吧。", "机器学习和自然语言处理"] * 5


@cache
def byte_level_model() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and merges of a small byte-level BPE with `<|endoftext|>` at its end."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    vocab = {**model["vocab"], END: len(model["vocab"])}
    return vocab, [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_vocab_and_merges(directory: Path, line_end: str = "\n") -> int:
    """Write the files of transformers before version 5. Returns the number of tokens."""
    vocab, merges = byte_level_model()
    write_json(directory / "vocab.json", vocab)
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (directory / "merges.txt").write_bytes(line_end.join(lines).encode())
    return len(vocab)


def old_style(directory: Path) -> None:
    write_vocab_and_merges(directory)
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
    write_json(directory / "special_tokens_map.json", roles)
    write_json(directory / "tokenizer_config.json", {"add_prefix_space": False, "model_max_length": 1024, **roles})


def vocab_and_merges_alone(directory: Path) -> None:
    write_vocab_and_merges(directory, line_end="\r\n")


def old_style_with_added_tokens(directory: Path) -> None:
    """Special and ordinary added tokens, as DialoGPT's and chat models have them."""
    size = write_vocab_and_merges(directory)
    added = ["<speaker1>", "<speaker2>", "bitcoin", "<pad>", "的"]
    write_json(directory / "added_tokens.json", {token: size + i for i, token in enumerate(added)})
    roles = {"bos_token": END, "eos_token": "<speaker2>", "unk_token": END, "pad_token": "<pad>"}
    write_json(directory / "special_tokens_map.json", roles)
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})


def with_special_tokens_of_the_map(directory: Path) -> None:
    """Tokens that the special tokens map describes as objects, and additional ones."""
    size = write_vocab_and_merges(directory)
    write_json(directory / "added_tokens.json", {"<user>": size, "<bot>": size + 1})
    end = {"content": END, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    roles = {"bos_token": end, "eos_token": end, "unk_token": END, "additional_special_tokens": ["<user>", "<bot>"]}
    write_json(directory / "special_tokens_map.json", roles)


def with_prefix_space(directory: Path) -> None:
    write_vocab_and_merges(directory)
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True})


def with_bos(directory: Path) -> None:
    size = write_vocab_and_merges(directory)
    write_json(directory / "added_tokens.json", {"<s>": size, "</s>": size + 1})
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    write_json(directory / "tokenizer_config.json", settings)


def with_bos_and_eos_and_prefix_space(directory: Path) -> None:
    with_bos(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    write_json(directory / "tokenizer_config.json", {**settings, "add_eos_token": True, "add_prefix_space": True})


def saved_by_transformers(directory: Path, **settings: Any) -> GPT2Tokenizer:
    vocab, merges = byte_level_model()
    tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges, **settings)
    tokenizer.save_pretrained(directory)
    return tokenizer


def new_style(directory: Path) -> None:
    saved_by_transformers(directory)


def new_style_with_added_tokens(directory: Path) -> None:
    """Special, ordinary, stripping, single-word and normalized tokens. Some are prefixes of others."""
    tokenizer = saved_by_transformers(directory)
    tokenizer.add_special_tokens(
        {
            "pad_token": "<pad>",
            "eos_token": AddedToken("<eos>", lstrip=True, rstrip=True, special=True),
            "additional_special_tokens": ["<user>", "<user>bot", AddedToken("<|x|>", rstrip=True, special=True)],
        }
    )
    tokenizer.add_tokens(["bitcoin", AddedToken("cat", single_word=True), AddedToken(" dog", normalized=False), "é"])
    tokenizer.save_pretrained(directory)


def with_plain_added_tokens(directory: Path) -> None:
    """Special and ordinary added tokens that strip no white space. Some are prefixes of others."""
    tokenizer = saved_by_transformers(directory)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<user>", "<user>bot"]})
    tokenizer.add_tokens(["bitcoin", "bit", AddedToken("coins", normalized=False), "<user>b", "é", "\n\n"])
    tokenizer.save_pretrained(directory)


def new_over_old(directory: Path) -> None:
    """A directory of an older version into which transformers 5 saved: some tokens are only in `tokenizer.json`."""
    old_style_with_added_tokens(directory)
    tokenizer = GPT2Tokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(directory)


def with_post_processor(directory: Path) -> None:
    """A template in `tokenizer.json`. It applies although `add_bos_token` is false."""
    saved_by_transformers(directory)
    stored = json.loads((directory / "tokenizer.json").read_text())
    end = stored["model"]["vocab"][END]
    processor = processors.TemplateProcessing(single=f"{END} $A {END}", special_tokens=[(END, end)])
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(stored))
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processor])
    tokenizer.save(str(directory / "tokenizer.json"))


def as_stored(tokenizer: tokenizers.Tokenizer, directory: Path, **roles: Any) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(directory)


def byte_level_of_its_own_words(directory: Path) -> None:
    """Digits apart, ignore_merges, a truncation and a normalizer: what `GPT2Tokenizer` would drop."""
    vocab, merges = byte_level_model()
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.enable_truncation(5)
    as_stored(tokenizer, directory, eos_token=END)


def bpe_with_suffix(directory: Path) -> None:
    """BPE of characters with an end-of-word suffix and an unknown token, but no bytes, as in OpenAI's first GPT."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    as_stored(tokenizer, directory, unk_token="<unk>", eos_token="</s>")


def bpe_with_byte_fallback(directory: Path) -> None:
    """SentencePiece's BPE, as Llama's tokenizers have it: metaspace, and bytes for unknown characters."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    stored = json.loads(tokenizer.to_str())
    stored["added_tokens"] = stored["added_tokens"][:3]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(stored))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    as_stored(tokenizer, directory, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def llama(directory: Path) -> None:
    """Like Llama 2's `tokenizer.json`. `LlamaTokenizer` uses its vocabulary, merges and post-processor."""
    bpe_with_byte_fallback(directory)
    stored = json.loads((directory / "tokenizer.json").read_text())
    start = stored["model"]["vocab"]["<s>"]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(stored))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False})


@cache
def unigram_vocabulary() -> list[tuple[str, float]]:
    """Return pieces and scores, after the special tokens of T5."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=280, special_tokens=special, unk_token="<unk>", show_progress=False, n_sub_iterations=1
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]


def t5(directory: Path) -> None:
    """Like rinna's models saved by transformers 5."""
    vocab = unigram_vocabulary()
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, bos_token=vocab[3][0])
    tokenizer.add_special_tokens({"sep_token": "[SEP]"})
    tokenizer.save_pretrained(directory)


def t5_with_sentinels(directory: Path) -> None:
    vocab = [*unigram_vocabulary(), *((f"<extra_id_{i}>", 0.0) for i in range(3, -1, -1))]
    T5Tokenizer(vocab=vocab, extra_ids=4, eos_token="<pad>").save_pretrained(directory)


def xlm_roberta(directory: Path) -> None:
    vocab = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    XLMRobertaTokenizer(vocab=[*vocab, *unigram_vocabulary()[3:], ("<mask>", 0.0)]).save_pretrained(directory)


def unigram(directory: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    as_stored(tokenizer, directory, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def bert_vocabulary() -> list[str]:
    characters = sorted({c for text in CHINESE for c in text} | set("abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"))
    words = ["the", "quick", "dog", "##s", "##ing", "##ed", "un", "##known", "hello", *(f"##{c}" for c in "aeioutn")]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *words]


def write_vocab_txt(directory: Path, **settings: Any) -> None:
    (directory / "vocab.txt").write_text("".join(f"{token}\n" for token in bert_vocabulary()), encoding="utf-8")
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", **settings})


def chinese_wordpiece(directory: Path) -> None:
    """Like the tokenizer of uer/gpt2-chinese-cluecorpussmall."""
    write_vocab_txt(directory)
    roles = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
    write_json(directory / "special_tokens_map.json", {f"{role}_token": token for role, token in roles.items()})


def cased_wordpiece(directory: Path) -> None:
    write_vocab_txt(directory, do_lower_case=False, tokenize_chinese_chars=False, strip_accents=True)
    write_json(
        directory / "added_tokens.json",
        {"[unused1]": len(bert_vocabulary()), "hello-world": len(bert_vocabulary()) + 1},
    )


def saved_wordpiece(directory: Path) -> None:
    vocab = {token: i for i, token in enumerate(bert_vocabulary())}
    tokenizer = BertTokenizer(vocab=vocab, do_lower_case=True, clean_up_tokenization_spaces=True)
    tokenizer.add_special_tokens({"bos_token": "[BOS]", "eos_token": "[EOS]"})
    tokenizer.save_pretrained(directory)


def word_level(directory: Path) -> None:
    words = sorted({word for text in CORPUS for word in text.split()})
    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", *words])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    as_stored(tokenizer, directory, unk_token="<unk>", bos_token="<s>")


def characters(directory: Path) -> None:
    """Characters with an unknown token."""
    vocab = {c: i for i, c in enumerate(["<unk>", *sorted({c for text in CORPUS for c in text})])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    as_stored(tokenizer, directory, unk_token="<unk>")


KINDS: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (
        *(old_style, vocab_and_merges_alone, old_style_with_added_tokens, with_special_tokens_of_the_map),
        *(with_prefix_space, with_bos, with_bos_and_eos_and_prefix_space, new_style, new_style_with_added_tokens),
        *(with_plain_added_tokens, new_over_old, with_post_processor, byte_level_of_its_own_words, bpe_with_suffix),
        *(bpe_with_byte_fallback, llama, unigram, t5, t5_with_sentinels, xlm_roberta),
        *(chinese_wordpiece, cased_wordpiece, saved_wordpiece, word_level, characters),
    )
}
