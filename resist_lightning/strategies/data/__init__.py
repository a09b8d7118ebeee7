"""The training data of a worker: its loaders, their processes, order and augmentation."""
