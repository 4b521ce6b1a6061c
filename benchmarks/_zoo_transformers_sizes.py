"""Options that configurations of several rows share: a few narrow layers each."""

from __future__ import annotations

from typing import Any

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}
STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 40]}
# stages of attention, the heads of each
PYRAMID: dict[str, Any] = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 24, 32, 48],
    "num_attention_heads": [1, 2, 4, 8],
    "mlp_ratios": [2, 2, 2, 2],
}
