"""One file for each library that memory of a pool is shown to."""
