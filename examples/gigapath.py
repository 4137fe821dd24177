"""Prov-GigaPath's slide encoder on any machine: tile embeddings of a whole slide in, one embedding of the slide out.

    python examples/gigapath.py                                          10,000 random tiles, random weights
    python examples/gigapath.py --checkpoint slide_encoder.pth --tiles slide.pt
    python examples/gigapath.py --tiles 2000 --layers 2                  a quick look

The architecture of Xu et al., "A whole-slide foundation model for digital pathology from real-world data" (Nature
2024), assembled from dilated_factory.LongNet; weights trained with torchscale give torchscale's embeddings. float32 on
a CPU is enough. Prints time, memory and the embedding's norm, and draws which tiles the slide's token attends to.
Needs `pip install dilated-factory`, and `dilated-factory[bench]` for the picture and the progress bar.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dilated_core import DilatedPattern, attention_map, measure
from dilated_factory.models import LongNet

TILE_DIM = 1536
"""Channels of a tile's embedding, the tile encoder's (a ViT-g)."""

TILE_PIXELS = 256
"""Side of a tile; coordinates are pixels, 256 apart."""

GRID_SIDE = 1000
"""Tiles along each side of the grid of positions the encoder was trained with."""

NORM_EPS = 1e-6
"""Of the last norm; the encoder's own norms have 1e-5."""

POSITION_BASE = 10000.0
"""Of the wavelengths of the sine and cosine positions (Attention Is All You Need, section 3.5)."""


