"""The registries, one per kind of component; each kind has a folder here, each component a file in it.

Launchers alone lie elsewhere, in the folder launchers/. `base.py` of a kind's folder has its abstract class and its
registry, core.py what all registries share, discovery.py the import of components and plug-ins.
"""

from dvae.registry import discovery as discovery  # so that every lookup in a registry knows of installed plug-ins
