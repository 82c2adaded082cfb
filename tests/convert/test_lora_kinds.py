"""Which layers a LoRA can take the place of: PEFT's LoRA computes what the adapter computes, or to_lora refuses."""

import copy
import re
import warnings

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft import get_peft_model as peft_model
from peft.tuners.lora.conversion import convert_to_lora
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from randlora import RandLoraConfig, UnsupportedLayerError, get_peft_model
from randlora.convert import to_lora
from tuner.helpers import assert_close, layers_of, randomise
from tuner.layers.test_read_weight import MODELS, first
from tuner.test_experts import qwen3

DIM = 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.head = nn.Linear(DIM, 3)

    def forward(self, x):
        return self.head(self.attn(x, x, x)[0])


class Encoder(nn.Module):
    def __init__(self, kind=nn.TransformerEncoderLayer, **options):
        super().__init__()
        self.block = kind(DIM, 2, 16, **{"batch_first": True, **options})

    def forward(self, x):
        return self.block(x) if isinstance(self.block, nn.TransformerEncoderLayer) else self.block(x, x)


class Louder(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Mixed(nn.Module):
    """An embedding, a convolution, and linear layers with a forward, a computed weight and codes of their own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, DIM)
        self.conv = nn.Conv1d(DIM, DIM, 3, padding=1)
        self.louder = Louder(DIM, DIM)
        self.normed = weight_norm(nn.Linear(DIM, DIM))
        self.coded = bnb.nn.Linear4bit(DIM, DIM, compute_dtype=torch.float32)
        self.coded.support_avx512bf16_for_cpu = False  # on CPUs that have it, it computes in bf16, and not at this size
        self.coded.to("cpu")

    def forward(self, x):
        ids = (x[..., 0].abs() * 10).long() % 11
        x = torch.tanh(self.conv((self.embed(ids) + x).mT).mT)
        for layer in (self.louder, self.normed, self.coded):
            x = torch.tanh(layer(x))
        return x


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        return self.called(nn.functional.linear(x.to(self.called.weight.dtype), self.read.weight))


def x():
    return torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(5))


def built(build):
    torch.manual_seed(0)
    return build().eval()


def adapted(base, targets=(), parameters=None):
    config = RandLoraConfig(r=2, target_modules=list(targets), target_parameters=parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomise(get_peft_model(base, config)).eval()


def lora_of(model, base, folder):
    to_lora(model, energy=1.0).save(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # PEFT's attention has two LoRAs
        return PeftModel.from_pretrained(base, folder).eval()


CONVERTED = {
    "linear of a decoder block": (lambda: Encoder(nn.TransformerDecoderLayer), ["linear1", "linear2"], None),
    "block that calls, sequence first": (lambda: Encoder(batch_first=False), ["linear1", "linear2"], None),
    "block that calls, activation": (lambda: Encoder(activation=torch.tanh), ["linear1", "linear2"], None),
    "forward of its own": (Mixed, ["louder"], None),
    "computed weight": (Mixed, ["normed"], None),
    "quantised": (Mixed, ["coded"], None),
    "weight of a linear layer": (Attention, [], ["head.weight"]),
    "projections of attention": (Attention, [], ["attn.in_proj_weight"]),
}
REFUSED = {
    "output of attention": (Attention, ["out_proj"], None, "attn.out_proj"),
    "all of attention": (Attention, ["out_proj"], ["attn.in_proj_weight"], "attn.base_layer.out_proj"),
    "linear1": (Encoder, ["linear1"], None, "block.linear1"),
    "linear2": (Encoder, ["linear2"], None, "block.linear2"),
    "output in a block": (Encoder, ["out_proj"], None, "block.self_attn.out_proj"),
    "projections in a block": (Encoder, [], ["self_attn.in_proj_weight"], "block.self_attn"),
    "parameter in a block": (Encoder, [], ["linear1.weight"], "block.linear1"),
    "embedding": (Mixed, ["embed"], None, "embed"),
    "convolution": (Mixed, ["conv"], None, "conv"),
    "with one that can": (Mixed, ["louder", "embed"], None, "embed"),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("build", "targets", "parameters"), CONVERTED.values(), ids=CONVERTED)
def test_the_lora_computes_what_the_adapter_computes(build, targets, parameters, grad, tmp_path):
    base = built(build)
    model = adapted(copy.deepcopy(base), targets, parameters)
    lora = lora_of(model, copy.deepcopy(base), tmp_path)
    with torch.set_grad_enabled(grad):
        expected, plain = model(x()).detach(), base(x()).detach()
        assert (expected - plain).norm() > 0.01 * plain.norm()
        assert_close(lora(x()).detach() - plain, expected - plain, 1e-3)


@pytest.mark.parametrize(("build", "targets", "parameters", "name"), REFUSED.values(), ids=REFUSED)
def test_what_no_lora_can_do_is_refused_by_name(build, targets, parameters, name):
    model = adapted(built(build), targets, parameters)
    with pytest.raises(UnsupportedLayerError, match=rf"'{re.escape(name)}', a .*, cannot be converted to LoRA"):
        to_lora(model, energy=1.0)
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, 2)


@pytest.mark.parametrize("case", ["output of attention", "linear1", "linear2", "output in a block"])
def test_a_lora_has_no_effect_where_it_is_refused(case):
    """The reason that is given, tried with PEFT's LoRA alone."""
    build, targets, _, _ = REFUSED[case]
    base = built(build)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    lora = peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        assert torch.equal(lora(x()), base(x()))


@pytest.mark.parametrize("case", ["weight of a linear layer", "projections of attention"])
def test_what_peft_cannot_convert_is_not_offered_to_it(case):
    """Its config would name no targets, so that its LoRA could not be loaded."""
    build, targets, parameters = CONVERTED[case]
    model = adapted(built(build), targets, parameters)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, 2)


