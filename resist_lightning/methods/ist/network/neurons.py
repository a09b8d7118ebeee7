"""Describes hidden neurons, and the parts of tensors that belong to them. Standard library only.

::

    Linear(784, 512) ─ BatchNorm1d(512) ─ ReLU ─ Linear(512, 10)
           rows 0           rows 0                columns 0         of layers[0], which has 512 neurons
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class HiddenLayer:
    """A layer whose neurons are dealt out to workers.

    Args:
        name: qualified name of the Linear or Conv that makes them.
        width: number of neurons; a channel of a convolution is a neuron.
    """

    name: str
    width: int


@dataclass(frozen=True)
class Cut:
    """The division of a tensor of the module among neurons.

    Args:
        rows: index of the hidden layer whose neurons its dimension 0 is; None if dimension 0 is whole.
        columns: the same for dimension 1; a vector has None.
        repeat: entries of dimension 1 per neuron of ``columns``, which are neighbours; more than 1 after a feature map
            was flattened: one per position.
    """

    rows: int | None
    columns: int | None
    repeat: int = 1

    @property
    def layer(self) -> int:
        """The one hidden layer of a tensor that has neurons on one side only."""
        layer = self.rows if self.rows is not None else self.columns
        assert layer is not None
        return layer


@dataclass(frozen=True)
class Size:
    """An attribute in which a module keeps its own width, and which must change with the subnet.

    Args:
        module: its qualified name.
        attribute: ``in_features``, ``out_features``, ``in_channels``, ``out_channels``, ``num_features``,
            ``num_channels``, ``num_parameters``, or ``normalized_shape``, which is a tuple of one number.
        layer: index of the hidden layer.
        repeat: entries per neuron.
    """

    module: str
    attribute: str
    layer: int
    repeat: int = 1


@dataclass(frozen=True)
class Passed:
    """A place where a forward hook of a module of torch.nn would see divided neurons.

    Args:
        module: the module's qualified name.
        before: whether it is the module's input; else its output.
        dimension: the dimension of the tensor that the neurons are.
        layer: index of the hidden layer.
    """

    module: str
    before: bool
    dimension: int
    layer: int


@dataclass(frozen=True)
class Neurons:
    """The hidden neurons of a module, and the tensors and sizes that are divided with them.

    Args:
        layers: the hidden layers, in the order of the network.
        cuts: cuts by qualified name of a parameter or buffer; a tensor that is not here is shared by all workers.
        sizes: the attributes that change with the subnet.
        rescaled: name of a Linear or Conv, and index of the hidden layer of its input. No norm directly follows it, so
            that the sum over fewer neurons must be scaled in a subnet.
        rescaled_if_frozen: the same, and the names of norms with running statistics that directly follow. In evaluation
            mode these do not make up for the smaller sum, which is then scaled, too.
        assumed: name of a module that was traced, and the values that optional arguments of its forward had then. With
            other values the neurons may go elsewhere.
        passed: the places where hooks see them.
        whole: names of hidden layers that cannot be divided, where the user has named none.
    """

    layers: tuple[HiddenLayer, ...]
    cuts: dict[str, Cut]
    sizes: tuple[Size, ...]
    rescaled: tuple[tuple[str, int], ...]
    rescaled_if_frozen: tuple[tuple[str, int, tuple[str, ...]], ...] = ()
    assumed: tuple[tuple[str, dict[str, object]], ...] = ()
    passed: tuple[Passed, ...] = field(default=(), compare=False, repr=False)
    whole: tuple[str, ...] = field(default=(), compare=False, repr=False)
