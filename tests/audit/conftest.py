"""Two trained models, one that knows the forget documents and one that never saw them."""

import dataclasses

import pytest

from moe_unlearn.benchmark.tiny_models import SIZES, prepare_experiment
from tests.support.threads import torch_threads

# as many documents as a verdict of gone needs
SIZE = dataclasses.replace(SIZES["test"], forget=40, retain=40, holdout=40, epochs=22, layers=2)


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models this small wait for threads longer than they compute, above all on a busy machine."""
    with torch_threads(1):
        yield


@pytest.fixture(scope="session")
def experiment():
    return prepare_experiment("builtin:pydoc", 0, size=SIZE)


@pytest.fixture(scope="session")
def rows(experiment):
    """The documents by side, as `audit` takes them; of retain documents only means are shown, so that few will do."""
    return {"forget": experiment.forget, "retain": experiment.retain[:10], "holdout": experiment.holdout}
