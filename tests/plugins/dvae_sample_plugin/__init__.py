"""A third-party package that brings a schedule and a stage to dvae; importing it registers both."""

from dvae_sample_plugin import probe as probe
from dvae_sample_plugin import sigmoid as sigmoid
