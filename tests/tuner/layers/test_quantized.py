"""Quantised base layers: real ones of bitsandbytes, and what a layer of any kind must have."""

import copy
import warnings
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from randlora import (
    Linear4bit,
    Linear8bitLt,
    MergeError,
    PeftModel,
    QuantizedLinear,
    RandLoraConfig,
    get_peft_model,
)

from ..contract import Contract
from ..helpers import (
    LLAMA_TARGETS,
    assert_close,
    assert_same_tensors,
    layers_of,
    llama,
    ours,
    randomise,
    tokens,
)


class QuantizedContract(Contract):
    """A subclass quantises a float layer, and reads a quantised one, without the code under test."""

    dtypes = (torch.float32, torch.bfloat16)
    judge = torch.float32
    requantises = True
    code_tolerance = 2e-3  # one code or two of the whole matrix

    def quantise(self, layer, dtype):
        """What the kind makes of a layer of floating point numbers."""
        raise NotImplementedError

    def wrapped(self, dtype=torch.float32):
        torch.manual_seed(0)
        out_features, in_features = self.shape
        return nn.Sequential(self.quantise(nn.Linear(in_features, out_features).to(dtype).requires_grad_(False), dtype))

    def input(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(2)
        return torch.randn(2, 3, self.shape[1], generator=generator).to(dtype)

    def apply(self, base, x, weight):
        bias = None if base.bias is None else base.bias.detach().double()
        return F.linear(x.double(), weight, bias)

    def merged_weight(self, layer, *adapters):
        dense = self.weight(layer.get_base_layer())
        exact = super().merged_weight(layer, *adapters).to(dense.dtype)
        fresh = nn.Linear(self.shape[1], self.shape[0], bias=False, dtype=dense.dtype)
        fresh.weight.data = exact
        return self.weight(self.quantise(fresh, dense.dtype)).double()

    def loadable(self, state):
        return {name: value for name, value in state.items() if "randlora_" in name}  # bitsandbytes has its own way

    def test_the_warning_measures_the_rounding(self):
        layer = self.layer()
        before, update = self.weight(layer.get_base_layer()), layer.get_delta_weight("default").detach()
        with pytest.warns(UserWarning, match=r"quantising the sum again changes it by") as caught:
            layer.merge()
        error = (self.weight(layer.get_base_layer()).float() - (before + update).float()).norm()
        assert f"{error / (before + update).norm():.2%} of the weight" in str(caught[0].message)
        assert f"{error / update.norm():.1%} of the update" in str(caught[0].message)

    def test_one_warning_for_a_whole_model(self):
        wrapped = self.wrapped()
        wrapped.append(self.wrapped()[0])
        model = randomise(ours(wrapped, r=4, target_modules=["0", "1"]))
        with pytest.warns(UserWarning, match="2 quantised layers, at worst") as caught:
            model.merge_adapter()
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.unmerge_adapter()

    def test_trains_as_well_after_evaluation(self):
        layer, x = self.layer(), self.input()
        layer.eval()
        with torch.no_grad():
            evaluated = layer(x)
        layer.train()
        x.requires_grad_()
        y = layer(x)
        assert_close(evaluated, y.detach(), self.eval_tolerance)
        y.sum().backward()
        total = self.weight(layer.get_base_layer()).double() + self.update(layer)
        assert_close(x.grad, total.sum(0).expand_as(x), self.eval_tolerance)

    eval_tolerance = 1e-5


def linear_4bit(layer, dtype, **config):
    quantised = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype, **config
    )
    quantised.load_state_dict(layer.state_dict())
    return quantised.to("cpu")


class Linear4bitContract(QuantizedContract):
    kind = Linear4bit

    def weight(self, base):
        return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)


class TestTallNf4(Linear4bitContract):
    shape = (96, 64)

    def quantise(self, layer, dtype):
        return linear_4bit(layer, dtype, quant_type="nf4", compress_statistics=True)


class TestWideFp4OfOddSizes(Linear4bitContract):
    shape = (13, 22)

    def quantise(self, layer, dtype):
        return linear_4bit(layer, dtype, quant_type="fp4", compress_statistics=False)


class TestInt8(QuantizedContract):
    kind = Linear8bitLt
    shape = (33, 20)
    eval_tolerance = 2e-2  # evaluation rounds the input to int8 too

    def quantise(self, layer, dtype):
        quantised = bnb.nn.Linear8bitLt(
            layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False
        )
        quantised.load_state_dict(layer.state_dict())
        return quantised.to("cpu")

    def weight(self, base):
        scale = base.state.SCB if base.weight.SCB is None else base.weight.SCB
        return base.weight.data * scale[:, None] / 127


