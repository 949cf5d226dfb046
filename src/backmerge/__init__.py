"""Fine-tune without losing safety: merge the tuned weights back with the base's, measure, choose λ."""

from importlib.metadata import version

__version__ = version("backmerge")
