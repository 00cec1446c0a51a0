"""What is compiled beforehand is all that a step launches, and a launch takes it from a folder that was moved."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.static.ledger import ROOT

pytest.importorskip("triton")

# in processes of their own: kernels are interpreted or compiled from their import on
LAUNCHED = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from moe_unlearn import UnlearnStep, backend
from moe_unlearn.config import Recipe
from moe_unlearn.model.loading import meta_model
from moe_unlearn.regress import triton_private
from moe_unlearn.regress.beforehand import launches_of, zeros
from moe_unlearn.runs.warmup import calls_of
from moe_unlearn.triton_kernels import configs

torch.manual_seed(0)
folder, recipe = sys.argv[1], Recipe.load("graddiff", sys.argv[2:])
target = configs.GPUS["h200"]
beforehand = {launch.identity for launch in launches_of(calls_of(folder, recipe, lengths=[24]), target)}
config = meta_model(folder).config
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
ids = torch.randint(0, config.vocab_size, (recipe.batch_size, 24))
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

def steps():
    with backend.recording(), zeros():
        step = UnlearnStep(model, recipe)
        for _ in range(2):
            step(batch, batch)

with configs.compiling_for(target):
    launched = triton_private.recorded(steps, 90)
names = {launch.name.split("/")[1] for launch in launched}
missed = [f"{launch.name} {launch.config}" for launch in launched if launch.identity not in beforehand]
print(json.dumps({"names": sorted(names), "missed": missed}))
"""

COMPILED = """
import json, sys
from pathlib import Path
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from moe_unlearn.ops.route import route
from moe_unlearn.regress import beforehand, triton_private
from moe_unlearn.triton_kernels import configs
from tests.support.triton_cache import CacheCount

folder, role = sys.argv[1:]
target = configs.GPUS["h200"]
moved = beforehand.settled_cache(Path(folder))
index = torch.zeros(64, 2, dtype=torch.int64)
operands = beforehand.Form.of(index), 8, None, 1, None, None, "auto"
if role == "beforehand":
    launches = beforehand.launches_of([beforehand.Call(torch.ops.moe_unlearn.route.default, operands)], target)
    print(json.dumps([made._asdict() for made in beforehand.compile_all(launches, processes=1)]))
else:  # Triton's own launch, up to the device, which is not there
    run, count = JITFunction.run, CacheCount()
    JITFunction.run = lambda self, *arguments, warmup, **options: run(self, *arguments, warmup=True, **options)
    driver.set_active(triton_private._Target(90))
    from moe_unlearn.triton_kernels.route import route
    route(index, 8)
    print(json.dumps({"moved": moved, "found, compiled": count.taken()}))
"""


def told(program: str, *arguments: object) -> object:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MOE_UNLEARN_IMPL": ""}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def config(tmp_path) -> Path:
    sizes = {
        "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "vocab_size": 64, "decoder_sparse_step": 1,
    }  # fmt: skip
    made = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "float32", **sizes}
    (tmp_path / "config.json").write_text(json.dumps(made), encoding="utf-8")
    return tmp_path


SETTINGS = [("guard=strict",), ("guard=loss", "optimizer.name=sgd")]


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_a_step_launches_nothing_that_was_not_found_beforehand(config, settings):
    found = told(LAUNCHED, config, "batch_size=2", *settings)
    assert not found["missed"], "\n".join(found["missed"])
    assert {"_count_kernel", "_gate_up_kernel", "_linear_kernel", "_partials_kernel", "_update_kernel"} <= {
        *found["names"]
    }


@pytest.mark.slow
def test_a_launch_takes_what_another_process_compiled_in_a_folder_that_was_moved_since(tmp_path):
    made = told(COMPILED, tmp_path / "here", "beforehand")
    assert [(each["kernel"], each["cached"], each["error"]) for each in made] == [
        ("route/_count_kernel", False, ""),
        ("route/_scatter_kernel", False, ""),
    ]
    (tmp_path / "here").rename(tmp_path / "there")
    kept = {path.suffix for path in (tmp_path / "there").rglob("*") if path.is_file()}
    assert kept == {".cubin", ".json", ".source"}
    assert told(COMPILED, tmp_path / "there", "launch") == {"moved": 2, "found, compiled": [2, 0]}
