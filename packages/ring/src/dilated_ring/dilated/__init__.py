"""Dilated attention over shards: each rank gets only the rows that it attends."""
