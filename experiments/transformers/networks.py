"""The two transformers: a small GPT-2 for bytes, and timm's ViT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from experiments.harness.settings import ConfigError


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.input = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, context, width) to the same."""
        parts = self.input(x).unflatten(-1, (3, self.heads, -1))  # (batch, context, 3, heads, width / heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """A pre-norm block: attention, then two linear layers, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, context, width) to the same."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class LanguageModel(nn.Module):
    """GPT-2 in small: learned positions, pre-norm blocks, a last norm, a head that is the embedding.

    Args:
        vocabulary: number of tokens.
        context: longest sequence.
        width: entries of a token's vector; a multiple of ``heads``.
        depth: blocks.
        heads: of each attention.
    """

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as GPT-2, whose 0.02 is for width 768; additions to the residual stream shrink with the depth."""
        usual = 0.02 * (768 / self.token.embedding_dim) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            added = name.endswith(("output.weight", "mlp.2.weight"))
            nn.init.normal_(parameter, std=usual / (2 * len(self.blocks)) ** 0.5 if added else usual)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, context) to logits (batch, context, vocabulary)."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def vit(pixels: int, channels: int, **size: Any) -> nn.Module:
    """timm's ViT with patches of 4 x 4 pixels and ten classes; ``size``: width, depth, heads."""
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise ConfigError("the study of images needs timm: pip install timm, or choose the other studies") from error
    net: nn.Module = VisionTransformer(
        img_size=pixels, patch_size=4, in_chans=channels, num_classes=10,
        embed_dim=size["width"], depth=size["depth"], num_heads=size["heads"],
    )  # fmt: skip
    return net
