"""Adapters whose head has other labels than that of their base model: merged and converted with the adapter's head."""

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from randlora import RandLoraConfig, get_peft_model
from randlora.analysis.contents import inspect_adapter
from randlora.convert.lora import convert_folder_to_lora
from randlora.convert.merged_folder import merge_folder

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
PATCHES = {**SIZES, "image_size": 8, "patch_size": 4}
BASES = {
    "bert, 5 labels to 3": (lambda: BertForSequenceClassification(BertConfig(vocab_size=99, num_labels=5, **SIZES)), 3),
    "vit, 2 labels to 10": (lambda: ViTForImageClassification(ViTConfig(num_labels=2, **PATCHES)), 10),
    "vit without a head to 10": (lambda: ViTModel(ViTConfig(**PATCHES)), 10),
}


@pytest.fixture(params=BASES)
def trained(request, tmp_path):
    """The class, its base folder, the adapter's folder, an input, and what the adapted model says of it."""
    make, labels = BASES[request.param]
    make().save_pretrained(tmp_path / "base")
    texts = request.param.startswith("bert")
    auto = AutoModelForSequenceClassification if texts else AutoModelForImageClassification
    if not texts:
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "base")
    base = auto.from_pretrained(tmp_path / "base", num_labels=labels, ignore_mismatched_sizes=True)
    config = {
        "target_modules": ["query", "value"] if texts else ["q_proj", "v_proj"],
        "modules_to_save": ["classifier"],
    }
    if texts:
        config["task_type"] = "SEQ_CLS"
    model = get_peft_model(base, RandLoraConfig(r=4, save_projection=False, **config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "randlora_lambda" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    given = {"input_ids": torch.arange(6)[None]} if texts else {"pixel_values": torch.randn(2, 3, 8, 8)}
    with torch.no_grad():
        return auto, tmp_path, given, model(**given).logits


def test_merged_it_has_the_adapter_s_head_and_what_prepares_its_inputs(trained):
    auto, folder, given, expected = trained
    done = merge_folder(folder / "adapter", folder / "merged")
    merged = auto.from_pretrained(folder / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(merged(**given).logits, expected, atol=1e-5)
    assert done.image_processor == ("pixel_values" in given)


def test_as_a_lora_of_full_rank_it_says_the_same(trained):
    auto, folder, given, expected = trained
    convert_folder_to_lora(folder / "adapter", folder / "lora", energy=1.0)
    base = auto.from_pretrained(folder / "base", num_labels=expected.shape[-1], ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(base, folder / "lora").eval()
    with torch.no_grad():
        assert torch.allclose(model(**given).logits, expected, atol=1e-4)


def test_its_layers_have_shapes_and_norms(trained):
    contents = inspect_adapter(trained[1] / "adapter")
    assert contents.bases == "verified"
    assert all(layer.update_norm for layer in contents.layers)
