"""Describes the effect of torch.nn's modules on a tensor whose neurons are divided."""

from __future__ import annotations

from torch import fx, nn
from torch.nn.modules import batchnorm, conv, dropout, instancenorm, lazy, padding, pooling

from resist_lightning.comm.tensors import named_tensors
from resist_lightning.methods.ist.network.operations import DROPOUTS, Divided, NotPerNeuron, operation_name
from resist_lightning.methods.ist.network.tracing import Traced, Weighted

NORMS = (batchnorm._BatchNorm, instancenorm._InstanceNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
TRANSPARENT = (nn.Identity, dropout._DropoutNd)
# Each entry alone. Not Softmax and the like, which sum over all neurons, nor PReLU, whose parameters may be per neuron.
ELEMENTWISE = (
    nn.Identity, dropout._DropoutNd, nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus,
    nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
# These mix positions, and never channels.
MIXING_POSITIONS = (
    pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._AdaptiveMaxPoolNd, pooling._AdaptiveAvgPoolNd, pooling._LPPoolNd,
    nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, padding._ConstantPadNd, padding._ReflectionPadNd,
    padding._ReplicationPadNd, padding._CircularPadNd, nn.Upsample,
)  # fmt: skip


def inputs_of(module: Weighted) -> tuple[str, int]:
    """The attribute in which a layer keeps its number of input features or channels, and its value."""
    if isinstance(module, nn.Linear):
        return "in_features", module.in_features
    return "in_channels", module.in_channels


def outputs_of(module: Weighted) -> tuple[str, int]:
    """The attribute in which a layer keeps its number of neurons, and its value."""
    if isinstance(module, nn.Linear):
        return "out_features", module.out_features
    return "out_channels", module.out_channels


def positions_of(module: Weighted) -> int:
    """Number of dimensions behind the neurons in a layer's output."""
    return 0 if isinstance(module, nn.Linear) else len(module.kernel_size)


def norm_size(name: str, module: nn.Module, value: Divided) -> str:
    """The attribute in which a norm keeps its number of neurons.

    Raises:
        NotPerNeuron: if it is not a norm of exactly the neurons in ``value``.
    """
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        attribute, fits = "normalized_shape", value.form != "channels"
    elif isinstance(module, nn.GroupNorm):
        attribute, fits = "num_channels", module.num_groups == 1
    else:
        attribute = "num_features"
        # An instance norm of features would take neurons for positions.
        fits = isinstance(module, batchnorm._BatchNorm) or value.form == "channels"
    # A normalized shape is a tuple.
    size = getattr(module, attribute)
    if not fits or size not in (value.width, (value.width,)):
        raise NotPerNeuron(
            f"reach {titled(name, module)}, which is not a norm of exactly these {value.width} neurons in one group "
            f"({module.extra_repr()}); after a convolution it must stand before the flattening"
        )
    return attribute


def norms_behind(traced: Traced, node: fx.Node) -> list[str] | None:
    """Names of the norms with running statistics, where only norms read a node, perhaps behind identities and dropout.

    None if anything else reads it, or nothing does.
    """
    if not node.users:
        return None
    found: list[str] = []
    for user in node.users:
        if user.op == "call_module":
            name, module = traced.called(user)
            if isinstance(module, NORMS):
                if getattr(module, "running_mean", None) is not None:
                    found.append(name)
                continue
            transparent = isinstance(module, TRANSPARENT)
        else:
            transparent = operation_name(user) in DROPOUTS
        behind = norms_behind(traced, user) if transparent else None
        if behind is None:
            return None
        found += behind
    return found


def titled(name: str, module: nn.Module) -> str:
    """Name and class of a module, for a message."""
    return f"{name!r} ({type(module).__name__})"


def torch_class(module: nn.Module) -> str:
    """Name of a module's class in torch.nn, or of the base class there."""
    # A user's class has a name of its own, which tells nothing of its dimensions.
    bases = type(module).__mro__
    return next(base.__name__ for base in bases if base.__module__.startswith("torch.nn."))


def cannot_cut(name: str, module: nn.Module, tensors: set[str], calls: int) -> str:
    """The reason why the tensors of a module cannot be cut; empty if they can.

    Args:
        name: its qualified name.
        module: a layer or a norm.
        tensors: the names of parameters and buffers that its class knows.
        calls: number of its calls in a forward.
    """
    what = titled(name, module)
    if isinstance(module, lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return f"{what}, which has no sizes yet; run the network once"
    if isinstance(module, conv._ConvNd) and module.groups > 1:
        return f"{what}, a grouped or depthwise convolution (groups={module.groups})"
    if calls > 1:
        return f"{what}, which is called {calls} times"
    others = set(named_tensors(module)) - tensors
    if others:
        return (
            f"{what}, which has other tensors than its class ({', '.join(sorted(others))}): a weight norm, a "
            "parametrization or a mask"
        )
    return ""
