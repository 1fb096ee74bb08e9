"""Quantize a bundle and compare it with its original. The quantized layers are in dvae/models/quantization/."""
