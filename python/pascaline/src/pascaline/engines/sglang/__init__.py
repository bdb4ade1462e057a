"""SGLang with the plugin sglang-pascal."""

from pascaline.engines.sglang.engine import SglangEngine

ENGINE = SglangEngine()

__all__ = ["ENGINE", "SglangEngine"]
