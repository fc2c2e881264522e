"""Small models and data that the training tests share."""

import numpy as np

from training.corpora import Corpus
from training.data import Batch, Batches, Data, prepare
from transformer import DenseConfig, MoEConfig, Transformer, TransformerConfig

WORDS = "for while if else return def class import yield with lambda pass".split()


def small_model(*, experts: int = 4, dim: int = 16, layers: int = 2, vocab_size: int = 257, dropout: float = 0.0):
    """Two layers of width 16; experts=0 makes the feed-forward dense."""
    feedforward = MoEConfig(hidden=16, num_experts=experts, k=2) if experts else DenseConfig(hidden=32)
    config = TransformerConfig.uniform(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=layers,
        num_heads=2,
        feedforward=feedforward,
        max_length=64,
        dropout=dropout,
    )
    return Transformer(config)


def small_corpus(*, documents: int = 30, words: int = 60) -> Corpus:
    """Repeatable sentences of Python's own words."""
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, words)) + "\n" for _ in range(documents)]
    return Corpus("words", train=tuple(texts[3:]), held_out=tuple(texts[:3]))


def small_data(*, length: int = 16) -> Data:
    """The corpus above as bytes."""
    return prepare(small_corpus(), length=length, tokenizer="bytes")


def small_batch(*, batch: int = 4, length: int = 16, seed: int = 0) -> Batch:
    """One training batch of it."""
    return Batches(small_data(length=length).train, batch=batch, length=length, seed=seed).next()
