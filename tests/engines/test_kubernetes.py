"""The manifest for Kubernetes has Kubeflow's fields, by its package's models, which are generated from the CRD."""

from __future__ import annotations

from typing import Any

import yaml

from tests.engines.servers import require
from tests.helpers.programs import ROOT

INSTALL = "pip install 'kubeflow-trainer-api>=2', or pip install --target FOLDER and PYTHONPATH=FOLDER"


def test_the_manifest_is_a_train_job_of_kubeflow() -> None:
    require(INSTALL, packages=["kubeflow_trainer_api"])
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    text = (ROOT / "docs/clusters/trainjob.yaml").read_text()
    manifest: dict[str, Any] = yaml.safe_load(text)
    read = TrainerV1alpha1TrainJob.from_dict(manifest)
    assert read is not None
    assert read.to_dict() == manifest, "a field that Kubeflow does not know is left out"
    assert (manifest["kind"], manifest["apiVersion"]) == ("TrainJob", "trainer.kubeflow.org/v1alpha1")
    trainer = manifest["spec"]["trainer"]
    assert trainer["args"] == [f"--nodes={trainer['numNodes']}", f"--devices={trainer['numProcPerNode']}"]
    assert text in (ROOT / "docs/clusters.md").read_text()
