"""Mixture-of-experts layers: routing, and the fused expert layer over weights in any format."""
