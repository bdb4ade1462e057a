"""Collects each part of a Host from a machine. Every module copes with missing, broken and slow sources."""
