"""Ways to compute the same attention: reference (oracle), sdpa (dense, by torch); block-sparse folded, flex, triton."""
