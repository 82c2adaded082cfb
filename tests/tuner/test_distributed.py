"""Two processes on gloo: the same losses as one, bases that are nobody's to shard, one whole adapter in the file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from randlora import PeftModel

from .distributed_run import build, tokens

SCRIPT = Path(__file__).with_name("distributed_run.py")
# DeepSpeed is installed by `make aside`: it is built from source, against the torch that is there
DEEPSPEED = {"PYTHONPATH": str(Path(__file__).parents[2] / "build" / "deepspeed"), "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each mode runs once; gives its report and its folder."""
    done = {}

    def run(mode, bases):
        if (mode, bases) not in done:
            folder = tmp_path_factory.mktemp(mode)
            processes = 1 if mode == "one" else 2
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            result = subprocess.run(
                [*command, str(SCRIPT), mode, bases, str(folder)],
                env=os.environ | {"OMP_NUM_THREADS": "1"} | (DEEPSPEED if mode == "zero3" else {}),
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert result.returncode == 0, result.stderr[-3000:]
            done[mode, bases] = json.loads((folder / "report.json").read_text()), folder
        return done[mode, bases]

    return run


KINDS = {
    "ddp": "DistributedDataParallel",
    "fsdp1": "FullyShardedDataParallel",
    "fsdp2": "FSDPPeftModel",
    "zero3": "DeepSpeedEngine",
}
# its Adam differs from torch's where gradients are near its ε
TOLERANCE = {"zero3": 1e-3}


@pytest.mark.parametrize(
    ("mode", "bases"),
    [
        *(pytest.param(mode, "dense", marks=pytest.mark.aside if mode == "zero3" else ()) for mode in KINDS),
        ("ddp", "structured"),
        ("fsdp2", "structured"),
    ],
)
class TestTwoProcesses:
    def test_losses_are_those_of_one(self, mode, bases, runs):
        (one, _), (two, _) = runs("one", bases), runs(mode, bases)
        assert (one["processes"], two["processes"]) == (1, 2)
        assert two["kind"] == KINDS[mode]
        assert two["losses"] == pytest.approx(one["losses"], rel=TOLERANCE.get(mode, 1e-4))
        assert one["losses"][-1] < one["losses"][0]

    def test_bases_are_not_part_of_what_is_wrapped(self, mode, bases, runs):
        report, _ = runs(mode, bases)
        assert report["bases"] == []

    def test_the_optimizer_holds_lambda_and_gamma_or_its_share_of_them(self, mode, bases, runs):
        (one, _), (two, _) = runs("one", bases), runs(mode, bases)
        if mode == "zero3":  # hands its optimiser flat shares, and takes them back
            return
        assert two["optimized"] == one["optimized"]  # a sharded parameter counts whole

    def test_the_adapter_is_saved_whole(self, mode, bases, runs):
        (one, _), (two, folder) = runs("one", bases), runs(mode, bases)
        assert two["saved"] == one["saved"]
        loaded = PeftModel.from_pretrained(build(bases).unload(), folder / "adapter")
        with torch.no_grad():
            loss = loaded(input_ids=tokens(), labels=tokens()).loss.item()
        assert loss == pytest.approx(two["final"], rel=1e-5)
        assert loss < two["losses"][-1]
