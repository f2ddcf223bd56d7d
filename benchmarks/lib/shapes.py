"""Layer shapes of the models that are measured and predicted, at 224×224 pixels."""

from __future__ import annotations

Layer = tuple[str, int, int, int, int]  # name, M, K, N, G

# Width d and tokens of a ViT's blocks.
VITS = {
    "ViT-Ti/16": (192, 197),
    "ViT-S/16": (384, 197),
    "ViT-B/16": (768, 197),
    "ViT-L/16": (1024, 197),
    "ViT-H/14": (1280, 257),
}
# Of Swin-B's stages.
SWIN_B = ((128, 56**2), (256, 28**2), (512, 14**2), (1024, 7**2))


def vit_layers(width: int, tokens: int, images: int) -> list[Layer]:
    """[(layer, M, K, N, G), ...] of a ViT block."""
    m = images * tokens
    return [
        ("qkv", m, width, 3 * width, 3),
        ("proj", m, width, width, 1),
        ("fc1", m, width, 4 * width, 1),
        ("fc2", m, 4 * width, width, 1),
    ]


def models(images: int) -> dict[str, list[Layer]]:
    """{model: [(layer, M, K, N, G), ...]}, small models first."""
    found = {name: vit_layers(*sizes, images) for name, sizes in VITS.items()}
    found["Swin-B"] = [
        (f"stage {stage} {layer}", m, k, n, g)
        for stage, sizes in enumerate(SWIN_B, 1)
        for layer, m, k, n, g in vit_layers(*sizes, images)
    ]
    return found
