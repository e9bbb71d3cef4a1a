"""Grouped GEMM: rows sorted by group times one weight matrix per group, weights in any format."""
