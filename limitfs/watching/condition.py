"""The threshold grammar (interface; being written)."""
