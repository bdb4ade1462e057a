"""`pascaline top`: what GPUs and instances of some hosts do now, read from their metrics pages."""
