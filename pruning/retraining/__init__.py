"""Pruning and training in turn: feedback, wirings, dense and sparse phases, learning–compression, held-out loss."""

from pruning.retraining.compression import LearningCompression
from pruning.retraining.feedback import Feedback, NeuralWirings
from pruning.retraining.generalization import GeneralizationDriven, generalization_loss, pruning_share
from pruning.retraining.phases import DenseSparseDense, HardThresholding

__all__ = [
    "DenseSparseDense",
    "Feedback",
    "GeneralizationDriven",
    "HardThresholding",
    "LearningCompression",
    "NeuralWirings",
    "generalization_loss",
    "pruning_share",
]
