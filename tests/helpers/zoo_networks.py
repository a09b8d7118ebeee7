"""Builds the networks of the zoo from torchvision, timm and transformers, scaled down; each imports its library."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

CLASSES = 4


# torchvision


def resnet(kind: str, layers: list[int], **options: Any) -> nn.Module:
    from torchvision.models import resnet

    return resnet.ResNet(getattr(resnet, kind), layers, num_classes=CLASSES, **options)


def torchvision_model(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None, **options)


def regnet() -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    sizes = BlockParams.from_init_params(depth=10, w_0=16, w_a=10.0, w_m=2.2, group_width=8, se_ratio=0.25)
    return RegNet(sizes, num_classes=CLASSES, stem_width=16)


def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    stages = [CNBlockConfig(16, 24, 2), CNBlockConfig(24, 32, 4), CNBlockConfig(32, None, 2)]
    return ConvNeXt(stages, stochastic_depth_prob=0.1, num_classes=CLASSES)


def vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, num_layers=5, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES)


def swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer(
        [4, 4], 16, depths=[2, 4], num_heads=[2, 4], window_size=[4, 4], stochastic_depth_prob=0.1, num_classes=CLASSES
    )


def maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit((32, 32), 8, 2, [8, 16], [3, 3], 4, stochastic_depth_prob=0.1, num_classes=CLASSES)


def segmentation(kind: str) -> nn.Module:
    from torchvision.models import segmentation
    from torchvision.models._utils import IntermediateLayerGetter

    backbone = resnet("Bottleneck", [1, 2, 4, 2], width_per_group=8, replace_stride_with_dilation=[False, True, True])
    features = IntermediateLayerGetter(backbone, {"layer3": "out"})
    if kind == "fcn":
        return segmentation.FCN(features, segmentation.fcn.FCNHead(1024, CLASSES))
    return segmentation.DeepLabV3(features, segmentation.deeplabv3.DeepLabHead(1024, CLASSES))


def faster_rcnn() -> nn.Module:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    backbone = resnet("Bottleneck", [1, 2, 4, 2], width_per_group=8)
    layers = {f"layer{number}": str(number) for number in (1, 2, 3, 4)}
    features = BackboneWithFPN(backbone, layers, [256, 512, 1024, 2048], 16)
    return FasterRCNN(features, num_classes=CLASSES, min_size=64, max_size=64)


# timm


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)


def timm_in_full(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)


def mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(img_size=32, patch_size=8, num_blocks=5, embed_dim=24, num_classes=CLASSES)


def regnetz() -> nn.Module:
    from timm.models import byobnet

    sizes = byobnet.model_cfgs["regnetz_b16"]
    blocks = tuple(replace(stage, d=min(stage.d, 4)) for stage in sizes.blocks)
    return byobnet.ByobNet(replace(sizes, blocks=blocks, num_features=64), num_classes=CLASSES)


def norm_free(name: str) -> nn.Module:
    from timm.models import nfnet

    sizes = replace(nfnet.model_cfgs[name], depths=(1, 2, 4, 2), channels=(64, 64, 128, 128), stem_chs=32)
    groups = None if sizes.group_size is None else 16
    return nfnet.NormFreeNet(replace(sizes, num_features=64, group_size=groups), num_classes=CLASSES)


def efficientnet_v2() -> nn.Module:
    from timm.models import efficientnet

    return efficientnet._gen_efficientnetv2_s("efficientnetv2_rw_t", 0.25, 0.5, num_classes=CLASSES)


TIMM_VIT = {"img_size": 32, "patch_size": 8, "depth": 5, "embed_dim": 24, "num_heads": 2}


# transformers


def transformer(model: str, config: str, **options: Any) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options))
