"""Small models, data and trainers that the training tests share."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.config import OptimConfig, TrainConfig
from training.corpora import Corpus
from training.data import Batch, Batches, Data, prepare
from training.trainer import Trainer
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


def small_trainer(out: Path, *, train: dict[str, Any] | None = None, **options: Any) -> Trainer:
    """A trainer of the small model, with dropout so that the generators matter; everything seeded."""
    settings = {"steps": 20, "batch": 4, "dtype": "float32", "eval_every": 10, "save_every": 5, "device": "cpu"}
    torch.manual_seed(0)
    return Trainer(
        options.pop("model", None) or small_model(dropout=0.1),
        options.pop("data", None) or small_data(),
        out=out,
        length=16,
        optim=OptimConfig(lr=0.01, warmup=3),
        train=TrainConfig(**(settings | (train or {}))),
        seed=0,
        **options,
    )