class TestTorchao(QuantizedContract):
    kind = QuantizedLinear
    shape = (24, 40)

    def wrapped(self, dtype=torch.float32):
        model = super().wrapped(dtype)
        # as Transformers leaves it on a model that it has loaded with a TorchAoConfig
        model.hf_quantizer = SimpleNamespace(quantization_config=TorchAoConfig(self.torchao().Int8WeightOnlyConfig()))
        return model

    def torchao(self):
        return pytest.importorskip("torchao.quantization")

    def quantise(self, layer, dtype):
        self.torchao().quantize_(layer, self.torchao().Int8WeightOnlyConfig())
        return layer

    def weight(self, base):
        return base.weight.dequantize()

    def snapshot(self, layer):
        state = dict(layer.state_dict())
        weight = state.pop("base_layer.weight")
        return copy.deepcopy(state | {"codes": weight.qdata, "scale": weight.scale})

    @pytest.mark.parametrize("duplicate", [copy.deepcopy])  # torchao's own layers cannot be pickled
    def test_copies_share_the_bases_and_nothing_else(self, duplicate):
        super().test_copies_share_the_bases_and_nothing_else(duplicate)

    def test_without_the_config_it_runs_and_refuses_to_merge(self):
        model = ours(nn.Sequential(self.wrapped()[0]), r=4, target_modules=["0"])
        layer, x = randomise(model).model[0], self.input()
        assert_close(layer(x).detach(), self.expected(layer, x), 1e-5)
        with pytest.raises(MergeError, match="torchao, outside of Transformers,"):
            layer.merge()


class TestHqq(QuantizedContract):
    kind = QuantizedLinear
    shape = (24, 64)

    def quantise(self, layer, dtype):
        hqq = pytest.importorskip("hqq.core.quantize")
        config = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
        return hqq.HQQLinear(layer, config, compute_dtype=dtype, device="cpu")

    def weight(self, base):
        return base.dequantize()


class TestLimits:
    def test_a_value_that_int8_cannot_scale_is_refused(self):
        layer = TestInt8().layer()
        before = copy.deepcopy(layer.state_dict())
        layer.scaling["default"] = 1e7
        with pytest.raises(MergeError, match="bnb 8bit cannot hold"):
            layer.merge()
        assert not layer.merged
        assert_same_tensors(layer.state_dict(), before)

    @pytest.mark.parametrize("nested", [True, False])
    def test_a_layer_that_was_evaluated_before_it_was_adapted(self, nested):
        torch.manual_seed(0)
        base = linear_4bit(nn.Linear(128, 64), torch.float32, quant_type="nf4", compress_statistics=nested)
        dense = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).clone()
        base.requires_grad_(False).eval()(torch.randn(3, 128))  # packs the weight, on some CPUs
        layer = randomise(ours(nn.Sequential(base), r=4, target_modules=["0"])).model[0].train()
        x = torch.randn(3, 128, requires_grad=True)
        layer(x).sum().backward()
        total = dense + layer.get_delta_weight("default").detach()
        assert_close(x.grad, total.sum(0).expand_as(x), 1e-2)
        assert_close(layer.merged_weight([]), dense, 1e-2)

    def quant_linear(self):
        class QuantLinear(nn.Module):
            """As those of GPTQ and AWQ: integers in ``qweight``, no ``weight``."""

            def __init__(self):
                super().__init__()
                self.in_features, self.out_features, self.bias = 12, 9, None
                self.register_buffer("qweight", torch.randint(-8, 8, (9, 12), dtype=torch.int32))

            def forward(self, x):
                return F.linear(x, self.qweight.to(x.dtype) / 16)

        return QuantLinear()

    def test_a_kind_that_only_runs_forward_is_adapted_and_refuses_to_merge(self):
        model = randomise(ours(nn.Sequential(self.quant_linear()), r=4, target_modules=["0"]))
        layer, x = model.model[0], torch.randn(3, 12)
        assert type(layer) is QuantizedLinear
        weight = layer.get_base_layer().qweight / 16
        assert_close(layer(x).detach(), F.linear(x, weight + layer.get_delta_weight("default").detach()), 1e-5)
        with pytest.raises(MergeError, match="QuantLinear cannot be merged"):
            model.merge_adapter()
        assert not layer.merged

    def test_a_weight_of_eight_bit_floats_is_one_too(self):
        base = nn.Linear(12, 9).requires_grad_(False)
        base.weight.data = base.weight.data.to(torch.float8_e4m3fn)
        assert type(ours(nn.Sequential(base), r=4, target_modules=["0"]).model[0]) is QuantizedLinear


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


QLORA = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.mark.parametrize("kind", QLORA)
def test_qlora(kind, saved_llama, tmp_path):
    """Load quantised, prepare, train with checkpointing, save, load, merge and go back."""

    def load():
        return AutoModelForCausalLM.from_pretrained(
            saved_llama, quantization_config=QLORA[kind], device_map="cpu", dtype=torch.float32
        )

    base = prepare_model_for_kbit_training(load())
    model = get_peft_model(base, RandLoraConfig(r=8, randlora_alpha=8, target_modules=LLAMA_TARGETS)).train()
    assert {type(layer) for layer in layers_of(model).values()} == {Linear4bit if kind == "nf4" else Linear8bitLt}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1

    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
        again = PeftModel.from_pretrained(load(), tmp_path).eval()
        assert_close(again(input_ids=tokens()).logits, expected, 1e-4)
        state = copy.deepcopy(again.state_dict())
        with pytest.warns(UserWarning, match="14 quantised layers"):
            again.merge_adapter()
        merged = again(input_ids=tokens()).logits
        assert not torch.equal(merged, expected)
        assert_close(merged, expected, 0.5)
        again.unmerge_adapter()
        assert_same_tensors(again.state_dict(), state)
        assert_close(again(input_ids=tokens()).logits, expected, 1e-4)
