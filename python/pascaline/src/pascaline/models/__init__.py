"""Models on disk: what they are (headers only), where they are kept, whether they are complete."""
