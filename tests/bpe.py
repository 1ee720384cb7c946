"""A byte-level BPE tokenizer that is trained on the spot, and a random GPT-2 that reads it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from string import ascii_uppercase

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import circuitfind as cf
from circuitfind.tasks import lexicon
from circuitfind.tasks.builtin import DOCSTRING, TASKS


def trained(texts: Iterable[str], size: int, digits: int | None = None) -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer: a space belongs to the word after it, any text can be said, no BOS is added.

    digits: numbers are cut after this many, with a space of their own before them (1: Gemma, Qwen; 3: Llama 3).
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits is not None:
        cut = pre_tokenizers.Split(Regex(rf"\p{{N}}{{1,{digits}}}"), "isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence([cut, core.pre_tokenizer])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|end|>", eos_token="<|end|>")


@cache
def english() -> PreTrainedTokenizerFast:
    """Every word of the built-in tasks after a space in one token, years in two: what GPT-2's tokenizer has."""
    words = [*lexicon.FEMALE_NAMES, *lexicon.MALE_NAMES, *lexicon.STORY_NAMES, *lexicon.PLACES, *lexicon.OBJECTS]
    words += [*lexicon.ADJECTIVES, *lexicon.PEOPLE, *lexicon.EVENTS, *lexicon.IDENTIFIERS, *lexicon.DESCRIPTIONS]
    words += [word for pair in (*lexicon.NOUNS, *lexicon.CAPITALS) for word in pair]
    words += ["she", "he", "is", "are", "was", "were", *FINANCE, *lexicon.COLORS, *ascii_uppercase[:16]]
    sentences = ["When Mary and John went to the store, John gave a drink to"] * 20
    texts = [" " + word for word in words for _ in range(20)]
    return trained([*texts, *sentences, *TASKS["country-capital"].templates.values(), DOCSTRING], 12_000)


FINANCE = ("increase", "decrease", "grow", "shrink", "profit", "revenue", "rise", "fall", "grows", "shrinks")


@cache
def reader(seed: int = 0) -> cf.Model:
    """A random GPT-2 of two layers with the tokenizer `english`."""
    torch.manual_seed(seed)
    tokenizer = english()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4)
    hf = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return cf.wrap(hf, tokenizer, name="reader", check=False)
