"""What the toy studies of several tests train: one dense layer of width 16 on bytes; `corpus` is filled in."""

DENSE_BASE = """[base.data]
corpus = "{corpus}"
tokenizer = "bytes"
length = 16
held_out = 0.2
cache = "{corpus}/../cache"
[base.model]
dim = 16
layers = 1
heads = 2
hidden = 16
feedforward = "dense"
[base.train]
steps = 8
batch = 2
dtype = "float32"
device = "cpu"
eval_every = 1000
save_every = 40
"""
