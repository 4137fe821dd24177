"""Dense attention over shards: every key passes every rank."""
