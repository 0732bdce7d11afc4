"""The `shapes` world: its vocabulary and the classical detector that reads it."""
