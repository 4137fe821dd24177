"""examples/gigapath.py, and convert, against Prov-GigaPath's own slide encoder with the same weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peers import TORCHSCALE_NEEDS, deviation, imported, only
from torch import Tensor, nn

from dilated_core.interop.torchscale import TorchscaleDilatedAttention, convert

EXAMPLE = Path(__file__).parents[2] / "examples" / "gigapath.py"
GRID_SIDE = 60  # the published 1000 makes a table of 2.9 GiB
TILES = 1500  # past the first segment of 1024, so that zero rows are attended
TOLERANCE = 1e-5
Within = Callable[[str, float, float], None]


@pytest.fixture(scope="module")
def published(gigapath_checkout: Path) -> Iterator[nn.Module]:
    """The architecture gigapath_slide_enc12l768d, random weights everywhere, biases and norms included."""
    # `gigapath/` itself too: its vendored torchscale is imported by that name, and another may be installed.
    with only(gigapath_checkout / "gigapath", gigapath_checkout, stand_ins=TORCHSCALE_NEEDS):
        # The segment lengths are written as text and evaluated; numpy 2 writes them as np.int64(1024).
        imported("torchscale.architecture.config").np = imported("numpy")
        encoder = imported("gigapath.slide_encoder").gigapath_slide_enc12l768d(slide_ngrids=GRID_SIDE)
        imported("torchscale.component.dilated_attention")
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        yield encoder.eval()


@pytest.fixture(scope="module")
def slide() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    cells = torch.randperm(GRID_SIDE**2, generator=generator)[:TILES].sort().values
    coords = torch.stack((cells // GRID_SIDE, cells % GRID_SIDE), -1) * 256
    return torch.randn(1, TILES, 1536, generator=generator), coords[None]


@pytest.fixture(scope="module")
def expected(published: nn.Module, slide: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The published encoder's: what `forward` gives, then every layer's."""
    with torch.no_grad():
        return [*published(*slide), *published(*slide, all_layer_embed=True)]


def test_the_example_gives_the_published_embeddings(
    published: nn.Module, slide: tuple[Tensor, Tensor], expected: list[Tensor], tmp_path: Path, within: Within
) -> None:
    spec = importlib.util.spec_from_file_location("gigapath_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.save({"model": published.state_dict()}, tmp_path / "slide_encoder.pth")
    encoder = example.load_slide_encoder(tmp_path / "slide_encoder.pth", grid_side=GRID_SIDE)
    assert len(published.state_dict()) == len(encoder.state_dict()) == 247
    with torch.no_grad():
        found = encoder(*slide)
        layers = [encoder.norm(hidden)[:, 0] for hidden in encoder.states(*slide)]
    within("Prov-GigaPath, examples/gigapath.py, embedding, float32", deviation(found, expected[0]), TOLERANCE)
    for layer, theirs in zip(layers, expected[1:], strict=True):
        within("Prov-GigaPath, examples/gigapath.py, every layer, float32", deviation(layer, theirs), TOLERANCE)


def test_the_published_encoder_converts(
    published: nn.Module, slide: tuple[Tensor, Tensor], expected: list[Tensor], within: Within
) -> None:
    assert convert(published) is published
    assert sum(isinstance(module, TorchscaleDilatedAttention) for module in published.modules()) == 12
    assert len(published.state_dict()) == 247
    with torch.no_grad():
        within("Prov-GigaPath, converted, embedding, float32", deviation(published(*slide)[0], expected[0]), TOLERANCE)
