"""Pruning and training in turn: feedback, wirings, dense and sparse phases, learning–compression, held-out loss,
tickets."""

from pruning.retraining.compression import LearningCompression
from pruning.retraining.feedback import Feedback, NeuralWirings
from pruning.retraining.generalization import GeneralizationDriven, generalization_loss, pruning_share
from pruning.retraining.phases import DenseSparseDense, HardThresholding
from pruning.retraining.tickets import EarlyBirdPruning, Rewinding, start_afresh
from pruning.retraining.zero_test import ZeroTest, count_below

__all__ = [
    "DenseSparseDense",
    "EarlyBirdPruning",
    "Feedback",
    "GeneralizationDriven",
    "HardThresholding",
    "LearningCompression",
    "NeuralWirings",
    "Rewinding",
    "ZeroTest",
    "count_below",
    "generalization_loss",
    "pruning_share",
    "start_afresh",
]