class GigaPathSlideEncoder(nn.Module):
    """gigapath_slide_enc12l768d: a linear map of tile embeddings, 2-D positions, a slide token, a LongNet encoder.

    Args:
        num_layers, embed_dim, num_heads: of the encoder; the published one by default.
        tile_dim: channels of the tile embeddings.
        grid_side: tiles along each side of the grid of positions.
        pattern: segment lengths and dilation rates, DilatedPattern.gigapath() where None.
        semantics: "torchscale" for weights that were trained with it.
        kernel: as in dilated_core.dilated_attention.

    State dict: patch_embed.proj.*, cls_token, encoder.* (see LongNet), norm.*: the published checkpoint's 247 tensors.

    >>> encoder = GigaPathSlideEncoder(num_layers=1, embed_dim=32, num_heads=4, tile_dim=8)
    >>> encoder(torch.randn(1, 50, 8), torch.randint(0, 10, (1, 50, 2)) * 256).shape
    torch.Size([1, 32])
    """

    def __init__(
        self,
        *,
        num_layers: int = 12,
        embed_dim: int = 768,
        num_heads: int = 16,
        tile_dim: int = TILE_DIM,
        grid_side: int = GRID_SIDE,
        pattern: DilatedPattern | None = None,
        semantics: str = "torchscale",
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        self.pattern = DilatedPattern.gigapath() if pattern is None else pattern
        self.semantics = semantics
        self.grid_side = grid_side
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Linear(tile_dim, embed_dim)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.encoder = LongNet(
            embed_dim,
            num_heads,
            num_layers,
            self.pattern.segment_lengths,
            self.pattern.dilation_rates,
            semantics=semantics,
            kernel=kernel,
        )
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight)
        nn.init.normal_(self.cls_token, std=0.02)

    def tokens(self, tile_embeds: Tensor, coords: Tensor) -> Tensor:
        """The encoder's input, (batch, 1 + tiles, embed_dim): the slide token, then the tiles with their positions.

        Args:
            tile_embeds: (batch, tiles, tile_dim).
            coords: (batch, tiles, 2), x and y of each tile's corner in pixels.

        Raises:
            ValueError: shapes that do not fit, or a tile off the grid.
        """
        if tile_embeds.ndim != 3 or coords.shape != (*tile_embeds.shape[:2], 2):
            raise ValueError(
                "expected tile_embeds (batch, tiles, tile_dim) and coords (batch, tiles, 2), "
                f"got {tuple(tile_embeds.shape)} and {tuple(coords.shape)}"
            )
        tiles = self.patch_embed(tile_embeds)
        tiles = tiles + grid_positions(coords, tiles.shape[-1], self.grid_side).to(tiles)
        # The slide token stands outside the grid, where the table of positions is 0.
        return torch.cat((self.cls_token.expand(len(tiles), -1, -1), tiles), dim=1)

    def states(self, tile_embeds: Tensor, coords: Tensor) -> Iterator[Tensor]:
        """The hidden states (batch, 1 + tiles, embed_dim): the tokens, then what each layer makes of them."""
        hidden = self.tokens(tile_embeds, coords)
        yield hidden
        for layer in self.encoder.layers:
            hidden = layer(hidden)
            yield hidden

    def embed(self, hidden: Tensor) -> Tensor:
        """The slide's embedding (batch, embed_dim), from the last of `states`."""
        return self.norm(self.encoder.layer_norm(hidden))[:, 0]

    def forward(self, tile_embeds: Tensor, coords: Tensor) -> Tensor:
        """Tiles (batch, tiles, tile_dim) at coords (batch, tiles, 2) to the slides' embeddings (batch, embed_dim)."""
        return self.norm(self.encoder(self.tokens(tile_embeds, coords)))[:, 0]

    def attention_to_tiles(self, hidden: Tensor) -> Tensor:
        """How the last layer's slide token weighs the tiles, averaged over heads: (batch, tiles), 0 where it sees none.

        Args:
            hidden: the last layer's input, the last but one of `states`.
        """
        layer = self.encoder.layers[-1]
        attention, rows = layer.self_attn, layer.self_attn_layer_norm(hidden)
        query, key = (
            project(rows).unflatten(-1, (attention.num_heads, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj)
        )
        weights = attention_map(
            query,
            key,
            self.pattern.segment_lengths,
            self.pattern.dilation_rates,
            rows=torch.tensor([0]),
            semantics=self.semantics,
        )
        return weights.merged.to_dense()[:, 0, 1 : hidden.shape[1]]


def grid_positions(coords: Tensor, channels: int, grid_side: int = GRID_SIDE) -> Tensor:
    """Sine and cosine of each tile's place on the grid: (..., 2) to (..., channels), float64, half of them an axis.

    The published model looks them up in a table of 1000 x 1000 rows, 2.9 GiB; here they are computed for the tiles
    asked for. The table's row is 1000 * column + row of the tile, and that number is what is encoded.

    >>> grid_positions(torch.tensor([[0, 0], [512, 256]]), 4)[0]
    tensor([0., 1., 0., 1.], dtype=torch.float64)

    Raises:
        ValueError: channels is not a multiple of 4, or a tile lies off the grid.
    """
    if channels % 4:
        raise ValueError(f"channels: expected a multiple of 4 (sine and cosine of two axes), got {channels}")
    column, row = torch.floor(coords.detach().cpu().double() / TILE_PIXELS).unbind(-1)
    number = column * grid_side + row
    if number.numel() and not 0 <= float(number.min()) <= float(number.max()) < grid_side**2:
        raise ValueError(
            f"coords: expected tiles on a grid of {grid_side} x {grid_side} tiles of {TILE_PIXELS} pixels, "
            f"got coordinates from {coords.min().item()} to {coords.max().item()}"
        )
    wavelengths = POSITION_BASE ** (torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))
    angles = [axis[..., None] / wavelengths for axis in (number % grid_side, number // grid_side)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=-1)


def load_slide_encoder(checkpoint: str | Path, **options: object) -> GigaPathSlideEncoder:
    """The encoder with a local slide_encoder.pth in it, in eval mode; every tensor of the file is used, none missing.

    Raises:
        ValueError: the file does not hold the weights under "model".
        RuntimeError: its tensors are not this architecture's, each one named.
    """
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict) or "model" not in saved:
        raise ValueError(f'checkpoint: expected a dict with the weights under "model" in {checkpoint}')
    encoder = GigaPathSlideEncoder(**options)
    encoder.load_state_dict(saved["model"])
    return encoder.eval()


def random_slide(tiles: int) -> tuple[Tensor, Tensor]:
    """Random embeddings (1, tiles, TILE_DIM) and coordinates (1, tiles, 2) of a roundish piece of tissue."""
    side = math.ceil(math.sqrt(2 * tiles))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    x, y = column - side / 2, row - side / 2
    outline = 1.0 + 0.25 * torch.sin(3.0 * torch.atan2(y, x)) + 0.1 * torch.sin(7.0 * torch.atan2(y, x))
    inside = (torch.hypot(x, y) / outline).flatten().argsort()[:tiles].sort().values
    coords = torch.stack((inside % side, inside // side), dim=-1) * TILE_PIXELS
    return torch.randn(1, tiles, TILE_DIM), coords[None]


def load_slide(path: Path) -> tuple[Tensor, Tensor]:
    """Embeddings (1, tiles, dim), float32, and coordinates (1, tiles, 2) of a saved dict; a batch axis is added.

    Raises:
        ValueError: it has no "tile_embeds" (or "features") beside "coords".
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)
    names = [name for name in ("tile_embeds", "features") if name in saved]
    if not names or "coords" not in saved:
        raise ValueError(f'tiles: expected "tile_embeds" (or "features") and "coords" in {path}, got {sorted(saved)}')
    embeds, coords = (torch.as_tensor(saved[name]) for name in (names[0], "coords"))
    return (embeds if embeds.ndim == 3 else embeds[None]).float(), coords if coords.ndim == 3 else coords[None]


def draw_attention(path: Path, coords: Tensor, weights: Tensor) -> None:
    """Weights (tiles,) at coords (tiles, 2), in multiples of an even share, as a PNG; tiles not seen are grey."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    cells = (coords // TILE_PIXELS).long()
    cells = cells - cells.amin(0)
    width, height = (cells.amax(0) + 1).tolist()
    tissue, shares = (torch.full((height, width), math.nan) for _ in range(2))
    column, row = cells.unbind(-1)
    tissue[row, column] = 1.0
    seen = weights > 0
    shares[row[seen], column[seen]] = weights[seen] * len(weights)
    figure = Figure(figsize=(8.0, 7.0), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(tissue.tolist(), cmap="Greys", vmin=0.0, vmax=4.0)
    picture = axes.imshow(shares.tolist(), cmap="viridis", norm=LogNorm(), interpolation="nearest")
    bar = figure.colorbar(picture, ax=axes, label="attention, in multiples of an even share", format="{x:g}")
    bar.ax.yaxis.set_minor_formatter("{x:g}")
    axes.set_title(f"What the slide's token attends to: last layer, {len(weights):,} tiles (grey: not in its pattern)")
    axes.set_axis_off()
    figure.savefig(path, dpi=144)


def watched(states: Iterator[Tensor], layers: int) -> Iterator[Tensor]:
    """`states`, with the progress shown: a bar where rich is installed, a line a layer elsewhere."""
    try:
        from rich.progress import track
    except ImportError:
        started = time.perf_counter()
        for index, hidden in enumerate(states):
            print(f"layer {index:2} of {layers}: {time.perf_counter() - started:6.1f} s", flush=True)
            yield hidden
    else:
        yield from track(states, description="layers", total=layers + 1)


def main() -> None:
    """Encode one slide and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a local slide_encoder.pth; random weights without it")
    parser.add_argument(
        "--tiles", default="10000", help='how many random ones, or a .pt with "tile_embeds" and "coords"'
    )
    parser.add_argument("--layers", type=int, default=12, help="depth, for a quick look at random weights")
    parser.add_argument("--output", type=Path, default=Path("gigapath-attention.png"), help="the attention map")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    if arguments.checkpoint is None:
        encoder = GigaPathSlideEncoder(num_layers=arguments.layers).eval()
    else:
        encoder = load_slide_encoder(arguments.checkpoint, num_layers=arguments.layers)
    embeds, coords = (
        random_slide(int(arguments.tiles)) if arguments.tiles.isdecimal() else load_slide(Path(arguments.tiles))
    )
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    weights = "random weights" if arguments.checkpoint is None else arguments.checkpoint.name
    print(
        f"layers: {arguments.layers}, {parameters / 1e6:.1f} M parameters, {weights}, {torch.get_num_threads()} threads"
    )

    latest: deque[Tensor] = deque(maxlen=2)  # the last layer's input and output
    seconds = 0.0

    def encode() -> None:
        nonlocal seconds
        started = time.perf_counter()
        latest.extend(watched(encoder.states(embeds, coords), arguments.layers))
        seconds = time.perf_counter() - started

    with torch.inference_mode():
        peak = measure.peak_memory(encode)
        before, last = latest
        embedding = encoder.embed(last)
        attention = encoder.attention_to_tiles(before)
    print(
        f"{embeds.shape[1]:,} tiles in {seconds:.1f} s, with at most {peak / 2**20:,.0f} MiB beside weights and tiles; "
        f"the embedding's norm is {embedding.norm().item():.4f}"
    )
    try:
        draw_attention(arguments.output, coords[0], attention[0])
    except ImportError:
        print("no attention map: it needs matplotlib (pip install dilated-factory[bench])")
    else:
        print(f"the slide token saw {int((attention > 0).sum()):,} tiles in its last layer: {arguments.output}")


if __name__ == "__main__":
    main()
