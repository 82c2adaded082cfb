"""A file brings what its config announces, finite and whole, and touches nothing else."""

import copy
import os
import warnings

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from randlora import CheckpointError, PeftModel, RandLoraConfig, get_peft_model

from ..helpers import STACK_TARGETS, adapted, assert_same_tensors, output, randomise, snapshot, stack

WEIGHTS = "adapter_model.safetensors"
LAMBDA, HEAD = "base_model.model.tall.randlora_lambda", "base_model.model.head.weight"


def saved(folder, **config):
    model = adapted(**config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter.add_(1)
    model.save_pretrained(folder)
    return model


def edit(folder, change):
    content = load_file(folder / WEIGHTS)
    change(content)
    save_file(content, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update({HEAD: torch.ones(3, 9)}), r"config does not announce.*head\.weight"),
        (lambda c: c.update({"base_model.model.tall.base_layer.weight": torch.ones(17, 10)}), "does not announce"),
        (lambda c: c.update({"base_model.model.tall.bias": torch.ones(17)}), "does not announce"),
        (lambda c: c.update({"../../x": torch.ones(3)}), r"does not announce.*\.\./x"),
        (lambda c: c.update({"base_model.model.x.randlora_lambda": torch.ones(4, 3)}), "does not announce"),
        (lambda c: c.pop(LAMBDA), r"lacks tall\.randlora_lambda"),
        (lambda c: c[LAMBDA].view(-1)[0].fill_(torch.nan), "not finite in .*tall"),
        (lambda c: c.update({LAMBDA: c[LAMBDA].double() + 1e300}), "not finite in .*tall"),
        (lambda c: c.update({LAMBDA: c[LAMBDA].long()}), r"not floating point: .*int64"),
        (lambda c: c.update({LAMBDA: torch.ones(8, 2)}), "whose rank is 4"),
    ],
)
def test_what_a_file_may_not_hold(tmp_path, change, message):
    saved(tmp_path)
    edit(tmp_path, change)
    model = stack()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(model, tmp_path)
    assert_same_tensors(model.state_dict(), before)


def test_modules_trained_in_full_hold_no_nan(tmp_path):
    saved(tmp_path, modules_to_save=["head"])
    edit(tmp_path, lambda content: content[HEAD].fill_(torch.nan))
    with pytest.raises(CheckpointError, match=r"not finite in .*head\.modules_to_save"):
        PeftModel.from_pretrained(stack(), tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("bias", ["all", "randlora_only"])
def test_biases_come_with_the_adapter_or_not_at_all(tmp_path, bias, low_cpu_mem_usage):
    expected = output(saved(tmp_path, bias=bias))
    loaded = PeftModel.from_pretrained(stack(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(output(loaded), expected)
    edit(tmp_path, lambda content: content.update({"base_model.model.wide.randlora_gamma": torch.ones(3, 8)}))
    model = stack()
    before, parameters = output(model), list(model.parameters())
    with pytest.raises(CheckpointError, match=r"size mismatch for .*wide\.randlora_gamma"):
        PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(output(model), before)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]


def test_modules_trained_in_full_beside_all_biases(tmp_path):
    """PEFT writes the biases of such modules twice."""
    expected = output(saved(tmp_path, bias="all", modules_to_save=["head"]))
    assert torch.equal(output(PeftModel.from_pretrained(stack(), tmp_path)), expected)


def test_what_is_no_file_is_not_opened(tmp_path):
    saved(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    os.mkfifo(tmp_path / WEIGHTS)  # to open it would wait for a writer
    with pytest.raises(CheckpointError, match="has no adapter_model"):
        PeftModel.from_pretrained(stack(), tmp_path)


def test_rank_and_file_are_compared_before_anything_is_made(tmp_path, monkeypatch):
    saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        (tmp_path / "adapter_config.json").read_text().replace('"r": 4', '"r": 60000')
    )
    monkeypatch.setattr("randlora.tuner.bases.get_basis", lambda spec: pytest.fail("bases were drawn"))
    with pytest.raises(CheckpointError, match="whose rank is 60000"):
        PeftModel.from_pretrained(stack(), tmp_path)


def test_what_a_program_hands_over_itself_is_not_a_strangers_file():
    trained = randomise(get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS, bias="all"))).eval()
    with torch.no_grad():
        trained.base_model.model.head.bias += 1
    other = get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS)).eval()
    set_peft_model_state_dict(other, get_peft_model_state_dict(trained))
    assert torch.equal(output(other), output(trained))


def test_what_is_only_named_a_bias_is_not_missed(tmp_path):
    """T5 has ``relative_attention_bias``, an embedding, and no biases; PEFT trains and writes none of it."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 28, "num_layers": 1, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    weights = copy.deepcopy(base.state_dict())
    model = randomise(get_peft_model(base, RandLoraConfig(r=4, target_modules=["q", "v"], bias="all"))).eval()
    model.save_pretrained(tmp_path)
    again = T5ForConditionalGeneration(T5Config(**sizes))
    again.load_state_dict(weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*holds no biases")
        loaded = PeftModel.from_pretrained(again, tmp_path).eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        outputs = [m(input_ids=ids, decoder_input_ids=ids).logits for m in (model, loaded)]
    assert torch.equal(*outputs)
