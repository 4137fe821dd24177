"""examples/gigapath.py: the published checkpoint's tensors, its function, and the script as a user runs it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dilated_core import DilatedPattern, reference

SCRIPT = Path(__file__).parents[3] / "examples" / "gigapath.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gigapath_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published_shapes(layers: int = 12, dim: int = 768, ffn: int = 3072, tile: int = 1536) -> dict[str, tuple[int, ...]]:
    """Every tensor of slide_encoder.pth by name: 247 with the published sizes."""

    def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    def norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    shapes = {"cls_token": (1, 1, dim)} | linear("patch_embed.proj", dim, tile) | norm("norm", dim)
    for layer in (f"encoder.layers.{index}" for index in range(layers)):
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{projection}", dim, dim)
        shapes |= norm(f"{layer}.self_attn.inner_attn_ln", dim) | norm(f"{layer}.self_attn_layer_norm", dim)
        shapes |= linear(f"{layer}.ffn.fc1", ffn, dim) | linear(f"{layer}.ffn.fc2", dim, ffn)
        shapes |= norm(f"{layer}.ffn.ffn_layernorm", ffn) | norm(f"{layer}.final_layer_norm", dim)
    return shapes | norm("encoder.layer_norm", dim)


SMALL = {"embed_dim": 32, "num_heads": 4, "tile_dim": 24}


def small_weights(layers: int) -> dict[str, Tensor]:
    """A synthetic checkpoint of small tensors, norms near 1 and the rest near 0."""
    generator = torch.Generator().manual_seed(0)
    shapes = published_shapes(layers, dim=32, ffn=128, tile=24)
    near = {name: float(name.endswith("weight") and len(shape) == 1) for name, shape in shapes.items()}
    return {name: near[name] + 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_state_dict_is_the_published_one(example: ModuleType) -> None:
    with torch.device("meta"):
        encoder = example.GigaPathSlideEncoder()
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert shapes == published_shapes()
    assert len(shapes) == 247


def test_every_tensor_of_a_checkpoint_is_used_and_none_is_missing(example: ModuleType, tmp_path: Path) -> None:
    weights, path = small_weights(12), tmp_path / "slide_encoder.pth"
    assert len(weights) == 247
    torch.save({"model": weights}, path)
    encoder = example.load_slide_encoder(path, **SMALL)
    assert not encoder.training
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, weights.pop(name)), name
    assert not weights
    torch.save({"model": small_weights(12) | {"pos_embed": torch.zeros(1)}}, path)
    with pytest.raises(RuntimeError, match="pos_embed"):
        example.load_slide_encoder(path, **SMALL)
    torch.save({"model": {name: tensor for name, tensor in small_weights(12).items() if name != "cls_token"}}, path)
    with pytest.raises(RuntimeError, match="cls_token"):
        example.load_slide_encoder(path, **SMALL)
    torch.save(small_weights(1), path)
    with pytest.raises(ValueError, match='under "model"'):
        example.load_slide_encoder(path, **SMALL)


def table_of_positions(side: int, channels: int) -> Tensor:
    """The published table, (side * side, channels): row number n is at column n // side and row n % side."""
    table = torch.zeros(side * side, channels, dtype=torch.float64)
    quarter = channels // 4
    for number in range(side * side):
        for half, place in enumerate((number % side, number // side)):
            for index in range(quarter):
                angle = torch.tensor(place / 10000 ** (index / quarter), dtype=torch.float64)
                table[number, half * 2 * quarter + index] = angle.sin()
                table[number, half * 2 * quarter + quarter + index] = angle.cos()
    return table


def plain_embedding(weights: dict[str, Tensor], tiles: Tensor, coords: Tensor, layers: int, heads: int) -> Tensor:
    """The published forward pass, written from its description, in float64, with the oracle's attention."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    pattern = DilatedPattern.gigapath()
    x = linear("patch_embed.proj", tiles.double())
    cell = coords // 256
    x = x + table_of_positions(30, x.shape[-1])[cell[..., 0] * 30 + cell[..., 1]]
    x = torch.cat((w["cls_token"].expand(len(x), -1, -1), x), 1)
    for layer in (f"encoder.layers.{index}" for index in range(layers)):
        rows = norm(f"{layer}.self_attn_layer_norm", x)
        q, k, v = (linear(f"{layer}.self_attn.{name}_proj", rows).unflatten(-1, (heads, -1)) for name in "qkv")
        attended, _ = reference.dilated_attention(
            q, k, v, pattern.segment_lengths, pattern.dilation_rates, semantics="torchscale"
        )
        x = x + linear(f"{layer}.self_attn.out_proj", norm(f"{layer}.self_attn.inner_attn_ln", attended.flatten(-2)))
        inner = F.gelu(linear(f"{layer}.ffn.fc1", norm(f"{layer}.final_layer_norm", x)))
        x = x + linear(f"{layer}.ffn.fc2", norm(f"{layer}.ffn.ffn_layernorm", inner))
    return norm("norm", norm("encoder.layer_norm", x), 1e-6)[:, 0]


def small_slide(batch: int, tiles: int) -> tuple[Tensor, Tensor]:
    cells = torch.stack([torch.randperm(900)[:tiles] for _ in range(batch)])
    return torch.randn(batch, tiles, 24), torch.stack((cells // 30, cells % 30), -1) * 256 + 17


def test_the_embedding_is_the_published_formulas(example: ModuleType) -> None:
    torch.manual_seed(0)
    weights, slide = small_weights(3), small_slide(2, 61)
    encoder = example.GigaPathSlideEncoder(num_layers=3, grid_side=30, **SMALL)
    encoder.load_state_dict(weights)
    with torch.no_grad():
        found = encoder(*slide)
        *_, last = encoder.states(*slide)
        assert torch.equal(encoder.embed(last), found)
    expected = plain_embedding(weights, *slide, layers=3, heads=4)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_attention_to_tiles_is_what_the_patterns_of_the_slide_token_reach(example: ModuleType) -> None:
    encoder = example.GigaPathSlideEncoder(num_layers=1, pattern=DilatedPattern([8, 64], [1, 4]), **SMALL).eval()
    embeds, coords = small_slide(1, 40)
    weights = encoder.attention_to_tiles(encoder.tokens(embeds, coords))
    assert weights.shape == (1, 40)
    # Places 1 to 7 share its segment; places 4, 8, 12, ... its dilated one. Tile i is at place i + 1.
    seen = {place - 1 for place in range(1, 41) if place < 8 or place % 4 == 0}
    assert set(weights[0].nonzero().flatten().tolist()) == seen


def test_tiles_that_do_not_fit_are_refused(example: ModuleType) -> None:
    encoder = example.GigaPathSlideEncoder(num_layers=1, **SMALL)
    embeds, coords = small_slide(1, 5)
    with pytest.raises(ValueError, match=r"got \(1, 5, 24\) and \(1, 4, 2\)"):
        encoder(embeds, coords[:, :4])
    with pytest.raises(ValueError, match="1000 x 1000 tiles of 256 pixels"):
        encoder(embeds, coords - 100_000)
    with pytest.raises(ValueError, match="channels"):
        example.grid_positions(coords, 6)


def test_a_saved_slide_is_read_in_either_form(example: ModuleType, tmp_path: Path) -> None:
    embeds, coords = small_slide(1, 5)
    for saved in ({"tile_embeds": embeds[0].half(), "coords": coords[0]}, {"features": embeds, "coords": coords}):
        torch.save(saved, tmp_path / "slide.pt")
        read, places = example.load_slide(tmp_path / "slide.pt")
        assert (read.shape, read.dtype, places.shape) == ((1, 5, 24), torch.float32, (1, 5, 2))
    torch.save({"embeds": embeds}, tmp_path / "slide.pt")
    with pytest.raises(ValueError, match=r"got \['embeds'\]"):
        example.load_slide(tmp_path / "slide.pt")


@pytest.mark.slow
def test_the_script_runs_as_users_run_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "attention.png"
    command = [sys.executable, str(SCRIPT), "--tiles", "300", "--layers", "1", "--output", str(picture)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "300 tiles in" in ran.stdout
    assert "the embedding's norm is" in ran.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
