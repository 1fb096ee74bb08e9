"""The version and the folder of the dvae package."""

from pathlib import Path

VERSION = "0.2.0"
FOLDER = Path(__file__).resolve().parents[1]
"""The folder dvae/. It also contains the links launchers, recipes and tools."""
