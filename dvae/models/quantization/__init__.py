"""Quantized layers, and the plan that says which layers of a bundle are quantized.

dvae/evaluation/quantization/ creates and evaluates quantized bundles.
"""
