"""Quantize a bundle and compare it with its original."""
