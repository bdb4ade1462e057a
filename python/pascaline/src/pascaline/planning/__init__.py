"""Memory budget and speed estimate of a model on a card: pure functions, no I/O."""
