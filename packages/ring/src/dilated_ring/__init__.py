"""Exact attention over sequences that lie on many devices, or larger than one."""
