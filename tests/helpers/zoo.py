"""Scaled-down versions of common networks, each with a batch and a loss.

Each is small (few blocks, narrow, small inputs), but has at least three blocks in a row somewhere; if a library has
the network in full size too, ``full`` builds it, on the meta device for example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from tests.helpers import hand_written
from tests.helpers.zoo_networks import (
    CLASSES,
    TIMM_VIT,
    convnext,
    efficientnet_v2,
    faster_rcnn,
    maxvit,
    mixer,
    norm_free,
    regnet,
    regnetz,
    resnet,
    segmentation,
    swin,
    timm_in_full,
    timm_model,
    torchvision_model,
    transformer,
    vit,
)

Batch = dict[str, Any]
"""``inputs``: arguments by position; ``named``: by name; ``labels``: of a classifier."""


@dataclass(frozen=True)
class Network:
    """A network of the zoo.

    Args:
        small: builds it, scaled down.
        batch: draws an example batch.
        full: builds it in full size; None if there is no such network.
        loss: of the network and a batch; None for :func:`_usual_loss`.
        rate: learning rate; small for networks in which a rounding error would grow to the size of the weights.
    """

    small: Callable[[], nn.Module]
    batch: Callable[[Generator], Batch]
    full: Callable[[], nn.Module] | None = None
    loss: Callable[[nn.Module, Batch], Tensor] | None = None
    rate: float = 0.01


def build(name: str, seed: int = 7) -> nn.Module:
    """The small network of this name, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[name].small()
    _enlarge_what_hides_branches(network)
    return network


@torch.no_grad()
def _enlarge_what_hides_branches(network: nn.Module) -> None:
    """Enlarge weights near zero: many libraries begin with a layer scale of 1e-6, which would hide a branch's scale."""
    for name, parameter in network.named_parameters():
        if not name.endswith("bias") and bool(parameter.abs().max() < 1e-4):
            parameter.fill_(0.5)


def batch_of(name: str, worker: int, step: int) -> Batch:
    """The batch that a worker sees at a step."""
    return NETWORKS[name].batch(Generator().manual_seed(1000 * worker + step))


def loss_of(name: str, network: nn.Module, batch: Batch) -> Tensor:
    """The loss of a network of this name for a batch."""
    return (NETWORKS[name].loss or _usual_loss)(network, batch)


def _usual_loss(network: nn.Module, batch: Batch) -> Tensor:
    """The network's own loss if it returns one, else the cross entropy of its output, averaged over positions."""
    output = network(*batch["inputs"], **batch["named"])
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    if isinstance(output, dict):
        fields = ("out", "logits", "last_hidden_state", "pooler_output")
        output = next(output[field] for field in fields if output.get(field) is not None)
    labels = batch["labels"]
    if output.dim() == 3:  # tokens
        output = output.mean(1)
    elif output.dim() > 3:  # positions of an image
        output = output.flatten(2).mean(2)
    return functional.cross_entropy(output, labels)


def _images(generator: Generator, size: int = 32, batch: int = 6, frames: int = 0) -> Batch:
    shape = (batch, 3, frames, size, size) if frames else (batch, 3, size, size)
    labels = torch.arange(batch) % CLASSES
    brightness = labels.reshape(-1, *[1] * (len(shape) - 1)) / 2
    return {"inputs": [torch.randn(shape, generator=generator) + brightness], "named": {}, "labels": labels}


def _ids(generator: Generator, *names: str, batch: int = 4, length: int = 9, vocabulary: int = 32) -> Batch:
    """Token ids: by position, or under the names given."""
    ids = torch.randint(3, vocabulary, (batch, length), generator=generator)
    labels = ids[:, 0] % CLASSES
    named = dict.fromkeys(names, ids)
    return {"inputs": [] if names else [ids], "named": named, "labels": labels}


def _tables(generator: Generator) -> Batch:
    rows = torch.randn(12, 12, generator=generator)
    return {"inputs": [rows], "named": {}, "labels": rows[:, :CLASSES].argmax(1)}


def _graph(generator: Generator) -> Batch:
    batch = _tables(generator)
    edges = torch.randint(0, 12, (2, 30), generator=generator)
    return {**batch, "inputs": [*batch["inputs"], edges]}


def _detection_loss(network: nn.Module, batch: Batch) -> Tensor:
    """The detector's own losses in training; in evaluation, where it returns boxes, a number from its features."""
    images = list(batch["inputs"][0])
    if not network.training:
        return torch.stack(
            [features.square().mean() for features in network.backbone(batch["inputs"][0]).values()]
        ).sum()
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    targets = [{"boxes": boxes, "labels": label[None].clamp(min=1)} for label in batch["labels"]]
    return torch.stack(list(network(images, targets).values())).sum()


def _transformers(model: str, config: str, batch: Callable[[Generator], Batch], **options: Any) -> Network:
    return Network(partial(transformer, model, config, **options), batch, partial(transformer, model, config))


