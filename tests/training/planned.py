"""Hand-made counts for the tests of plans."""

from training.planning.counts import Dispatch, ModelCounts

# 700 of the 1000 weights outside experts are of matrices in blocks; experts of two tensors
COUNTS = ModelCounts(
    dim=8, layers=2, dense=1000, root=200, largest=400, copied=700, mixtures=(Dispatch(4, 2, 6000),), flops=100.0,
    tensors=((200, False), (400, False), (4000, True), (2000, True), (400, False)), activations=(50.0, 20.0),
    widened=8.0, boundary=(0.0, 32.0), block=(25.0, 10.0), vocabulary=50,
)  # fmt: skip
