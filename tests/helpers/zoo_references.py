"""The outputs of the zoo's blocks with each residual branch multiplied by s, written by hand for each family.

They use a block's own submodules, and nothing of this package: the ends of its branches were read from each library's
source. The zoo compares a block whose scale has been folded into its weights with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import functional

Reference: TypeAlias = Callable[..., Tensor]
"""A function of an unscaled block, s, and the block's arguments; dropout and stochastic depth are off."""


# Convolutional networks


def _torchvision_basic(b: Any, s: float, x: Tensor) -> Tensor:
    return functional.relu(x + s * b.bn2(b.conv2(functional.relu(b.bn1(b.conv1(x))))))


def _torchvision_bottleneck(b: Any, s: float, x: Tensor) -> Tensor:
    y = functional.relu(b.bn1(b.conv1(x)))
    y = functional.relu(b.bn2(b.conv2(y)))
    return functional.relu(x + s * b.bn3(b.conv3(y)))


def _video_basic(b: Any, s: float, x: Tensor) -> Tensor:
    return functional.relu(x + s * b.conv2(b.conv1(x)))


def _regnet(b: Any, s: float, x: Tensor) -> Tensor:
    return functional.relu(x + s * b.f.c(b.f.se(b.f.b(b.f.a(x)))))


def _inverted(b: Any, s: float, x: Tensor) -> Tensor:
    return x + s * b.block(x)


def _torchvision_convnext(b: Any, s: float, x: Tensor) -> Tensor:
    return x + s * b.layer_scale * b.block(x)


def _timm_bottleneck(b: Any, s: float, x: Tensor) -> Tensor:
    y = b.act1(b.bn1(b.conv1(x)))
    y = b.aa(b.act2(b.bn2(b.conv2(y))))
    y = b.bn3(b.conv3(y))
    return b.act3(x + s * (y if b.se is None else b.se(y)))


def _timm_pre_activation(b: Any, s: float, x: Tensor) -> Tensor:
    y = b.conv2(b.norm2(b.conv1(b.norm1(x))))
    return x + s * b.conv3(b.norm3(y))


def _timm_norm_free(b: Any, s: float, x: Tensor) -> Tensor:
    y = b.conv2(b.act2(b.conv1(b.act1(x) * b.beta)))
    if b.conv2b is not None:
        y = b.conv2b(b.act2b(y))
    if b.attn is not None:
        y = b.attn_gain * b.attn(y)
    y = b.conv3(b.act3(y))
    if b.attn_last is not None:
        y = b.attn_gain * b.attn_last(y)
    if b.skipinit_gain is not None:
        y = y * b.skipinit_gain
    return x + s * b.alpha * y


