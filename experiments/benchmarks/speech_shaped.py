"""Is the made task of the shape of Speech Commands learned by a wide network, and not by a linear classifier?

The networks are the paper's (batch norm after each linear layer, none with bias) with batch statistics in training and
running ones in the test; SGD without momentum, rate 0.05, batch 128, 10 epochs. The linear classifier is logistic
regression on the 64 leading principal directions, the best of three penalties *by the test itself*: more than it deserves.
"""

from __future__ import annotations

import time

import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from experiments.data import SpeechShaped
from experiments.data.arrays import Features
from experiments.networks import mlp
from experiments.trainers import accuracy, sgd_step

WIDTHS = (128, 512)
EPOCHS, RATE, BATCH = 10, 0.05, 128
PENALTIES = (0.01, 0.1, 1.0)


def of_a_network(train: Features, test: Features, width: int, classes: int) -> float:
    """Accuracy on the test, in [0, 1]."""
    torch.manual_seed(0)
    net = mlp(in_features=train.table.shape[1], num_classes=classes, width=width, output_norm=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(train.labels)).split(BATCH):
            batch = train.take(chosen)
            sgd_step(net, optimizer, batch.values, batch.labels)
    return accuracy(net, [(test.values, test.labels)]) / 100


def of_a_linear_classifier(train: Features, test: Features) -> float:
    """Accuracy on the test, in [0, 1]: of the best penalty."""
    directions = PCA(n_components=64, svd_solver="randomized", random_state=0).fit(train.values.numpy())
    scale = directions.explained_variance_[0] ** 0.5
    inputs = directions.transform(train.values.numpy()) / scale
    targets = train.labels.numpy()
    held = directions.transform(test.values.numpy()) / scale
    models = [LogisticRegression(C=1 / penalty, max_iter=500).fit(inputs, targets) for penalty in PENALTIES]
    return max(float(model.score(held, test.labels.numpy())) for model in models)


def measure(seed: int, examples: int) -> dict[str, float]:
    """A row: accuracies of a task with so many training examples, in [0, 1]."""
    torch.set_num_threads(1)
    data = SpeechShaped(seed=seed, train_size=examples, test_size=examples // 4)
    start = time.perf_counter()
    train, test = data.read(train=True), data.read(train=False)
    row = {"seed": seed, "seconds_to_make": time.perf_counter() - start, "linear": of_a_linear_classifier(train, test)}
    return row | {f"width_{width}": of_a_network(train, test, width, data.num_classes) for width in WIDTHS}
