"""llama.cpp's llama-server."""

from pascaline.engines.llama_cpp.engine import LlamaCppEngine

ENGINE = LlamaCppEngine()

__all__ = ["ENGINE", "LlamaCppEngine"]
