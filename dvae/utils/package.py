"""The package itself: its version and its folder."""

from pathlib import Path

VERSION = "0.2.0"
FOLDER = Path(__file__).resolve().parents[1]
"""The folder dvae/, with the links launchers, recipes and tools."""
