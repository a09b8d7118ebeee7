"""Optuna looks for a learning rate: each trial trains with two workers, which stop together if the trial is pruned."""

import sys

import lightning as L
import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

from resist_lightning import ResISTStrategy
from resist_lightning.models import preact_resnet

EPOCHS = 4


class Digits(L.LightningModule):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate
        self.net = preact_resnet(26, width_multiplier=0.125)

    def training_step(self, batch, index):
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, index):
        images, labels = batch
        right = (self.net(images).argmax(1) == labels).float().mean()
        self.log("accuracy", right, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)


class Pruning(L.Callback):
    """After each validation, report to the study; if it says so, end the training, on all workers."""

    def __init__(self, trial, monitor):
        self.trial = trial
        self.monitor = monitor

    def on_validation_end(self, trainer, module):
        if trainer.sanity_checking:
            return
        value = trainer.strategy.broadcast(trainer.callback_metrics[self.monitor].item())
        self.trial.report(value, trainer.current_epoch)
        if trainer.strategy.broadcast(bool(self.trial.should_prune())):
            trainer.should_stop = True  # not an exception, which would end a spawned worker

    def raise_if_pruned(self):
        """Call it after fit, which has perhaps run in other processes."""
        reported = self.trial.study.trials[self.trial.number].intermediate_values
        if len(reported) < EPOCHS:
            raise optuna.TrialPruned()


def accuracy(trial, start_method):
    L.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    digits = TensorDataset(pixels.repeat(1, 3, 1, 1), torch.tensor(labels))
    train, validation = random_split(digits, [0.8, 0.2])

    pruning = Pruning(trial, "accuracy")
    trainer = L.Trainer(
        strategy=ResISTStrategy(local_steps=10, start_method=start_method),
        accelerator="cpu",
        devices=2,
        max_epochs=EPOCHS,
        callbacks=[pruning],
        logger=False,
        enable_checkpointing=False,
    )
    module = Digits(trial.suggest_float("rate", 1e-4, 1, log=True))
    trainer.fit(module, DataLoader(train, 16, shuffle=True), DataLoader(validation, 90))
    pruning.raise_if_pruned()
    return trainer.callback_metrics["accuracy"].item()


def main(start_method="spawn", trials="10"):
    torch.set_num_threads(1)  # two workers share the cores
    # Workers that this process starts share its study by a file. Where every process runs this program (popen,
    # torchrun, SLURM), each has a study of its own in memory. They are the same, as seed and reported values are.
    file = None if start_method == "popen" else JournalStorage(JournalFileBackend("digits.log"))
    study = optuna.create_study(
        study_name="digits",
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=1),
        storage=file,
        load_if_exists=True,
    )
    study.optimize(lambda trial: accuracy(trial, start_method), n_trials=int(trials))


if __name__ == "__main__":
    main(*sys.argv[1:])