def _speech(generator: Generator) -> Batch:
    batch = _ids(generator, "labels", length=7)
    batch["named"]["input_features"] = torch.randn(4, 8, 40, generator=generator)
    return batch


_IDS: dict[str, Any] = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 32}
_DECODER = {**_IDS, **_ENCODER, "num_key_value_heads": 2}


def _language(generator: Generator) -> Batch:
    return _ids(generator, "input_ids", "labels")


NETWORKS: dict[str, Network] = {
    "torchvision resnet18": Network(
        partial(resnet, "BasicBlock", [2, 2, 2, 2]), _images, partial(torchvision_model, "resnet18")
    ),
    "torchvision resnet50": Network(
        partial(resnet, "Bottleneck", [2, 2, 4, 2], width_per_group=8),
        _images,
        partial(torchvision_model, "resnet50"),
    ),
    "torchvision resnet101": Network(
        partial(resnet, "Bottleneck", [1, 1, 6, 1], width_per_group=8),
        _images,
        partial(torchvision_model, "resnet101"),
    ),
    "torchvision resnext50_32x4d": Network(
        partial(resnet, "Bottleneck", [2, 2, 4, 2], groups=4, width_per_group=4),
        _images,
        partial(torchvision_model, "resnext50_32x4d"),
    ),
    "torchvision wide_resnet50_2": Network(
        partial(resnet, "Bottleneck", [2, 2, 4, 2], width_per_group=16),
        _images,
        partial(torchvision_model, "wide_resnet50_2"),
    ),
    "torchvision regnet_y": Network(regnet, _images, partial(torchvision_model, "regnet_y_1_6gf")),
    "torchvision efficientnet_b0": Network(
        partial(torchvision_model, "efficientnet_b0", num_classes=CLASSES),
        partial(_images, size=64),
        partial(torchvision_model, "efficientnet_b0"),
        rate=1e-4,
    ),
    "torchvision mobilenet_v3": Network(
        partial(torchvision_model, "mobilenet_v3_small", num_classes=CLASSES),
        partial(_images, size=64),
        partial(torchvision_model, "mobilenet_v3_large"),
    ),
    "torchvision convnext": Network(convnext, _images, partial(torchvision_model, "convnext_tiny")),
    "torchvision vit": Network(vit, _images, partial(torchvision_model, "vit_b_16")),
    "torchvision swin": Network(swin, _images, partial(torchvision_model, "swin_t")),
    "torchvision maxvit": Network(maxvit, _images, partial(torchvision_model, "maxvit_t")),
    "torchvision r3d_18": Network(
        partial(torchvision_model, "r3d_18", num_classes=CLASSES),
        partial(_images, size=16, frames=4, batch=4),
        partial(torchvision_model, "r3d_18"),
    ),
    "torchvision fcn_resnet50": Network(
        partial(segmentation, "fcn"),
        _images,
        partial(torchvision_model, "fcn_resnet50", weights_backbone=None),
    ),
    "torchvision deeplabv3_resnet50": Network(
        partial(segmentation, "deeplab"),
        _images,
        partial(torchvision_model, "deeplabv3_resnet50", weights_backbone=None),
    ),
    "torchvision fasterrcnn_resnet50_fpn": Network(
        faster_rcnn,
        partial(_images, size=64, batch=2),
        partial(torchvision_model, "fasterrcnn_resnet50_fpn", weights_backbone=None),
        _detection_loss,
    ),
    "timm resnet26d": Network(
        partial(timm_model, "resnet26d", base_width=8), _images, partial(timm_in_full, "resnet26d")
    ),
    "timm seresnet50": Network(
        partial(timm_model, "seresnet50", base_width=8, layers=(1, 2, 4, 2)),
        _images,
        partial(timm_in_full, "seresnet50"),
    ),
    "timm resnetv2_50": Network(
        partial(timm_model, "resnetv2_50", layers=(1, 2, 4, 2), channels=(32, 32, 64, 64)),
        _images,
        partial(timm_in_full, "resnetv2_50"),
    ),
    "timm nf_resnet50": Network(partial(norm_free, "nf_resnet50"), _images, partial(timm_in_full, "nf_resnet50")),
    "timm dm_nfnet_f0": Network(
        partial(norm_free, "dm_nfnet_f0"),
        partial(_images, size=64),
        partial(timm_in_full, "dm_nfnet_f0"),
    ),
    "timm vit": Network(
        partial(timm_model, "vit_tiny_patch16_224", drop_path_rate=0.1, **TIMM_VIT),
        _images,
        partial(timm_in_full, "vit_tiny_patch16_224"),
    ),
    "timm deit": Network(
        partial(timm_model, "deit_tiny_distilled_patch16_224", **TIMM_VIT),
        _images,
        partial(timm_in_full, "deit_tiny_distilled_patch16_224"),
    ),
    "timm eva02": Network(
        partial(timm_model, "eva02_tiny_patch14_224", **TIMM_VIT),
        _images,
        partial(timm_in_full, "eva02_tiny_patch14_224"),
    ),
    "timm swin": Network(
        partial(
            timm_model,
            "swin_tiny_patch4_window7_224",
            img_size=32,
            depths=(2, 4),
            embed_dim=16,
            num_heads=(2, 4),
            window_size=4,
        ),
        _images,
        partial(timm_in_full, "swin_tiny_patch4_window7_224"),
    ),
    "timm convnext": Network(
        partial(timm_model, "convnext_atto", depths=(1, 2, 4, 1), dims=(8, 16, 24, 24)),
        partial(_images, size=64),
        partial(timm_in_full, "convnext_tiny"),
    ),
    "timm convnextv2": Network(
        partial(timm_model, "convnextv2_atto", depths=(1, 2, 4, 1), dims=(8, 16, 24, 24)),
        partial(_images, size=64),
        partial(timm_in_full, "convnextv2_atto"),
    ),
    "timm regnetz": Network(regnetz, partial(_images, size=64), partial(timm_in_full, "regnetz_b16")),
    "timm efficientnetv2": Network(
        efficientnet_v2,
        partial(_images, size=64),
        partial(timm_in_full, "efficientnetv2_rw_t"),
        rate=1e-4,
    ),
    "timm mixer": Network(
        mixer,
        _images,
        partial(timm_in_full, "mixer_s16_224"),
    ),
    "timm edgenext": Network(
        partial(timm_model, "edgenext_xx_small"),
        partial(_images, size=64),
        partial(timm_in_full, "edgenext_xx_small"),
    ),
    "timm mobilenetv4": Network(
        partial(timm_model, "mobilenetv4_conv_small_035"),
        partial(_images, size=64),
        partial(timm_in_full, "mobilenetv4_conv_small"),
    ),
    "transformers BERT": _transformers(
        "BertForSequenceClassification",
        "BertConfig",
        _ids,
        num_labels=CLASSES,
        initializer_range=0.2,
        **_IDS,
        **_ENCODER,
    ),
    "transformers GPT-2 (tied)": _transformers(
        "GPT2LMHeadModel", "GPT2Config", _language, n_embd=16, n_layer=5, n_head=2, **_IDS
    ),
    "transformers Llama": _transformers("LlamaForCausalLM", "LlamaConfig", _language, **_DECODER),
    "transformers Qwen2": _transformers("Qwen2ForCausalLM", "Qwen2Config", _language, **_DECODER),
    "transformers ViT": _transformers(
        *("ViTForImageClassification", "ViTConfig", _images),
        image_size=32,
        patch_size=8,
        num_labels=CLASSES,
        **_ENCODER,
    ),
    "transformers ConvNeXt": _transformers(
        *("ConvNextForImageClassification", "ConvNextConfig", partial(_images, size=64)),
        hidden_sizes=[8, 16, 24, 24],
        depths=[1, 2, 4, 1],
        num_labels=CLASSES,
    ),
    "transformers ResNet": _transformers(
        *("ResNetForImageClassification", "ResNetConfig", partial(_images, size=64)),
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 64],
        depths=[1, 2, 4, 2],
        num_labels=CLASSES,
    ),
    "transformers T5": _transformers(
        *("T5ForConditionalGeneration", "T5Config", _language),
        **{**_IDS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 5, "num_heads": 2, "decoder_start_token_id": 0},
    ),
    "transformers Whisper": _transformers(
        *("WhisperForConditionalGeneration", "WhisperConfig", _speech),
        **{**_IDS, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20},
        **{f"{part}_layers": 5 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
        decoder_start_token_id=1,
    ),
    "transformers Mamba": _transformers(
        "MambaForCausalLM", "MambaConfig", _language, hidden_size=16, num_hidden_layers=5, state_size=4, **_IDS
    ),
    "transformers Mixtral": _transformers(
        "MixtralForCausalLM", "MixtralConfig", _language, num_local_experts=3, **_DECODER
    ),
    "by hand: pre-norm encoder": Network(partial(hand_written.Encoder, norm_first=True), _ids),
    "by hand: post-norm encoder": Network(partial(hand_written.Encoder, norm_first=False), _ids),
    "by hand: keywords and tuples": Network(hand_written.Keywords, _ids),
    "by hand: WideResNet": Network(hand_written.WideResNet, _images),
    "by hand: U-Net": Network(hand_written.UNet, partial(_images, size=16)),
    "by hand: residual MLP": Network(hand_written.residual_mlp, _tables),
    "by hand: GNN": Network(hand_written.GraphNetwork, _graph),
    "by hand: DiT with adaLN": Network(hand_written.DiT, _images),
    "by hand: wrappers in pairs, one rotary embedding": Network(hand_written.Wrappers, _ids),
}

SAMPLE = (
    "by hand: pre-norm encoder",
    "by hand: post-norm encoder",
    "by hand: keywords and tuples",
    "timm vit",
    "torchvision convnext",
)
"""Cheap networks for the ordinary suite, none from transformers."""
