"""What a run would take on machines that are not here: memory, traffic and time, from counts and stated assumptions."""

from training.planning.assumptions import Assumptions, Mesh
from training.planning.counts import ModelCounts, count_model
from training.planning.hardware import HARDWARE, Cluster, Hardware
from training.planning.predict import Prediction, meshes, predict

__all__ = [
    "HARDWARE", "Assumptions", "Cluster", "Hardware", "Mesh", "ModelCounts", "Prediction", "count_model", "meshes",
    "predict",
]  # fmt: skip
