"""Gated delta net decode and draft verification; the public names live in `cutemoe`."""
