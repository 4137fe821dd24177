"""What the factory knows about the machine: ``Hardware``, and the readers below it that need no torch.

``host`` reads processor, memory and NUMA nodes, ``nvidia`` the driver, ``flash`` the flash attention packages.
Nothing is probed until it is asked for.
"""

from dilated_factory.hardware.device import Hardware

__all__ = ["Hardware"]