def _timm_convnext(b: Any, s: float, x: Tensor) -> Tensor:
    if getattr(b, "use_conv_mlp", False):
        y = b.mlp(b.norm(b.conv_dw(x)))
    else:
        y = b.mlp(b.norm(b.conv_dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    return x + s * (y if b.gamma is None else y * b.gamma[:, None, None])


def _timm_byobnet_bottleneck(b: Any, s: float, x: Tensor) -> Tensor:
    y = b.attn(b.conv2b_kxk(b.conv2_kxk(b.conv1_1x1(x))))
    return b.act(x + s * b.attn_last(b.conv3_1x1(y)))


def _timm_inverted(b: Any, s: float, x: Tensor) -> Tensor:
    y = b.bn2(b.conv_dw(b.bn1(b.conv_pw(x))))
    return x + s * b.bn3(b.conv_pwl(b.se(y)))


def _timm_universal_inverted(b: Any, s: float, x: Tensor) -> Tensor:
    y = b.se(b.dw_mid(b.pw_exp(b.dw_start(x))))
    return x + s * b.layer_scale(b.dw_end(b.pw_proj(y)))


def _transformers_convnext(b: Any, s: float, x: Tensor) -> Tensor:
    y = b.pwconv2(b.act(b.pwconv1(b.layernorm(b.dwconv(x).permute(0, 2, 3, 1)))))
    return x + s * (b.layer_scale_parameter * y).permute(0, 3, 1, 2)


def _transformers_resnet(b: Any, s: float, x: Tensor) -> Tensor:
    return b.activation(x + s * b.layer(x))


# Vision transformers


def _torchvision_vit(b: Any, s: float, x: Tensor) -> Tensor:
    y = b.ln_1(x)
    x = x + s * b.self_attention(y, y, y, need_weights=False)[0]
    return x + s * b.mlp(b.ln_2(x))


def _torchvision_swin(b: Any, s: float, x: Tensor) -> Tensor:
    x = x + s * b.attn(b.norm1(x))
    return x + s * b.mlp(b.norm2(x))


def _maxvit_attention(b: Any, s: float, x: Tensor) -> Tensor:
    rows, columns = x.shape[2] // b.p, x.shape[3] // b.p
    x = b.partition_swap(b.partition_op(x, b.p))
    x = x + s * b.attn_layer(x)
    x = x + s * b.mlp_layer(x)
    return b.departition_op(b.departition_swap(x), b.p, rows, columns)


def _maxvit(b: Any, s: float, x: Tensor) -> Tensor:
    x = x + s * b.layers.MBconv.layers(x)
    return _maxvit_attention(b.layers.grid_attention, s, _maxvit_attention(b.layers.window_attention, s, x))


def _timm_vit(b: Any, s: float, x: Tensor, **named: Any) -> Tensor:
    x = x + s * b.ls1(b.attn(b.norm1(x), **named))
    return x + s * b.ls2(b.mlp(b.norm2(x)))


def _timm_eva(b: Any, s: float, x: Tensor, **named: Any) -> Tensor:
    gamma1, gamma2 = (1 if gamma is None else gamma for gamma in (b.gamma_1, b.gamma_2))
    x = x + s * gamma1 * b.attn(b.norm1(x), **named)
    return x + s * gamma2 * b.mlp(b.norm2(x))


def _timm_swin(b: Any, s: float, x: Tensor) -> Tensor:
    x = x + s * b._attn(b.norm1(x))
    return x + s * b.mlp(b.norm2(x).flatten(1, 2)).unflatten(1, x.shape[1:3])


def _timm_mixer(b: Any, s: float, x: Tensor) -> Tensor:
    x = x + s * b.mlp_tokens(b.norm1(x).transpose(1, 2)).transpose(1, 2)
    return x + s * b.mlp_channels(b.norm2(x))


def _transformers_vit(b: Any, s: float, x: Tensor, *args: Any, **named: Any) -> Tensor:
    x = x + s * b.attention(b.layernorm_before(x), *args, **named)[0]
    return x + s * b.mlp(b.layernorm_after(x))


# Language and speech


def _bert(b: Any, s: float, x: Tensor, mask: Tensor | None = None, *_: Any, **named: Any) -> Tensor:
    attended = b.attention.self(x, attention_mask=mask, **named)[0]
    x = b.attention.output.LayerNorm(x + s * b.attention.output.dense(attended))
    return b.output.LayerNorm(x + s * b.output.dense(b.intermediate(x)))


def _gpt2(b: Any, s: float, x: Tensor, cache: Any = None, mask: Tensor | None = None, *_: Any, **named: Any) -> Tensor:
    del named["encoder_attention_mask"]
    x = x + s * b.attn(b.ln_1(x), cache=cache, attention_mask=mask, **named)[0]
    return x + s * b.mlp(b.ln_2(x))


def _llama(b: Any, s: float, x: Tensor, **named: Any) -> Tensor:
    x = x + s * b.self_attn(b.input_layernorm(x), **named)[0]
    return x + s * b.mlp(b.post_attention_layernorm(x))


def _t5(b: Any, s: float, x: Tensor, *args: Any, **named: Any) -> Tensor:
    mask, bias, encoded, encoded_mask, encoded_bias = args
    own, crossed, mlp = b.layer[0], b.layer[1], b.layer[-1]
    x = x + s * own.SelfAttention(own.layer_norm(x), mask=mask, position_bias=bias, **named)[0]
    if encoded is not None:
        states = {"key_value_states": encoded, "mask": encoded_mask, "position_bias": encoded_bias}
        x = x + s * crossed.EncDecAttention(crossed.layer_norm(x), **states, **named)[0]
    return x + s * mlp.DenseReluDense(mlp.layer_norm(x))


def _whisper(b: Any, s: float, x: Tensor, *args: Any, **named: Any) -> Tensor:
    named.update(zip(("attention_mask", "encoder_hidden_states"), args, strict=False))
    states, states_mask = named.pop("encoder_hidden_states", None), named.pop("encoder_attention_mask", None)
    x = x + s * b.self_attn(b.self_attn_layer_norm(x), **named)[0]
    if states is not None:
        named["attention_mask"] = states_mask
        x = x + s * b.encoder_attn(b.encoder_attn_layer_norm(x), key_value_states=states, **named)[0]
    return x + s * b.fc2(b.activation_fn(b.fc1(b.final_layer_norm(x))))


def _mamba(b: Any, s: float, x: Tensor, **named: Any) -> Tensor:
    return x + s * b.mixer(b.norm(x), **named)


# By hand


def _encoder(b: Any, s: float, x: Tensor) -> Tensor:
    if b.norm_first:
        x = x + s * b.attend(b.norm1(x))
        return x + s * b.mlp(b.norm2(x))
    x = b.norm1(x + s * b.attend(x))
    return b.norm2(x + s * b.mlp(x))


def _keywords(b: Any, s: float, *, hidden: Tensor, bias: Tensor) -> Tensor:
    return hidden + s * b.down(functional.gelu(b.up(b.norm(hidden) + bias)))


def _wide(b: Any, s: float, x: Tensor) -> Tensor:
    return x + s * b.conv2(functional.relu(b.bn2(b.conv1(functional.relu(b.bn1(x))))))


def _unet(b: Any, s: float, x: Tensor, time: Tensor) -> Tensor:
    y = b.conv1(functional.silu(b.norm1(x))) + b.time(time)[:, :, None, None]
    return x + s * b.conv2(functional.silu(b.norm2(y)))


def _residual_layer(b: Any, s: float, x: Tensor) -> Tensor:
    return x + s * b.second(functional.relu(b.first(b.norm(x))))


def _graph(b: Any, s: float, x: Tensor, edges: Tensor) -> Tensor:
    normed = b.norm(x)
    received = normed.new_zeros(normed.shape).index_add(0, edges[1], b.neighbours(normed)[edges[0]])
    return x + s * b.out(functional.relu(b.own(normed) + received))


def _dit(b: Any, s: float, x: Tensor, condition: Tensor) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = b.modulation(condition)[:, None].chunk(6, dim=-1)
    x = x + s * gate1 * b.attend(b.norm1(x) * (1 + scale1) + shift1)
    return x + s * gate2 * b.mlp(b.norm2(x) * (1 + scale2) + shift2)


def _wrapper(b: Any, s: float, x: Tensor) -> Tensor:
    return x + s * b.inner(x)


def _feed_forward(b: Any, s: float, x: Tensor) -> Tensor:
    norm, up, _, down = b
    return x + s * down(functional.gelu(up(norm(x))))


REFERENCES: dict[str, Reference] = {
    "torchvision.models.resnet.BasicBlock": _torchvision_basic,
    "torchvision.models.resnet.Bottleneck": _torchvision_bottleneck,
    "torchvision.models.video.resnet.BasicBlock": _video_basic,
    "torchvision.models.regnet.ResBottleneckBlock": _regnet,
    "torchvision.models.efficientnet.MBConv": _inverted,
    "torchvision.models.mobilenetv3.InvertedResidual": _inverted,
    "torchvision.models.convnext.CNBlock": _torchvision_convnext,
    "torchvision.models.vision_transformer.EncoderBlock": _torchvision_vit,
    "torchvision.models.swin_transformer.SwinTransformerBlock": _torchvision_swin,
    "torchvision.models.maxvit.PartitionAttentionLayer": _maxvit_attention,
    "torchvision.models.maxvit.MaxVitLayer": _maxvit,
    "timm.models.resnet.Bottleneck": _timm_bottleneck,
    "timm.models.resnetv2.PreActBottleneck": _timm_pre_activation,
    "timm.models.nfnet.NormFreeBlock": _timm_norm_free,
    "timm.models.vision_transformer.Block": _timm_vit,
    "timm.models.eva.EvaBlock": _timm_eva,
    "timm.models.swin_transformer.SwinTransformerBlock": _timm_swin,
    "timm.models.convnext.ConvNeXtBlock": _timm_convnext,
    "timm.models.byobnet.BottleneckBlock": _timm_byobnet_bottleneck,
    "timm.models._efficientnet_blocks.InvertedResidual": _timm_inverted,
    "timm.models._efficientnet_blocks.UniversalInvertedResidual": _timm_universal_inverted,
    "timm.models.mlp_mixer.MixerBlock": _timm_mixer,
    "timm.models.edgenext.ConvBlock": _timm_convnext,
    "transformers.models.bert.modeling_bert.BertLayer": _bert,
    "transformers.models.gpt2.modeling_gpt2.GPT2Block": _gpt2,
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer": _llama,
    "transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer": _llama,
    "transformers.models.mixtral.modeling_mixtral.MixtralDecoderLayer": _llama,
    "transformers.models.vit.modeling_vit.ViTLayer": _transformers_vit,
    "transformers.models.convnext.modeling_convnext.ConvNextLayer": _transformers_convnext,
    "transformers.models.resnet.modeling_resnet.ResNetBottleNeckLayer": _transformers_resnet,
    "transformers.models.t5.modeling_t5.T5Block": _t5,
    "transformers.models.whisper.modeling_whisper.WhisperEncoderLayer": _whisper,
    "transformers.models.whisper.modeling_whisper.WhisperDecoderLayer": _whisper,
    "transformers.models.mamba.modeling_mamba.MambaBlock": _mamba,
    "tests.helpers.hand_written.EncoderBlock": _encoder,
    "tests.helpers.hand_written.KeywordBlock": _keywords,
    "tests.helpers.hand_written.WideBlock": _wide,
    "tests.helpers.hand_written.UNetBlock": _unet,
    "tests.helpers.hand_written.ResidualLayer": _residual_layer,
    "tests.helpers.hand_written.GraphLayer": _graph,
    "tests.helpers.hand_written.DiTBlock": _dit,
    "tests.helpers.hand_written.Residual": _wrapper,
    "tests.helpers.hand_written.FeedForward": _feed_forward,
}
"""References by the block's class."""


def reference_of(block: nn.Module) -> Reference:
    """The reference of a block's class."""
    kind = type(block)
    return REFERENCES[f"{kind.__module__}.{kind.__qualname__}"]
