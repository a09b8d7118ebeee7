"""Networks that people train, cut down: what a user passes to a strategy, with a batch and a loss.

Each is small (few blocks, narrow, small inputs), but has at least three blocks in a row somewhere; where a library has
the network in full size too, ``full`` builds it, on the meta device for example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from tests.helpers import hand_written

CLASSES = 4
Batch = dict[str, Any]
"""``inputs``: arguments by position; ``named``: by name; ``labels``: of a classifier."""


@dataclass(frozen=True)
class Network:
    """A network of the zoo.

    Args:
        small: builds it, cut down.
        batch: draws an example batch.
        full: builds it in full size; None where there is no such thing.
        loss: from the network and a batch; None for :func:`_usual_loss`.
        rate: learning rate. Small for networks of which a rounding error in the weights grows to their size otherwise.
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
    """Many libraries let a branch begin as nearly zero, by a layer scale of 1e-6: its scale would then not be seen."""
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
    """The network's own loss if it returns one, else the cross entropy of what it returns, averaged over places."""
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
    elif output.dim() > 3:  # places of an image
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


# torchvision


def _resnet(kind: str, layers: list[int], **options: Any) -> nn.Module:
    from torchvision.models import resnet

    return resnet.ResNet(getattr(resnet, kind), layers, num_classes=CLASSES, **options)


def _torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None, **options)


def _regnet() -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    sizes = BlockParams.from_init_params(depth=10, w_0=16, w_a=10.0, w_m=2.2, group_width=8, se_ratio=0.25)
    return RegNet(sizes, num_classes=CLASSES, stem_width=16)


def _convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    stages = [CNBlockConfig(16, 24, 2), CNBlockConfig(24, 32, 4), CNBlockConfig(32, None, 2)]
    return ConvNeXt(stages, stochastic_depth_prob=0.1, num_classes=CLASSES)


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, num_layers=5, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES)


def _swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer(
        [4, 4], 16, depths=[2, 4], num_heads=[2, 4], window_size=[4, 4], stochastic_depth_prob=0.1, num_classes=CLASSES
    )


def _maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit((32, 32), 8, 2, [8, 16], [3, 3], 4, stochastic_depth_prob=0.1, num_classes=CLASSES)


def _segmentation(kind: str) -> nn.Module:
    from torchvision.models import segmentation
    from torchvision.models._utils import IntermediateLayerGetter

    backbone = _resnet("Bottleneck", [1, 2, 4, 2], width_per_group=8, replace_stride_with_dilation=[False, True, True])
    features = IntermediateLayerGetter(backbone, {"layer3": "out"})
    if kind == "fcn":
        return segmentation.FCN(features, segmentation.fcn.FCNHead(1024, CLASSES))
    return segmentation.DeepLabV3(features, segmentation.deeplabv3.DeepLabHead(1024, CLASSES))


def _faster_rcnn() -> nn.Module:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    backbone = _resnet("Bottleneck", [1, 2, 4, 2], width_per_group=8)
    layers = {f"layer{number}": str(number) for number in (1, 2, 3, 4)}
    features = BackboneWithFPN(backbone, layers, [256, 512, 1024, 2048], 16)
    return FasterRCNN(features, num_classes=CLASSES, min_size=64, max_size=64)


def _detection_loss(network: nn.Module, batch: Batch) -> Tensor:
    """In training the detector's own losses; in evaluation, where it returns boxes, a number from its features."""
    images = list(batch["inputs"][0])
    if not network.training:
        return torch.stack(
            [features.square().mean() for features in network.backbone(batch["inputs"][0]).values()]
        ).sum()
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    targets = [{"boxes": boxes, "labels": label[None].clamp(min=1)} for label in batch["labels"]]
    return torch.stack(list(network(images, targets).values())).sum()


# timm


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)


def _timm_in_full(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)


def _mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(img_size=32, patch_size=8, num_blocks=5, embed_dim=24, num_classes=CLASSES)


