"""Bridges to other libraries' models, one module a library; none of those libraries is imported before it is asked for.

- ``interop.transformers``: dilated and block-sparse attention for the models of Hugging Face's transformers.
"""
