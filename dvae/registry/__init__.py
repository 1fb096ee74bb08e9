"""The registries: one per kind of component.

Each kind has a folder here, and each component is one file in that folder. Only the launchers lie elsewhere, in the
folder launchers/.

base.py       in each folder: the abstract class of the kind, and its registry
core.py       code that all registries share
discovery.py  import of the components and of plug-ins
plugins.py    import of one plug-in, which is undone if it fails
"""

# this import makes every lookup in a registry find installed plug-ins
from dvae.registry import discovery as discovery
