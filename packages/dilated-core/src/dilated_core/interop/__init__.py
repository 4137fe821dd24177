"""Bridges to other libraries' models, one module a library; none of those libraries is imported.

- ``interop.torchscale``: microsoft/torchscale's DilatedAttention, which Prov-GigaPath ships unchanged.
"""

from dilated_core.interop import torchscale

__all__ = ["torchscale"]
