"""The registries, one per kind of component; each kind has a folder here, each component a file in it.

Launchers alone lie elsewhere, in the folder launchers/.
"""

from dvae.registry.classifiers import CLASSIFIERS
from dvae.registry.core import KINDS, ComponentConfig, Registry, Shapes, discover, load_plugins
from dvae.registry.distillers import DISTILLERS
from dvae.registry.encoders import ENCODERS
from dvae.registry.launchers import LAUNCHERS
from dvae.registry.priors import PRIORS
from dvae.registry.processes import PROCESSES
from dvae.registry.refiners import REFINERS
from dvae.registry.samplers import SAMPLERS
from dvae.registry.schedules import SCHEDULES
from dvae.registry.sources import SOURCES

__all__ = [
    "CLASSIFIERS",
    "DISTILLERS",
    "ENCODERS",
    "KINDS",
    "LAUNCHERS",
    "PRIORS",
    "PROCESSES",
    "REFINERS",
    "SAMPLERS",
    "SCHEDULES",
    "SOURCES",
    "ComponentConfig",
    "Registry",
    "Shapes",
    "discover",
    "load_plugins",
]
