import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from randlora import RandLoraConfig
from randlora.analysis import delta_weight
from randlora.report.updates import _column_means, measure_updates, natural

LINEAR = ["query", "value", "dense"]
NAME = "bert.encoder.layer.1.intermediate.dense"


def adapter(tiny_bert, config, folder):
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tiny_bert), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "randlora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(tiny_bert), str(folder))


CONFIGS = {
    "dense": RandLoraConfig(r=5, target_modules=LINEAR, save_projection=False, task_type="SEQ_CLS"),
    "saved bases": RandLoraConfig(r=5, target_modules=LINEAR, task_type="SEQ_CLS"),
    "sparse, paper": RandLoraConfig(
        r=5, target_modules=LINEAR, sparse=True, randlora_scaling="paper", task_type="SEQ_CLS"
    ),
    "ranks and alphas": RandLoraConfig(
        r=5, target_modules=LINEAR, rank_pattern={"query": 3}, alpha_pattern={"dense": 7}, task_type="SEQ_CLS"
    ),
    "lora": LoraConfig(r=3, target_modules=LINEAR, alpha_pattern={"dense": 7}, task_type="SEQ_CLS"),
    "rank-stabilised lora": LoraConfig(
        r=3, target_modules=LINEAR, use_rslora=True, rank_pattern={"query": 2}, task_type="SEQ_CLS"
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_folder_alone_gives_what_the_model_computes(tmp_path, tiny_bert, kind):
    model = adapter(tiny_bert, CONFIGS[kind], tmp_path)
    seen = []
    found = measure_updates(tmp_path, None, seen.append)
    assert found.remark == ""
    assert seen == [layer.name for layer in found.layers] or "lora" in kind
    assert len(found.layers) == len(seen) == 11
    for layer in found.layers:
        expected = torch.linalg.svdvals(delta_weight(model, layer.name).double())
        assert layer.spectrum.norm == pytest.approx(expected.norm().item(), rel=1e-5)
        taken = [expected[index - 1].item() for index in layer.spectrum.index]
        assert layer.spectrum.values == pytest.approx(taken, rel=1e-4, abs=1e-6 * expected[0].item())


def test_means_of_the_scalings_are_by_basis(tmp_path, tiny_bert):
    model = adapter(tiny_bert, CONFIGS["dense"], tmp_path)
    layer = next(one for one in measure_updates(tmp_path, None, str).layers if one.name == NAME)
    there = model.get_base_model().get_submodule(NAME)
    lam, gamma = there.randlora_lambda["default"], there.randlora_gamma["default"]
    assert layer.lam == pytest.approx(lam.abs().mean(0).tolist())
    assert layer.gamma == pytest.approx(gamma.abs().mean(1).tolist())
    assert len(layer.lam) == len(layer.gamma) == 7  # ceil(32 / 5)


def test_many_bases_are_grouped():
    gamma = torch.arange(70.0).repeat_interleave(3).reshape(70, 3)  # 70 bases, neighbours by threes
    found = _column_means(gamma)
    assert len(found) == 24
    assert found[:2] == (1.0, 4.0)
    assert found[-1] == 69.0


def test_without_the_base_model_the_scalings_remain(tmp_path, tiny_bert):
    adapter(tiny_bert, CONFIGS["dense"], tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone"}))
    found = measure_updates(tmp_path, None, str)
    assert "/gone" in found.remark
    assert all(layer.spectrum is None and layer.lam for layer in found.layers)
    assert all(layer.spectrum for layer in measure_updates(tmp_path, tiny_bert, str).layers)


def test_other_bases_than_recorded_are_no_picture(tmp_path, tiny_bert):
    adapter(tiny_bert, CONFIGS["dense"], tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "basis_fingerprint": "0" * 64}))
    found = measure_updates(tmp_path, None, str)
    assert "0" * 64 in found.remark
    assert all(layer.spectrum is None for layer in found.layers)


@pytest.mark.parametrize("damage", ["cut", "gone", "config"])
def test_damage_is_a_remark(tmp_path, tiny_bert, damage):
    adapter(tiny_bert, CONFIGS["lora"], tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "gone":
        weights.unlink()
    else:
        (tmp_path / "adapter_config.json").write_text("{")
    assert measure_updates(tmp_path, None, str).remark


@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_nan_is_a_remark(tmp_path, tiny_bert, kind):
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tiny_bert), CONFIGS[kind])
    for name, parameter in model.named_parameters():
        if "lora_" in name or "randlora_" in name:
            torch.nn.init.constant_(parameter, torch.nan)
    model.save_pretrained(tmp_path)
    assert "not finite" in measure_updates(tmp_path, None, str).remark


def test_an_update_beyond_float32_is_a_remark(tmp_path, tiny_bert):
    """λ and γ are finite, what they are multiplied to is not."""
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tiny_bert), CONFIGS["dense"])
    layer = model.get_base_model().get_submodule(NAME)
    torch.nn.init.constant_(layer.randlora_lambda["default"], 3e38)
    torch.nn.init.constant_(layer.randlora_gamma["default"], 3e38)
    model.save_pretrained(tmp_path)
    found = measure_updates(tmp_path, None, str)
    assert found.remark == f"{NAME}: its update is not finite: λ times γ is more than float32 holds"
    assert [one.name for one in found.layers if one.spectrum is None] == [NAME]


def test_layer_ten_comes_after_layer_two():
    assert sorted(["h.10.q", "h.2.q", "h.2.k", "a"], key=natural) == ["a", "h.2.k", "h.2.q", "h.10.q"]
