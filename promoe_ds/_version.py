"""The one place of the version; imports nothing, so that every part may read it."""

__version__ = "0.1.0"
