"""What names the ranks, as a module holds it."""

from __future__ import annotations

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from dilated_ring.comm.protocol import Comm

Group = ProcessGroup | DeviceMesh | Comm | None
"""The ranks: a process group, one dimension of a device mesh, a Comm; None for the default group."""


class HeldGroup:
    """A group: shared by copies of what holds it, and refused by pickle with the reason."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __deepcopy__(self, memo: object) -> HeldGroup:
        return self

    def __getstate__(self) -> dict[str, None]:
        if self.group is not None:
            raise TypeError(
                f"group: expected None, the default group, where a module is pickled, got a "
                f"{type(self.group).__name__}, which lives in this process (save the state dict instead)"
            )
        return {"group": None}

    def __str__(self) -> str:
        return "default" if self.group is None else type(self.group).__name__
