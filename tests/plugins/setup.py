"""A third-party package that brings a schedule, a stage and a recipe to dvae; installed by a test."""

from setuptools import setup

setup(
    name="dvae-sample-plugin",
    version="1.2.3",
    packages=["dvae_sample_plugin"],
    package_data={"dvae_sample_plugin": ["recipes/**/*.yaml"]},
    entry_points={"dvae.plugins": ["sample = dvae_sample_plugin"]},
)
