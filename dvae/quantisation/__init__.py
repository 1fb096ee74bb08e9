"""Post-training quantisation: a bundle of fewer bytes, and what that costs (docs/quantisation.md).

codes       weights as int8 and int4 numbers with scales
layers      convolutions and linear layers that hold their weights so, and compute in floating point
integer     those that compute in int8 too, by oneDNN
trace       which layers a network calls, and which of them are better left alone
plan        what is done to which layer; the file in a bundle that says it
calibrate   ranges of activations on sampler trajectories
gate        speed and KID beside the original
quantize    what tools/quantize.py does
"""
