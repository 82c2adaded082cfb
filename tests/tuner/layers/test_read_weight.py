"""Weights that a model reads past the forward of their layers: they are W + ΔW, and gradients reach λ and γ."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from randlora import AdapterNamesError, MergeError, PeftModel, RandLoraConfig, UnsupportedLayerError, get_peft_model
from randlora.tuner.layers.base import RandLoraLayer
from randlora.tuner.layers.read_weight import AdaptedWeight

from ..helpers import assert_close, layers_of, llama, ours, randomise, tokens

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"intermediate_size": 28, "num_attention_heads": 2, "num_key_value_heads": 1}
LINEAR = {f"linear_num_{name}_heads": 2 for name in ("key", "value")} | {
    f"linear_{name}_head_dim": 8 for name in ("key", "value")
}


def jamba():
    experts = {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2}
    attention = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}
    config = transformers.JambaConfig(**SIZES, **HEADS, **experts, **attention, use_mamba_kernels=False)
    return transformers.JambaForCausalLM(config)


def qwen3_next():
    layers = ["linear_attention", "full_attention"]
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 12}
    config = transformers.Qwen3NextConfig(
        **SIZES, **HEADS, **LINEAR, **experts, head_dim=8, layer_types=layers, shared_expert_intermediate_size=12
    )
    return transformers.Qwen3NextForCausalLM(config)


def wavlm():
    dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop")
    config = transformers.WavLMConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=28,
        conv_dim=(8, 8),
        conv_stride=(4, 2),
        conv_kernel=(8, 4),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        **dict.fromkeys(dropouts, 0.0),
    )
    return transformers.WavLMModel(config)


def bloom():
    config = transformers.BloomConfig(
        vocab_size=50, hidden_size=16, n_layer=2, n_head=2, pretraining_tp=2, slow_but_exact=True, pad_token_id=0
    )
    return transformers.BloomForCausalLM(config)


def deberta():
    config = transformers.DebertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=28,
        relative_attention=True,
        max_relative_positions=8,
        pos_att_type=["c2p", "p2c"],
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    return transformers.DebertaForMaskedLM(config)


def clip():
    sizes = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 50, "max_position_embeddings": 10, "eos_token_id": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def t5(**changes):
    sizes = {"vocab_size": 50, "d_model": 16, "d_ff": 28, "num_layers": 2, "num_heads": 2, "d_kv": 8}
    config = transformers.T5Config(**{**sizes, "dropout_rate": 0.0, "decoder_start_token_id": 0, **changes})
    return transformers.T5ForConditionalGeneration(config)


def whisper():
    sizes = {f"{part}_{what}": value for part in ("encoder", "decoder") for what, value in WHISPER.items()}
    config = transformers.WhisperConfig(
        **sizes,
        vocab_size=50,
        d_model=16,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=10,
        dropout=0.0,
        **{f"{name}_token_id": i for i, name in enumerate(("pad", "decoder_start", "bos", "eos"))},
    )
    return transformers.WhisperModel(config)


WHISPER = {"layers": 1, "attention_heads": 2, "ffn_dim": 28}


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def words():
    return {"input_ids": tokens()}


MODELS = {
    "mamba": (
        lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, state_size=4)),
        ["dt_proj", "in_proj"],
        words,
    ),
    "falcon_mamba": (
        lambda: transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**SIZES, state_size=4)),
        ["dt_proj"],
        words,
    ),
    "jamba": (jamba, "all-linear", words),
    "lfm2": (
        lambda: transformers.Lfm2ForCausalLM(
            transformers.Lfm2Config(**SIZES, **HEADS, full_attn_idxs=[1], block_multiple_of=4)
        ),
        ["conv.conv", "q_proj"],
        words,
    ),
    "qwen3_next": (qwen3_next, ["conv1d", "q_proj"], words),
    "recurrent_gemma": (
        lambda: transformers.RecurrentGemmaForCausalLM(
            transformers.RecurrentGemmaConfig(
                **{**SIZES, "num_hidden_layers": 3}, intermediate_size=28, num_attention_heads=2, lru_width=16
            )
        ),
        ["conv_1d", "q_proj"],
        words,
    ),
    "bloom": (bloom, ["dense", "dense_4h_to_h"], words),
    "deberta": (deberta, ["in_proj", "rel_embeddings", "word_embeddings"], words),
    "wavlm": (wavlm, ["q_proj", "v_proj"], lambda: {"input_values": numbers(2, 200)}),
    "clip": (
        clip,
        ["position_embedding", "patch_embedding"],
        lambda: {"input_ids": tokens(), "pixel_values": numbers(3, 3, 8, 8)},
    ),
    "t5": (t5, ["wo", "q"], lambda: {"input_ids": tokens(), "decoder_input_ids": tokens()}),
    "whisper": (
        whisper,
        ["conv1", "conv2", "encoder.embed_positions"],
        lambda: {"input_features": numbers(3, 8, 20), "decoder_input_ids": tokens()},
    ),
}


def first(output):
    return next(value for value in output.values() if isinstance(value, torch.Tensor) and value.is_floating_point())


class Real:
    """A model of Transformers, adapted, and one whose weights are W + ΔW."""

    def __init__(self, name):
        build, targets, batch = MODELS[name]
        torch.manual_seed(0)
        self.base = build().eval()
        self.batch = batch()
        config = RandLoraConfig(r=4, randlora_alpha=8, target_modules=targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # small ranks
            self.adapted = randomise(get_peft_model(copy.deepcopy(self.base), config), scale=0.1).eval()
        self.layers = layers_of(self.adapted.get_base_model())
        self.dense = copy.deepcopy(self.base)
        for path, layer in self.layers.items():
            module = self.dense.get_submodule(path)
            module.weight = nn.Parameter(module.weight.detach() + layer.get_delta_weight("default").detach())

    def output(self, model):
        return first(model(**self.batch))


@pytest.mark.parametrize("name", MODELS)
class TestTransformersModels:
    def test_output_and_merging(self, name):
        model = Real(name)
        expected = model.output(model.dense).detach()
        assert_close(model.output(model.adapted).detach(), expected, 1e-5)
        with torch.no_grad():
            assert_close(model.output(model.adapted), expected, 1e-5)
            with model.adapted.disable_adapter():
                assert_close(model.output(model.adapted), model.output(model.base), 1e-6)
        model.adapted.merge_adapter()
        assert_close(model.output(model.adapted).detach(), expected, 1e-5)

    def test_gradients(self, name):
        model = Real(name)
        model.adapted.train()
        y, other = model.output(model.adapted), model.output(model.dense.train())
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        (y * direction).sum().backward()
        (other * direction).sum().backward()
        for path, layer in model.layers.items():
            parameters = [layer.randlora_lambda["default"], layer.randlora_gamma["default"]]
            by_weight = model.dense.get_submodule(path).weight.grad
            assert by_weight.abs().max() > 1e-6, path
            expected = torch.autograd.grad(layer.get_delta_weight("default"), parameters, by_weight)
            for parameter, gradient in zip(parameters, expected, strict=True):
                assert_close(parameter.grad, gradient, 2e-4, path)


class Reader(nn.Module):
    """Calls none of its layers."""

    def __init__(self):
        super().__init__()
        self.proj, self.conv, self.rows = nn.Linear(10, 8), nn.Conv1d(8, 8, 3, groups=8), nn.Embedding(6, 8)

    def forward(self, x):
        x = F.linear(x, self.proj.weight, self.proj.bias) @ self.rows.weight.t()
        x = F.conv1d((x @ self.rows.weight).mT, self.conv.weight, self.conv.bias, groups=8)
        return x * self.conv.weight.squeeze(1).sum(-1, keepdim=True)


READ = ["proj", "conv", "rows"]


def x(dtype=torch.float32):
    return numbers(2, 5, 10).to(dtype)


def reader(dtype=torch.float32, **config):
    torch.manual_seed(0)
    values = {"r": 3, "randlora_alpha": 6, "target_modules": READ, **config}
    return randomise(get_peft_model(Reader().to(dtype), RandLoraConfig(**values)))


def dense(model, *adapters):
    plain = Reader().to(next(model.parameters()).dtype)
    for name in READ:
        layer = model.get_base_model().get_submodule(name)
        getattr(plain, name).load_state_dict(layer.base_layer.state_dict())
        with torch.no_grad():
            for adapter in adapters or ("default",):
                getattr(plain, name).weight += layer.get_delta_weight(adapter)
    return plain


class TestReader:
    @pytest.mark.parametrize("grad", [True, False])
    def test_several_adapters(self, grad):
        model = reader()
        model.add_adapter("other", RandLoraConfig(r=2, target_modules=READ))
        randomise(model, "other", seed=8)
        for active in (["default"], ["other"], ["default", "other"]):
            model.base_model.set_adapter(active)
            with torch.set_grad_enabled(grad):
                assert_close(model(x()).detach(), dense(model, *active)(x()).detach(), 1e-5, str(active))

    def test_second_derivatives(self):
        model = reader().double()
        parameters = [p for p in model.parameters() if p.requires_grad]

        def second(output):
            grads = torch.autograd.grad(output.square().sum(), parameters, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in grads), parameters)

        found = second(model(x(torch.float64)))
        layers = [model.get_base_model().get_submodule(name) for name in READ]
        weights = {
            f"{name}.weight": layer.base_layer.weight + layer.get_delta_weight("default")
            for name, layer in zip(READ, layers, strict=True)
        }
        expected = second(torch.func.functional_call(dense(model), weights, (x(torch.float64),)))
        for gradient, other in zip(found, expected, strict=True):
            assert_close(gradient, other, 1e-8)

    def test_hooks_of_the_parameters_run_once(self):
        model, plain = reader(), reader()
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.register_hook(lambda gradient: 2 * gradient)
        for each in (model, plain):
            each(x()).square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            if p.requires_grad:
                assert_close(p.grad, 2 * q.grad, 1e-5, name)

    def test_a_base_weight_that_trains_gets_its_gradient(self):
        model = reader()
        plain = dense(model)
        for name in READ:
            model.get_base_model().get_submodule(name).base_layer.weight.requires_grad_(True)
        model(x()).square().sum().backward()
        plain(x()).square().sum().backward()
        for name in READ:
            found = model.get_base_model().get_submodule(name).base_layer.weight.grad
            assert_close(found, getattr(plain, name).weight.grad, 1e-5, name)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, reentrant):
        model, plain = reader(), reader()
        checkpoint(model, x().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
        plain(x()).square().sum().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            if p.requires_grad:
                assert_close(p.grad, q.grad, 1e-5)

    def test_autocast(self):
        model, plain = reader(), reader()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x())
        y.float().square().sum().backward()
        plain(x()).square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            if p.requires_grad:
                assert p.grad.dtype == torch.float32
                assert_close(p.grad, q.grad, 5e-2, name)

    def test_half_precision(self):
        model = reader(torch.bfloat16)
        found = model.get_base_model().proj.weight
        layer = model.get_base_model().proj
        expected = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
        assert found.dtype == torch.bfloat16
        assert_close(found.double().detach(), expected.detach(), 4e-3)

    def test_compiled(self):
        model = reader()
        torch._dynamo.reset()
        compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
        compiled(x()).square().sum().backward()
        plain = reader()
        plain(x()).square().sum().backward()
        assert_close(compiled(x()).detach(), plain(x()).detach(), 1e-5)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            if p.requires_grad:
                assert_close(p.grad, q.grad, 1e-4)

    def test_a_compiled_function_takes_what_was_read(self):
        layer = reader().get_base_model().proj
        torch._dynamo.reset()
        found = torch.compile(F.linear, backend="aot_eager")(x(), layer.weight)
        found.sum().backward()
        assert_close(found.detach(), F.linear(x(), dense_weight(layer)), 1e-5)
        assert layer.randlora_lambda["default"].grad.abs().sum() > 0

    def test_transforms(self):
        model = reader()
        parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

        def loss(values, one):
            return torch.func.functional_call(model, values, (one[None],)).square().sum()

        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x())
        for i, one in enumerate(x()):
            model.zero_grad()
            model(one[None]).square().sum().backward()
            for name, p in model.named_parameters():
                if p.requires_grad:
                    assert_close(found[name][i], p.grad, 1e-4, name)

    def test_traced_and_exported(self):
        model = reader().eval()
        expected = model(x()).detach()
        with torch.no_grad():
            traced = torch.jit.trace(model.get_base_model(), x())
            assert_close(traced(x()), expected, 1e-5)
            program = torch.export.export(model.get_base_model(), (x(),))
            assert_close(program.module()(x()), expected, 1e-5)


def dense_weight(layer):
    return (layer.get_base_layer().weight + layer.get_delta_weight("default")).detach()


class TestStandIn:
    def test_it_is_not_computed_for_its_properties(self, monkeypatch):
        layer = reader().get_base_model().proj
        monkeypatch.setattr(type(layer), "get_delta_weight", None)
        weight = layer.weight
        assert isinstance(weight, AdaptedWeight)
        assert (weight.dtype, weight.device, weight.shape) == (torch.float32, torch.device("cpu"), (8, 10))
        assert weight.requires_grad
        assert (weight.numel(), weight.size(0), weight.ndim, weight.is_floating_point()) == (80, 8, 2, True)

    def test_it_is_the_parameter_where_no_adapter_changes_it(self):
        model = reader()
        layer = model.get_base_model().proj
        with model.disable_adapter():
            assert layer.weight is layer.base_layer.weight
        model.merge_adapter()
        assert layer.weight is layer.base_layer.weight
        with model.disable_adapter():
            assert layer.weight is layer.base_layer.weight
            assert not layer.merged

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize(
        "write",
        [
            lambda w: w.mul_(2),
            lambda w: w.data.mul_(2),
            lambda w: w.data.copy_(torch.zeros(8, 10)),
            lambda w: setattr(w, "data", torch.zeros(8, 10)),
            lambda w: w[0].zero_(),
            lambda w: w.view(-1)[3:].fill_(0),
            lambda w: w.__setitem__(0, 0),
            nn.init.normal_,
            lambda w: torch.add(x()[0, 0], 1, out=w.detach()),
            lambda w: w.requires_grad_(False),
            lambda w: setattr(w, "requires_grad", True),
        ],
    )
    def test_writing_is_refused(self, write, grad):
        layer = reader().get_base_model().proj
        before = dense_weight(layer)
        with torch.set_grad_enabled(grad), pytest.raises((UnsupportedLayerError, RuntimeError)) as caught:
            write(layer.weight)
        if not grad:
            assert "of its `base_layer`" in str(caught.value)
        assert torch.equal(dense_weight(layer), before)

    def test_copies_are_plain_numbers(self):
        layer = reader().get_base_model().proj
        with torch.no_grad():
            for copied in (layer.weight.clone(), pickle.loads(pickle.dumps(layer.weight)), copy.deepcopy(layer.weight)):
                assert type(copied) is torch.Tensor
                assert_close(copied, dense_weight(layer), 1e-6)
            assert layer.weight.data_ptr() != 0

    def test_a_read_weight_that_is_saved_for_the_backward_tells_of_changes(self):
        layer = reader().get_base_model().proj
        loss = F.linear(x(), layer.weight).sum()
        with torch.no_grad():
            layer.randlora_lambda["default"].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class TestRefusals:
    def test_rows_of_several_adapters(self):
        model = reader().eval()
        model.add_adapter("other", RandLoraConfig(r=2, target_modules=["proj"]))
        with pytest.raises(AdapterNamesError, match=r"'default', 'other' is named or active and adapts 'proj'"):
            model(x(), adapter_names=["__base__", "other"])
        with pytest.raises(AdapterNamesError, match="'default' is named or active and adapts"):
            model(x(), adapter_names=["__base__", "__base__"])
        model.merge_adapter()
        with pytest.raises(AdapterNamesError, match="adapts 'proj'"):
            model(x(), adapter_names=["__base__", "other"])
        model.unmerge_adapter()
        assert_close(model(x()).detach(), dense(model)(x()).detach(), 1e-5)

    def test_dropout(self):
        model = reader(randlora_dropout=0.5)
        with pytest.raises(UnsupportedLayerError, match=r"'proj' past its forward.*randlora_dropout.*'default'"):
            model.train()(x())
        assert_close(model.eval()(x()).detach(), dense(model)(x()).detach(), 1e-5)

    def test_dropout_of_a_layer_whose_dtype_alone_is_read(self):
        """As T5 does with ``wo``."""
        torch.manual_seed(0)
        config = RandLoraConfig(r=4, target_modules=["wo"], randlora_dropout=0.5)
        model = get_peft_model(t5(), config).train()
        model(input_ids=tokens(), decoder_input_ids=tokens()).logits.sum().backward()

    def test_offloaded(self):
        layer = reader().get_base_model().proj
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to("meta"), requires_grad=False)
        with pytest.raises(UnsupportedLayerError, match="'proj' is offloaded"):
            F.linear(x(), layer.weight)

    def test_a_quantised_weight_is_its_codes(self):
        bnb = pytest.importorskip("bitsandbytes")
        layer = ours(nn.Sequential(bnb.nn.Linear8bitLt(16, 24, has_fp16_weights=False)), target_modules=["0"]).model[0]
        assert layer.weight is layer.base_layer.weight


class TestTying:
    @pytest.mark.parametrize("merged", [True, False])
    @pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="-".join)
    def test_tying_again_changes_nothing(self, targets, merged):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, about tied layers
            model = get_peft_model(llama(tie_word_embeddings=True), RandLoraConfig(r=4, target_modules=targets))
        randomise(model).eval()
        expected = model(input_ids=tokens()).logits.detach()
        if merged:
            model.merge_adapter()
        if merged and "lm_head" in targets:
            with pytest.raises(MergeError, match="unmerge_adapter"):
                model.tie_weights()
        else:
            model.tie_weights()
        assert_close(model(input_ids=tokens()).logits.detach(), expected, 1e-5)
        if merged:
            model.unmerge_adapter()
        base = model.get_base_model()
        inside = [getattr(m, "base_layer", m) for m in (base.get_input_embeddings(), base.get_output_embeddings())]
        assert inside[0].weight is inside[1].weight

    def test_a_weight_that_is_set_is_that_of_the_base_layer(self):
        layer = reader().get_base_model().proj
        layer.weight = nn.Parameter(torch.zeros(8, 10), requires_grad=False)
        assert not layer.base_layer.weight.any()
        assert "weight" not in layer._parameters
        assert_close(layer.weight.detach().clone(), layer.get_delta_weight("default").detach(), 1e-6)


class TestUnused:
    def step(self, model, **batch):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(2):
            first(model(**batch)).square().sum().backward()
            optimizer.step()

    def test_the_first_step_names_what_was_passed_over(self):
        torch.manual_seed(0)
        model = get_peft_model(t5(), RandLoraConfig(r=4, target_modules=["shared", "q"]))
        with pytest.warns(UserWarning, match="neither called nor read") as caught:
            self.step(model, input_ids=tokens(), decoder_input_ids=tokens())
        said = [str(w.message) for w in caught if "neither called nor read" in str(w.message)]
        assert len(said) == 1
        assert ": shared. " in said[0]
        for other in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
            assert other in said[0]

    def test_also_where_only_other_parameters_train(self):
        torch.manual_seed(0)
        config = RandLoraConfig(r=4, target_modules=["shared"], modules_to_save=["final_layer_norm"])
        with pytest.warns(UserWarning, match="neither called nor read these adapted layers: shared"):
            self.step(get_peft_model(t5(), config), input_ids=tokens(), decoder_input_ids=tokens())

    @pytest.mark.parametrize("name", ["wavlm", "lfm2"])
    def test_nothing_is_said_of_layers_that_are_read(self, name):
        model = Real(name)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*neither called nor read")
            self.step(model.adapted.train(), **model.batch)

    def test_an_adapter_that_does_not_train_is_nobodys_business(self, tmp_path):
        torch.manual_seed(0)
        get_peft_model(t5(), RandLoraConfig(r=4, target_modules=["shared", "q"])).save_pretrained(tmp_path)
        PeftModel.from_pretrained(t5(), tmp_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*neither called nor read")
            plain = llama()
            optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
            plain(input_ids=tokens()).logits.sum().backward()
            optimizer.step()


def test_a_parameter_of_a_wrapped_module_is_read_with_its_update():
    encoder = nn.MultiheadAttention(8, 2)
    wrapper = randomise(
        ours(nn.Sequential(encoder), r=4, target_modules=[], target_parameters=["0.in_proj_weight"])
    ).model[0]
    assert isinstance(wrapper, RandLoraLayer)
    wrapper.in_proj_weight.square().sum().backward()
    expected = (encoder.in_proj_weight + wrapper.get_delta_weight("default")).detach().requires_grad_()
    assert_close(wrapper.in_proj_weight.detach().clone(), expected.detach(), 1e-6)
    gradient = torch.autograd.grad(
        wrapper.get_delta_weight("default"), wrapper.randlora_lambda["default"], 2 * expected.detach()
    )[0]
    assert_close(wrapper.randlora_lambda["default"].grad, gradient, 1e-5)
