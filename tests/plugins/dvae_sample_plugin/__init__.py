"""A third-party package that brings a schedule and a stage to dvae; importing it registers both."""

from dvae_sample_plugin import probe, sigmoid
