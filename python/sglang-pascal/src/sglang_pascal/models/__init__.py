"""SGLang's models that a GGUF file can be, as a package for SGLANG_EXTERNAL_MODEL_PACKAGE.

SGLang imports that package first, and its own two hundred modules only for an architecture that the package lacks.
"""
