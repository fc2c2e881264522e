"""Ways to compute the same attention: reference (the oracle), sdpa (dense, by torch), folded (block-sparse)."""
