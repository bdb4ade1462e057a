"""Imports the packages under test before pytest imports tests: the folder pascaline/ would hide the package pascaline."""

import sglang_pascal

import pascaline

__all__ = ["pascaline", "sglang_pascal"]
