"""A third-party package that brings a schedule to dvae; installed by a test."""

from setuptools import setup

setup(
    name="dvae-sample-plugin",
    version="1.2.3",
    packages=["dvae_sample_plugin"],
    entry_points={"dvae.plugins": ["sample = dvae_sample_plugin"]},
)
