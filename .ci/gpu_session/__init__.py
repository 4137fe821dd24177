"""What `nox -s gpu` is made of: what may run on a card, how it is run, and what is kept of it."""
