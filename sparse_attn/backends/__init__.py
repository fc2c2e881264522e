"""Ways to compute the same attention: reference (oracle), sdpa (dense, by torch), folded, flex and triton (block-sparse)."""
