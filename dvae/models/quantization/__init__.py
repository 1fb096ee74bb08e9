"""Quantized layers, and which layers of a bundle use them. dvae/evaluation/quantization/ makes and measures bundles."""
