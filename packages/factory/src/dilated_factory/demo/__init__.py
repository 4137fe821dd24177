"""``dilated demo``: a LongNet trained on this machine's own Python sources, and its attention weighed against dense.

Needs the ``bench`` extra (rich, matplotlib); nothing outside this folder does.
"""
