"""The version of peftk, read by the build and by ``peftk.__version__``."""

__version__ = "0.1.0"
