"""How each part of a Host is learned from a machine; each module stands what is missing, broken or slow."""
