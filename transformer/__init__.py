"""The model that the parts of this library build."""

from transformer.attention import Attention
from transformer.block import Block
from transformer.config import TransformerConfig
from transformer.feedforward import FeedForward
from transformer.feedforward_config import (
    DenseConfig,
    FeedForwardConfig,
    MoEConfig,
    PEERConfig,
    ProductKeyConfig,
    SoftMoEConfig,
    ThresholdedConfig,
)
from transformer.generate import generate, stream
from transformer.hf import from_hugging_face, to_hugging_face
from transformer.layer_config import AttentionConfig, DepthConfig, LayerConfig
from transformer.loss import chunked_cross_entropy
from transformer.model import ModelCache, ModelOutput, Transformer
from transformer.predictors import own_foresight, train_own_predictors
from transformer.rope import RopeScaling
from transformer.selection_config import (
    DSAConfig,
    KMeansConfig,
    LSHConfig,
    MoBAConfig,
    NSAConfig,
    SelectionConfig,
    SinkhornConfig,
    TopKKeysConfig,
)
from transformer.thresholds import with_thresholds
from transformer.upcycle import upcycle

__all__ = [
    "Attention",
    "AttentionConfig",
    "Block",
    "DSAConfig",
    "DenseConfig",
    "DepthConfig",
    "FeedForward",
    "FeedForwardConfig",
    "KMeansConfig",
    "LSHConfig",
    "LayerConfig",
    "MoBAConfig",
    "MoEConfig",
    "ModelCache",
    "ModelOutput",
    "NSAConfig",
    "PEERConfig",
    "ProductKeyConfig",
    "RopeScaling",
    "SelectionConfig",
    "SinkhornConfig",
    "SoftMoEConfig",
    "ThresholdedConfig",
    "TopKKeysConfig",
    "Transformer",
    "TransformerConfig",
    "chunked_cross_entropy",
    "from_hugging_face",
    "generate",
    "own_foresight",
    "stream",
    "to_hugging_face",
    "train_own_predictors",
    "upcycle",
    "with_thresholds",
]
