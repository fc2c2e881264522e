"""Hand-made counts for the tests of plans."""

from dataclasses import replace

from training.config import RunConfig
from training.model_config import model_config
from training.planning.counts import Block, Dispatch, ModelCounts
from transformer import Transformer

# 700 of the 1000 weights outside experts are of matrices in blocks; experts of two tensors
BLOCKS = (
    Block(weights=400, kept=(30.0, 2.0), inner=5.0, copied=300, mixture=Dispatch(4, 2, 6000)),
    Block(weights=400, kept=(20.0, 2.0), inner=7.0, copied=400),
)
COUNTS = ModelCounts(
    dim=8, dense=1000, root=200, blocks=BLOCKS, flops=100.0, vocabulary=50,
    tensors=((200, False), (400, False), (4000, True), (2000, True), (400, False)),
)  # fmt: skip
DENSE = replace(COUNTS, blocks=(BLOCKS[1],))


def built_model(config: RunConfig, vocab_size: int) -> Transformer:
    """The model that a plan of ``config`` is of."""
    return Transformer(model_config(config.model, vocab_size=vocab_size, length=config.data.length))
