"""What a cache must know of values: their memory, their changes, their copies. PyTorch is known here only."""
