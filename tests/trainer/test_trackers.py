"""Trackers that a recipe names get a run's losses: W&B without a network, MLflow with a store of files."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.support.command_line import arguments, saved

pytestmark = pytest.mark.nightly
STEPS = 3


def needs(library, package):
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"{library} is not installed: pip install {package}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    saved(root)
    return root


def run(folder, out, tracker, **environment):
    """Start a run as from a shell, since trackers leave processes and settings behind; return what it printed."""
    settings = [f"steps={STEPS}", "batch_size=4", "data.max_length=48", f"trainer.report_to={tracker}"]
    command = ["run", "graddiff", *arguments(folder), "--out", str(out), "--no-eval", "--set", *settings]
    environment = os.environ | environment
    done = subprocess.run(
        [sys.executable, "-m", "moe_unlearn", *command], env=environment, cwd=out.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@needs("wandb", "wandb")
def test_wandb_keeps_a_run_without_a_network(folder, tmp_path):
    run(folder, tmp_path / "out", "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    assert content.count(b"train/forget_loss") >= STEPS and content.count(b"train/retain_loss") >= STEPS


@needs("mlflow", "mlflow-skinny")
def test_mlflow_keeps_a_run_in_files(folder, tmp_path):
    store = tmp_path / "store"
    # its store of files is one that newer versions take on request only
    run(folder, tmp_path / "out", "mlflow", MLFLOW_TRACKING_URI=store.as_uri(), MLFLOW_ALLOW_FILE_STORE="true")
    for name in ("forget_loss", "retain_loss"):
        (kept,) = store.glob(f"*/*/metrics/{name}")
        assert len(kept.read_text(encoding="utf-8").splitlines()) == STEPS
