"""Quantized layers and which layers of a bundle use them."""
