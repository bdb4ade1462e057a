"""Imports the package before pytest imports its tests, which would take the folder pascaline/ for it."""

import pascaline

__all__ = ["pascaline"]
