"""The embedded model's tokenizer: byte-level BPE in GPT-2's manner, the behaviours' words as single tokens.

Every word of the corpus gets merged to one token (BPE without a frequency limit), any other text falls back
to bytes, so all of UTF-8 round-trips. Digit merges are put before all others and in this order: century
with its space first, then the hundred endings; so " 1732" is " 17" + "32".
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from typing import Any

import corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from circuitfind.tasks import lexicon
from circuitfind.tasks.builder import SingleTokens

END = "<|endoftext|>"
_SPACE = "Ġ"
_DIGITS = "0123456789"


class AnyWords(SingleTokens):
    """Before there is a tokenizer, every word counts as one token and every year as splitting well."""

    def __init__(self) -> None:
        super().__init__(None)

    def keep(self, words: Iterable[str]) -> list[str]:
        return list(words)

    def pieces(self, text: str) -> tuple[str, ...]:
        return (text[:-2], text[-2:])


def _texts() -> list[str]:
    words: Any = AnyWords()
    endless = [corpus.behaviour_samples(name, words, 0) for name in corpus.BEHAVIOURS]
    endless += [corpus.list_samples(0), corpus.filler_samples(0)]
    texts = [sample.text for samples in endless for sample in itertools.islice(samples, 5000)]
    nouns = itertools.chain.from_iterable(lexicon.NOUNS)
    names = lexicon.FEMALE_NAMES + lexicon.MALE_NAMES + corpus.UNSEEN_IN_IOI
    plain = names + lexicon.PLACES + lexicon.OBJECTS + lexicon.ADJECTIVES + lexicon.PEOPLE + lexicon.EVENTS
    texts += [f" {word}" for word in itertools.chain(plain, nouns, ("she", "he", "is", "are", "was", "were"))]
    return [re.sub(r"\d+", "", text) for text in texts]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train the merges on the corpus (deterministic) and wrap them as a Hugging Face tokenizer."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(_texts(), trainer)
    word_merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    centuries = [(_SPACE, "1"), *((_SPACE + "1", digit) for digit in _DIGITS)]
    merges = centuries + list(itertools.product(_DIGITS, _DIGITS)) + word_merges

    vocabulary = {piece: i for i, piece in enumerate(itertools.chain(alphabet, (a + b for a, b in merges)))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
