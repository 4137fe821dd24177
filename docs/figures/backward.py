"""The exact backward: what flows where, tile by tile, and how far gradients are off when a tile is handed less."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import style
import torch
from torch import Tensor

from dilated_core import Partial, attend, merge
from dilated_core.kernels import Problem, tile_backward

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS, HEAD_DIM = 6, 8
TILES = (slice(0, 5), slice(5, 9))  # keys of each tile
GRADIENTS = ("dq", "dk", "dv")
EXACT = 1e-14  # what float64 rounding stays below; the bar is drawn to here, since rounding differs between machines


class Run(NamedTuple):
    """A forward, tile by tile, and every way to go back.

    Attributes:
        partials, merged: of the forward.
        row_sums: D of row 0: of each tile's own out, and at last of the merged one.
        errors: of each way, largest difference from the joint softmax's gradient over its largest entry, of dq, dk, dv.
    """

    partials: list[Partial]
    merged: Partial
    row_sums: list[float]
    errors: dict[str, list[float]]


def run() -> Run:
    """Differentiate in float64, by tile and jointly."""
    query, grad_out = style.numbers(2, 1, ROWS, 1, HEAD_DIM, seed=1).unbind()
    key, value = style.numbers(2, 1, TILES[-1].stop, 1, HEAD_DIM, seed=2).unbind()
    partials = [attend(query, key[:, tile], value[:, tile]) for tile in TILES]
    merged = merge(*partials)

    def by_tile(handed: list[Partial], cotangents: list[Tensor]) -> list[Tensor]:
        """Each tile's backward with an out, an lse and a gradient of out; dq summed, dk and dv put together."""
        parts = []
        for tile, (out, lse), cotangent in zip(TILES, handed, cotangents, strict=True):
            problem = Problem(*_rows_last(query, key[:, tile], value[:, tile]), False, HEAD_DIM**-0.5)
            parts.append(tile_backward("auto", problem, *_rows_last(cotangent), None, *_rows_last(out), lse))
        dq, dk, dv = zip(*parts, strict=True)
        return [sum(dq[1:], dq[0]), torch.cat(dk, 2), torch.cat(dv, 2)]

    shares = [torch.exp(partial.lse - merged.lse).transpose(1, 2).unsqueeze(-1) for partial in partials]
    joint = _joint(query, key, value, grad_out)
    ways = {
        "merged out and lse": by_tile([merged] * 2, [grad_out] * 2),
        "own out and lse, mixing weights held constant": by_tile(partials, [share * grad_out for share in shares]),
        "own out and lse": by_tile(partials, [grad_out] * 2),
    }
    errors = {
        way: [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, joint, strict=True)]
        for way, found in ways.items()
    }
    sums = [float((grad_out * out).sum(-1)[0, 0, 0]) for out, _ in (*partials, merged)]
    return Run(partials, merged, sums, errors)


def _rows_last(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _joint(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor) -> list[Tensor]:
    """The gradients of one softmax over all keys, by autograd through plain products."""
    leaves = [tensor.clone().requires_grad_() for tensor in _rows_last(query, key, value)]
    weights = torch.softmax(leaves[0] @ leaves[1].transpose(-1, -2) * HEAD_DIM**-0.5, -1)
    return list(torch.autograd.grad(weights @ leaves[2], leaves, grad_out.transpose(1, 2)))


def draw() -> Figure:
    """The flow above, the errors below."""
    found = run()
    figure = style.card(6.08)
    own = [partial.lse[0, 0, 0].item() for partial in found.partials]
    lse = found.merged.lse[0, 0, 0].item()
    style.say(figure, 0.3, 0.2, "forward", size=style.TITLE, bold=True)
    for at, colour in enumerate(style.SERIES[:2]):
        top, sign = 0.5 + 0.75 * at, "₁₂"[at]
        keys = TILES[at].stop - TILES[at].start
        style.box(figure, 0.3, top, 1.75, 0.55, f"attend q, k{sign}, v{sign}\n{ROWS} rows, {keys} keys", colour=colour)
        style.arrow(figure, (2.1, top + 0.28), (2.55, top + 0.28), colour=colour)
        style.box(figure, 2.6, top, 1.5, 0.55, f"out{sign}, lse{sign}\nlse of row 0: {own[at]:.3f}", colour=colour)
        style.arrow(figure, (4.15, top + 0.28), (4.65, 1.05 + 0.3 * at), colour=colour)
    style.box(figure, 4.7, 0.72, 2.3, 0.85, f"merge\nout, lse\nlse of row 0: {lse:.3f}", colour=style.INK)

    style.say(figure, 0.3, 2.05, "backward", size=style.TITLE, bold=True)
    text = f"dout, and the merged out, lse\nD = rowsum(dout ∘ out)\nD of row 0: {found.row_sums[-1]:.3f}"
    style.arrow(figure, (5.85, 1.62), (5.85, 2.52), colour=style.INK)
    style.box(figure, 4.7, 2.57, 2.3, 0.85, text, colour=style.INK)
    for at, colour in enumerate(style.SERIES[:2]):
        top, sign = 2.35 + 0.75 * at, "₁₂"[at]
        style.arrow(figure, (4.65, 2.85 + 0.3 * at), (4.15, top + 0.28), colour=style.INK)
        text = f"backward of tile {at + 1}\nP = exp(S{sign} − lse)"
        style.box(figure, 2.6, top, 1.5, 0.55, text, colour=colour)
        style.arrow(figure, (2.55, top + 0.28), (2.1, top + 0.28), colour=colour)
        style.box(figure, 0.3, top, 1.75, 0.55, f"dk{sign}, dv{sign}, and\nits part of dq, added up", colour=colour)

    style.say(figure, 0.3, 3.92, "what a tile's backward is handed, and its error", size=style.TITLE, bold=True)
    canvas = style.axes(figure, 2.6, 4.2, 4.4, 1.35)
    colours = (style.GREEN, style.PURPLE, style.RED)
    for number, (errors, colour) in enumerate(zip(found.errors.values(), colours, strict=True)):
        for at, error in enumerate(errors):
            place = number + 0.26 * (at - 1)
            drawn = max(error, EXACT)
            canvas.barh(place, drawn, 0.22, color=colour)
            label = f"{GRADIENTS[at]}  {error:.2f}" if error > EXACT else f"{GRADIENTS[at]}  below {EXACT:.0e}"
            offset = {"textcoords": "offset points", "va": "center", "fontsize": 6.5, "color": style.INK}
            canvas.annotate(label, (drawn, place), (3, -0.5), **offset)
        text = list(found.errors)[number].replace(", mixing", ",\nmixing")
        style.say(figure, 0.3, 4.36 + 0.45 * number - 0.08 * text.count("\n"), text)
    canvas.set_xscale("log")
    canvas.set_xlim(1e-16, 300)
    canvas.set_ylim(2.5, -0.5)
    canvas.set_yticks([])
    canvas.set_xticks([1e-16, 1e-12, 1e-8, 1e-4, 1])
    canvas.minorticks_off()
    note = "largest difference from the gradient of one softmax over all keys, in parts of its largest entry; float64"
    style.say(figure, 7.0, 5.79, note, size=style.SMALL, colour=style.FAINT, at="right")
    return figure
