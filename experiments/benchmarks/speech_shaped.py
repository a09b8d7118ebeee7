"""Is the made task of the shape of Speech Commands learned by a wide network, and not by a linear classifier?

python experiments/benchmarks/speech_shaped.py

One process and one thread, about a minute. The networks are the paper's (batch norm after each linear layer, none with
bias) with batch statistics in training and running ones in the test; SGD without momentum, rate 0.05, batch 128, 10
epochs. The linear classifier is logistic regression on the 64 leading principal directions, the best of three penalties
*by the test itself*: more than it deserves. Writes experiments/benchmarks/results/speech_shaped.jsonl.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import nn

from experiments.benchmarks.keep import RESULTS
from experiments.data import SpeechShaped
from experiments.data.arrays import Features
from experiments.harness.record import write_record

SEEDS = (0, 1, 2)
WIDTHS = (128, 512)
EPOCHS = 10
RATE = 0.05
BATCH = 128
PENALTIES = (0.01, 0.1, 1.0)


def network(features: int, width: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(features, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, classes, bias=False),
        nn.BatchNorm1d(classes, affine=False),
    )


def of_a_network(train: Features, test: Features, width: int, classes: int, *, epochs: int = EPOCHS) -> float:
    """Accuracy on the test, in [0, 1]."""
    torch.manual_seed(0)
    net = network(train.table.shape[1], width, classes)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for _ in range(epochs):
        for chosen in torch.randperm(len(train.labels)).split(BATCH):
            batch = train.take(chosen)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(batch.values), batch.labels).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        return float((net(test.values).argmax(dim=1) == test.labels).float().mean())


def of_a_linear_classifier(train: Features, test: Features) -> float:
    """Accuracy on the test, in [0, 1]: of the best penalty."""
    directions = PCA(n_components=64, svd_solver="randomized", random_state=0).fit(train.values.numpy())
    scale = directions.explained_variance_[0] ** 0.5
    inputs, targets = directions.transform(train.values.numpy()) / scale, train.labels.numpy()
    held = directions.transform(test.values.numpy()) / scale
    models = [LogisticRegression(C=1 / penalty, max_iter=500).fit(inputs, targets) for penalty in PENALTIES]
    return max(float(model.score(held, test.labels.numpy())) for model in models)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for seed in SEEDS:
        data = SpeechShaped(seed=seed)
        start = time.perf_counter()
        train, test = data.read(train=True), data.read(train=False)
        row = {"seed": seed, "seconds_to_make": time.perf_counter() - start}
        row["linear"] = of_a_linear_classifier(train, test)
        for width in WIDTHS:
            row[f"width_{width}"] = of_a_network(train, test, width, data.num_classes)
        rows.append(row)
        print(row)
    write_record(RESULTS / "speech_shaped.jsonl", {"epochs": EPOCHS, "rate": RATE, "batch": BATCH, "rows": rows})


if __name__ == "__main__":
    main()
