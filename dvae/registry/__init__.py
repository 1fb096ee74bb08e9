"""The registries, one per kind of component; each kind has a folder here, each component a file in it.

Launchers alone lie elsewhere, in the folder launchers/.
"""

from dvae.registry.classifiers.base import CLASSIFIERS
from dvae.registry.core import KINDS, ComponentConfig, Registry, Shapes
from dvae.registry.discovery import discover, load_plugins
from dvae.registry.distillers.base import DISTILLERS
from dvae.registry.encoders.base import ENCODERS
from dvae.registry.launchers.base import LAUNCHERS
from dvae.registry.priors.base import PRIORS
from dvae.registry.processes.base import PROCESSES
from dvae.registry.refiners.base import REFINERS
from dvae.registry.samplers.base import SAMPLERS
from dvae.registry.schedules.base import SCHEDULES
from dvae.registry.sources.base import SOURCES

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