def _regnetz() -> nn.Module:
    from timm.models import byobnet

    sizes = byobnet.model_cfgs["regnetz_b16"]
    blocks = tuple(replace(stage, d=min(stage.d, 4)) for stage in sizes.blocks)
    return byobnet.ByobNet(replace(sizes, blocks=blocks, num_features=64), num_classes=CLASSES)


def _norm_free(name: str) -> nn.Module:
    from timm.models import nfnet

    sizes = replace(nfnet.model_cfgs[name], depths=(1, 2, 4, 2), channels=(64, 64, 128, 128), stem_chs=32)
    groups = None if sizes.group_size is None else 16
    return nfnet.NormFreeNet(replace(sizes, num_features=64, group_size=groups), num_classes=CLASSES)


def _efficientnet_v2() -> nn.Module:
    from timm.models import efficientnet

    return efficientnet._gen_efficientnetv2_s("efficientnetv2_rw_t", 0.25, 0.5, num_classes=CLASSES)


_TIMM_VIT = {"img_size": 32, "patch_size": 8, "depth": 5, "embed_dim": 24, "num_heads": 2}


# transformers


def _transformer(model: str, config: str, **options: Any) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options))


def _transformers(model: str, config: str, batch: Callable[[Generator], Batch], **options: Any) -> Network:
    return Network(partial(_transformer, model, config, **options), batch, partial(_transformer, model, config))


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
        partial(_resnet, "BasicBlock", [2, 2, 2, 2]), _images, partial(_torchvision, "resnet18")
    ),
    "torchvision resnet50": Network(
        partial(_resnet, "Bottleneck", [2, 2, 4, 2], width_per_group=8), _images, partial(_torchvision, "resnet50")
    ),
    "torchvision resnet101": Network(
        partial(_resnet, "Bottleneck", [1, 1, 6, 1], width_per_group=8), _images, partial(_torchvision, "resnet101")
    ),
    "torchvision resnext50_32x4d": Network(
        partial(_resnet, "Bottleneck", [2, 2, 4, 2], groups=4, width_per_group=4),
        _images,
        partial(_torchvision, "resnext50_32x4d"),
    ),
    "torchvision wide_resnet50_2": Network(
        partial(_resnet, "Bottleneck", [2, 2, 4, 2], width_per_group=16),
        _images,
        partial(_torchvision, "wide_resnet50_2"),
    ),
    "torchvision regnet_y": Network(_regnet, _images, partial(_torchvision, "regnet_y_1_6gf")),
    "torchvision efficientnet_b0": Network(
        partial(_torchvision, "efficientnet_b0", num_classes=CLASSES),
        partial(_images, size=64),
        partial(_torchvision, "efficientnet_b0"),
        rate=1e-4,
    ),
    "torchvision mobilenet_v3": Network(
        partial(_torchvision, "mobilenet_v3_small", num_classes=CLASSES),
        partial(_images, size=64),
        partial(_torchvision, "mobilenet_v3_large"),
    ),
    "torchvision convnext": Network(_convnext, _images, partial(_torchvision, "convnext_tiny")),
    "torchvision vit": Network(_vit, _images, partial(_torchvision, "vit_b_16")),
    "torchvision swin": Network(_swin, _images, partial(_torchvision, "swin_t")),
    "torchvision maxvit": Network(_maxvit, _images, partial(_torchvision, "maxvit_t")),
    "torchvision r3d_18": Network(
        partial(_torchvision, "r3d_18", num_classes=CLASSES),
        partial(_images, size=16, frames=4, batch=4),
        partial(_torchvision, "r3d_18"),
    ),
    "torchvision fcn_resnet50": Network(
        partial(_segmentation, "fcn"), _images, partial(_torchvision, "fcn_resnet50", weights_backbone=None)
    ),
    "torchvision deeplabv3_resnet50": Network(
        partial(_segmentation, "deeplab"), _images, partial(_torchvision, "deeplabv3_resnet50", weights_backbone=None)
    ),
    "torchvision fasterrcnn_resnet50_fpn": Network(
        _faster_rcnn,
        partial(_images, size=64, batch=2),
        partial(_torchvision, "fasterrcnn_resnet50_fpn", weights_backbone=None),
        _detection_loss,
    ),
    "timm resnet26d": Network(partial(_timm, "resnet26d", base_width=8), _images, partial(_timm_in_full, "resnet26d")),
    "timm seresnet50": Network(
        partial(_timm, "seresnet50", base_width=8, layers=(1, 2, 4, 2)), _images, partial(_timm_in_full, "seresnet50")
    ),
    "timm resnetv2_50": Network(
        partial(_timm, "resnetv2_50", layers=(1, 2, 4, 2), channels=(32, 32, 64, 64)),
        _images,
        partial(_timm_in_full, "resnetv2_50"),
    ),
    "timm nf_resnet50": Network(partial(_norm_free, "nf_resnet50"), _images, partial(_timm_in_full, "nf_resnet50")),
    "timm dm_nfnet_f0": Network(
        partial(_norm_free, "dm_nfnet_f0"), partial(_images, size=64), partial(_timm_in_full, "dm_nfnet_f0")
    ),
    "timm vit": Network(
        partial(_timm, "vit_tiny_patch16_224", drop_path_rate=0.1, **_TIMM_VIT),
        _images,
        partial(_timm_in_full, "vit_tiny_patch16_224"),
    ),
    "timm deit": Network(
        partial(_timm, "deit_tiny_distilled_patch16_224", **_TIMM_VIT),
        _images,
        partial(_timm_in_full, "deit_tiny_distilled_patch16_224"),
    ),
    "timm eva02": Network(
        partial(_timm, "eva02_tiny_patch14_224", **_TIMM_VIT),
        _images,
        partial(_timm_in_full, "eva02_tiny_patch14_224"),
    ),
    "timm swin": Network(
        partial(
            _timm,
            "swin_tiny_patch4_window7_224",
            img_size=32,
            depths=(2, 4),
            embed_dim=16,
            num_heads=(2, 4),
            window_size=4,
        ),
        _images,
        partial(_timm_in_full, "swin_tiny_patch4_window7_224"),
    ),
    "timm convnext": Network(
        partial(_timm, "convnext_atto", depths=(1, 2, 4, 1), dims=(8, 16, 24, 24)),
        partial(_images, size=64),
        partial(_timm_in_full, "convnext_tiny"),
    ),
    "timm convnextv2": Network(
        partial(_timm, "convnextv2_atto", depths=(1, 2, 4, 1), dims=(8, 16, 24, 24)),
        partial(_images, size=64),
        partial(_timm_in_full, "convnextv2_atto"),
    ),
    "timm regnetz": Network(_regnetz, partial(_images, size=64), partial(_timm_in_full, "regnetz_b16")),
    "timm efficientnetv2": Network(
        _efficientnet_v2,
        partial(_images, size=64),
        partial(_timm_in_full, "efficientnetv2_rw_t"),
        rate=1e-4,
    ),
    "timm mixer": Network(
        _mixer,
        _images,
        partial(_timm_in_full, "mixer_s16_224"),
    ),
    "timm edgenext": Network(
        partial(_timm, "edgenext_xx_small"), partial(_images, size=64), partial(_timm_in_full, "edgenext_xx_small")
    ),
    "timm mobilenetv4": Network(
        partial(_timm, "mobilenetv4_conv_small_035"),
        partial(_images, size=64),
        partial(_timm_in_full, "mobilenetv4_conv_small"),
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
}

SAMPLE = (
    "by hand: pre-norm encoder",
    "by hand: post-norm encoder",
    "by hand: keywords and tuples",
    "timm vit",
    "torchvision convnext",
    "torchvision mobilenet_v3",
)
"""Cheap ones, without transformers, that the ordinary suite trains."""
