"""Where in its arenas a pool puts a request: bookkeeping over integers, of any kind of memory."""
