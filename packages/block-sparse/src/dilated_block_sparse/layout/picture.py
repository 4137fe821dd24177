"""Pictures of layouts: one panel a head, tokens along both axes, rows downwards. Only ``draw`` imports matplotlib.

Imports torch and this room; matplotlib comes with the extra "plot".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dilated_block_sparse.layout import algebra, checks

if TYPE_CHECKING:
    from dilated_block_sparse.layout.block_layout import BlockLayout

MOST_PANELS = 16
MOST_CELLS = 512  # a side of a panel: about the pixels that it has
INCHES = 4.0  # a side of a panel
FAINTEST = 0.4  # the shade of a cell with one live block among hundreds: a single column of blocks has to show


def draw(layout: BlockLayout, path: str | Path | None = None, *, heads: Sequence[int] | None = None) -> Any:
    """Draw the live blocks, one panel a head, of the first ``MOST_PANELS`` heads asked for.

    Where a side has more than ``MOST_CELLS`` blocks, neighbours share a cell, the darker the more of them live. No
    table of blocks is built: the cells are counted from the indices.

    Args:
        path: where to save it, PNG or what else matplotlib knows from the suffix; None saves nothing.
        heads: which heads; None is all.

    Returns:
        matplotlib's Figure. pyplot is not touched, so that nothing has to be closed.

    Raises:
        ImportError: no matplotlib.
        ValueError: a head that the layout does not have, or none.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('draw needs matplotlib: pip install "dilated-block-sparse[plot]"') from error

    asked = range(layout.heads) if heads is None else heads
    chosen = [checks.index(f"heads[{place}]", head, layout.heads) for place, head in enumerate(asked)]
    if not chosen:
        raise ValueError("heads: expected at least one head, got none")
    shown = chosen[:MOST_PANELS]
    across = math.ceil(math.sqrt(len(shown)))
    down = math.ceil(len(shown) / across)
    figure = Figure(figsize=(INCHES * across + 1.0, INCHES * down + 1.0), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel, head in zip(panels, shown, strict=False):
        _panel(panel, layout, head)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    rows, columns = layout.block_size
    title = f"{layout.q_len} x {layout.kv_len} tokens\nblocks of {rows} x {columns}, density {layout.density:.3g}"
    if len(shown) < len(chosen):
        title += f"\n{len(chosen) - len(shown)} more heads are not shown"
    figure.suptitle(title, fontsize="medium")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _panel(panel: Any, layout: BlockLayout, head: int) -> None:
    one = algebra.select_heads(layout, [head])
    shares, rows, columns = cells(one)
    # The cells reach past the end where the last is short; the limits of the axes cut them there.
    extent = (0, shares.shape[1] * columns, shares.shape[0] * rows, 0)
    wide = max(layout.q_len, layout.kv_len) > 4 * min(layout.q_len, layout.kv_len)
    if shares.numel():
        picture = torch.where(shares > 0, FAINTEST + (1.0 - FAINTEST) * shares, 0.0).tolist()
        panel.imshow(picture, cmap="Blues", vmin=0.0, vmax=1.0, extent=extent, aspect="auto" if wide else "equal")
    panel.set_xlim(0, max(layout.kv_len, 1))
    panel.set_ylim(max(layout.q_len, 1), 0)
    panel.set_xlabel("key token")
    panel.set_ylabel("query token")
    whose = "every head" if layout.heads == 1 else f"head {head}"
    panel.set_title(f"{whose}: density {one.density:.3g}", fontsize="small")
    for spine in panel.spines.values():  # under the cells and pale: it must neither hide nor pass for a first column
        spine.set(linewidth=0.5, color="0.8", zorder=-1)


def cells(layout: BlockLayout) -> tuple[Tensor, int, int]:
    """What a panel shows of a layout of one head.

    Returns:
        The share of live blocks in every cell, float32 (down, across), at most ``MOST_CELLS`` a side, and the tokens
        that a cell is high and wide.
    """
    high, wide = (max(1, -(-blocks // MOST_CELLS)) for blocks in (layout.q_blocks, layout.kv_blocks))
    down, across = -(-layout.q_blocks // high), -(-layout.kv_blocks // wide)
    cell = algebra.rows_of(layout) // high * across + layout.indices // wide
    live = torch.bincount(cell, minlength=down * across).view(down, across)
    in_row = (layout.q_blocks - torch.arange(down, device="cpu") * high).clamp(max=high)
    in_column = (layout.kv_blocks - torch.arange(across, device="cpu") * wide).clamp(max=wide)
    return live / (in_row.unsqueeze(1) * in_column), high * layout.block_size[0], wide * layout.block_size[1]
