"""Models that Accelerate keeps on the CPU or on the disk and brings in for each module."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM

from randlora import PeftModel, RandLoraConfig, get_peft_model

from .helpers import LLAMA_TARGETS, assert_close, layers_of, llama, randomise, tokens

CONFIG = {"r": 4, "randlora_alpha": 4, "target_modules": [*LLAMA_TARGETS, "embed_tokens"]}
PLACES = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, str(folder), execution_device=torch.device("cpu")),
    "some on disk": lambda model, folder: dispatch_model(
        model,
        {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        | {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"},
        main_device="cpu",
        offload_dir=str(folder),
        force_hooks=True,
    ),
}


@pytest.fixture
def saved(tmp_path):
    """A base model and an adapter as files, and what they compute."""
    llama().save_pretrained(tmp_path / "base")
    model = randomise(get_peft_model(llama(), RandLoraConfig(**CONFIG))).eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path, model(input_ids=tokens()).logits.detach()


@pytest.mark.parametrize("place", PLACES)
class TestOffloaded:
    def test_adapted_after_offloading(self, place, tmp_path):
        config = RandLoraConfig(**CONFIG)
        expected = randomise(get_peft_model(llama(), config)).eval()(input_ids=tokens()).logits.detach()
        base = llama()
        base = PLACES[place](base, tmp_path) or base
        model = randomise(get_peft_model(base, config)).eval()
        assert_close(model(input_ids=tokens()).logits.detach(), expected, 1e-6)

    def test_merging(self, place, saved):
        folder, expected = saved
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        base = PLACES[place](base, folder) or base
        model = PeftModel.from_pretrained(base, folder / "adapter").eval()
        assert_close(model(input_ids=tokens()).logits.detach(), expected, 1e-6)
        model.merge_adapter()
        assert all(layer.merged for layer in layers_of(model).values())
        assert_close(model(input_ids=tokens()).logits.detach(), expected, 1e-5)
        model.unmerge_adapter()
        assert_close(model(input_ids=tokens()).logits.detach(), expected, 1e-6)
        merged = model.merge_and_unload()
        assert_close(merged(input_ids=tokens()).logits.detach(), expected, 1e-5)
