"""Data sets as LightningDataModules that train from one array: images in bytes, or rows of features."""

from experiments.data.folder import ImageFolder
from experiments.data.sets import CIFAR10, CIFAR100, Digits, Fake
from experiments.data.shaped import SpeechShaped
from experiments.data.speech import SpeechCommands

__all__ = ["CIFAR10", "CIFAR100", "Digits", "Fake", "ImageFolder", "SpeechCommands", "SpeechShaped"]
