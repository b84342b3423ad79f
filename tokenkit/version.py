"""The version, alone in a file so that a build reads it without importing anything."""

__version__ = "0.1.0"
"""The release, as pip knows it."""
