"""Dense attention on one device over keys and values that lie in host memory or in a file."""