def test_experts_are_refused():
    model = adapted(qwen3(), [], ["mlp.experts.gate_up_proj"])
    with pytest.raises(UnsupportedLayerError, match="only the weights of linear layers can be converted"):
        to_lora(model, rank=2)


class TestReaders:
    """Modules of others that compute with a weight: known once they have done so."""

    @pytest.mark.parametrize("grad", [False, True])
    def test_a_weight_that_was_read_is_refused(self, grad):
        model = adapted(built(Reader), ["read", "called"])
        with torch.set_grad_enabled(grad):
            model(x())
        with pytest.raises(UnsupportedLayerError, match="'read', a Linear, cannot be converted to LoRA"):
            to_lora(model, rank=2)
        assert {name: layer.read_by_parent for name, layer in layers_of(model.get_base_model()).items()} == {
            "read": True,
            "called": False,  # its dtype was read
        }

    def test_looking_at_a_weight_refuses_nothing(self):
        model = adapted(built(Reader), ["called"])
        (model.get_base_model().called.weight + 1).sum()
        assert len(to_lora(model, rank=2).layers) == 1

    @pytest.mark.parametrize(
        ("name", "targets", "refused"),
        [
            ("wavlm", ["q_proj"], True),
            ("wavlm", ["intermediate_dense"], False),
            ("mamba", ["dt_proj"], True),
            ("mamba", ["in_proj"], False),
            ("bloom", ["dense"], True),
            ("deberta", ["in_proj"], False),
            ("t5", ["wo", "q"], False),
        ],
    )
    def test_models_of_transformers(self, name, targets, refused, tmp_path):
        build, _, batch = MODELS[name]
        base = built(build)
        model = adapted(copy.deepcopy(base), targets)
        with torch.no_grad():
            plain, expected = first(base(**batch())), first(model(**batch()))
        if refused:
            with pytest.raises(UnsupportedLayerError, match="the module around it computes with its weight"):
                to_lora(model, energy=1.0)
            for layer in layers_of(model).values():
                layer.read_by_parent = False
        lora = lora_of(model, copy.deepcopy(base), tmp_path)
        with torch.no_grad():
            found = first(lora(**batch()))
        wrong = ((found - expected).norm() / (expected - plain).norm()).item()
        assert wrong > 0.1 if refused else wrong < 1e-2
