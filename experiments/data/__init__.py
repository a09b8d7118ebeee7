"""Image data sets as LightningDataModules that train from one array of bytes."""

from experiments.data.folder import ImageFolder
from experiments.data.sets import CIFAR10, CIFAR100, Digits, Fake

__all__ = ["CIFAR10", "CIFAR100", "Digits", "Fake", "ImageFolder"]
