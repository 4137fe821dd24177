"""What stands between a pool and the memory it draws from: ``MemoryPool(LimitingAdaptor(HostBackend(), "2GiB"))``.

An adaptor is a backend made of another one, its upstream, and adaptors can be stacked. What is asked of an adaptor
are whole arenas, which are few: it may take its time.
"""

from dilated_memory_pool.adaptors.adaptor import Adaptor
from dilated_memory_pool.adaptors.failure import FailureCallbackAdaptor
from dilated_memory_pool.adaptors.faults import FaultInjectionAdaptor, InjectedFault
from dilated_memory_pool.adaptors.limiting import LimitingAdaptor
from dilated_memory_pool.adaptors.shared import SharedBackend

__all__ = [
    "Adaptor",
    "FailureCallbackAdaptor",
    "FaultInjectionAdaptor",
    "InjectedFault",
    "LimitingAdaptor",
    "SharedBackend",
]
