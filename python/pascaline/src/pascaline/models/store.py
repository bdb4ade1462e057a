"""`resolve` under the name by which programs outside this package import it."""

from pascaline.models.resolve import ResolvedModel, builtin_model, locate, read, read_header

__all__ = ["ResolvedModel", "builtin_model", "locate", "read", "read_header"]
