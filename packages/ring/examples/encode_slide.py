"""Prov-GigaPath's slide encoder over many processes: the tiles of one slide shared out, one embedding of the slide.

    python encode_slide.py                                                     one process, random tiles and weights
    torchrun --standalone --nproc-per-node 4 encode_slide.py --tiles 100000    4 processes, a quarter of the tiles each
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 encode_slide.py
                                                                               on each of 2 machines: 8 processes

    ... --checkpoint slide_encoder.pth --tiles slide.pt    the published weights, and a slide of one's own
    ... --compare                                          encode it in one process too (rank 0), and compare
    ... --device cuda                                      a GPU for each process (not yet measured on a GPU)

The model is that of examples/gigapath.py in this repository, which says what the files hold; here each process has all
weights and a stretch of the tiles. Attention is torchscale's, to the rounding, as the published weights need it: the
zero rows that torchscale pads segments with are attended here too, though no process holds them.
Needs `pip install dilated-ring dilated-factory numpy`.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from dilated_factory.models import LongNet
from dilated_ring.plan import even_bounds

sys.path.append(str(Path(__file__).resolve().parents[3] / "examples"))
from gigapath import GigaPathSlideEncoder, load_slide, random_slide

TOLERANCE = 1e-4
"""Largest difference from one process's embedding, relative to its largest channel (float32)."""


def make_encoder(arguments: argparse.Namespace, tile_dim: int, **options: Any) -> GigaPathSlideEncoder:
    """The encoder, the same on every rank; ``options`` are of its attention."""
    torch.manual_seed(0)
    encoder = GigaPathSlideEncoder(
        num_layers=arguments.layers, embed_dim=arguments.embed_dim, num_heads=arguments.heads, tile_dim=tile_dim
    )
    if options:
        weights = encoder.encoder.state_dict()
        pattern = encoder.pattern
        encoder.encoder = LongNet(
            arguments.embed_dim,
            arguments.heads,
            arguments.layers,
            pattern.segment_lengths,
            pattern.dilation_rates,
            semantics=encoder.semantics,
            **options,
        )
        encoder.encoder.load_state_dict(weights)
    if arguments.checkpoint is not None:
        encoder.load_state_dict(torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)["model"])
    return encoder.eval().to(arguments.device)


def encode_shard(encoder: GigaPathSlideEncoder, embeds: Tensor, coords: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """Hidden states (1, local tokens, embed_dim) of this rank's tokens; the first of all is the slide's."""
    start, stop = list(pairwise(bounds))[distributed.get_rank()]
    # Token 0 is the slide's, token i + 1 tile i.
    tiles = slice(max(start - 1, 0), max(stop - 1, 0))
    tokens = encoder.tokens(embeds[:, tiles], coords[:, tiles])
    return encoder.encoder(tokens if start == 0 < stop else tokens[:, 1:])


def main() -> None:
    """Encode one slide and print its embedding's norm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a local slide_encoder.pth; random weights without it")
    parser.add_argument(
        "--tiles", default="10000", help='how many random ones, or a .pt with "tile_embeds" and "coords"'
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--embed-dim", type=int, default=768)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compare", action="store_true", help="encode in one process too, and compare")
    parser.add_argument("--output", type=Path, help="where to save the embedding, (1, embed_dim)")
    arguments = parser.parse_args()

    if arguments.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    alone = {} if "RANK" in os.environ else {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
    distributed.init_process_group("cpu:gloo,cuda:nccl" if arguments.device == "cuda" else "gloo", **alone)
    torch.manual_seed(1)
    embeds, coords = (
        each.to(arguments.device)
        for each in (
            random_slide(int(arguments.tiles)) if arguments.tiles.isdecimal() else load_slide(Path(arguments.tiles))
        )
    )
    bounds = even_bounds(1 + embeds.shape[1], distributed.get_world_size())
    encoder = make_encoder(arguments, embeds.shape[-1], attention_type="ring", bounds=bounds)
    with torch.inference_mode():
        hidden = encode_shard(encoder, embeds, coords, bounds)
        if distributed.get_rank() == 0:
            embedding = encoder.norm(hidden)[:, 0]
            print(f"{embeds.shape[1]:,} tiles over {distributed.get_world_size()} processes: {hidden.shape[1]:,} here")
            print(f"the embedding's norm is {embedding.norm().item():.6f}")
            if arguments.output is not None:
                torch.save(embedding.cpu(), arguments.output)
            if arguments.compare:
                expected = make_encoder(arguments, embeds.shape[-1])(embeds, coords)
                difference = ((embedding - expected).abs().max() / expected.abs().max()).item()
                print(f"from one process's it differs by {difference:.1e} of the largest channel")
                if not difference <= TOLERANCE:
                    raise SystemExit("they differ")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
