"""What a run would take on machines that are not here: memory, traffic and time, from counts and stated assumptions."""

from training.planning.counts import ModelCounts, count_model
from training.planning.hardware import HARDWARE, Cluster, Hardware
from training.planning.predict import Mesh, Prediction, meshes, predict

__all__ = ["HARDWARE", "Cluster", "Hardware", "Mesh", "ModelCounts", "Prediction", "count_model", "meshes", "predict"]
