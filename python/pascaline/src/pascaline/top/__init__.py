"""`pascaline top`: shows what the GPUs and instances of some hosts do now, from their metrics pages."""
