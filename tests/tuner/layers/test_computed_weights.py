"""Weights that a base layer computes from other parameters: adapted as they are, and merged into by nobody."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from randlora import MergeError, RandLoraConfig, UnsupportedLayerError, get_peft_model
from randlora.convert import save_merged, to_lora
from randlora.tuner.layers.checksum import checksum

from ..helpers import assert_close, assert_same_tensors, layers_of, randomise, snapshot

WAYS = {
    "weight_norm": (parametrizations.weight_norm, lambda layer: parametrize.remove_parametrizations(layer, "weight")),
    "spectral_norm": (
        parametrizations.spectral_norm,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
    "orthogonal": (parametrizations.orthogonal, lambda layer: parametrize.remove_parametrizations(layer, "weight")),
    "weight_norm by hook": (weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm by hook": (spectral_norm, nn.utils.remove_spectral_norm),
    "pruning": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.4),
        lambda layer: prune.remove(layer, "weight"),
    ),
}
KINDS = {
    "linear": (lambda: nn.Linear(7, 5), lambda: torch.randn(3, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 6, 5)),
    "embedding": (lambda: nn.Embedding(9, 5), lambda: torch.randint(0, 9, (2, 4))),
}
FUNCTIONS = {
    "linear": F.linear,
    "conv1d": lambda x, weight: F.conv1d(x, weight, padding=1),
    "conv2d": lambda x, weight: F.conv2d(x, weight, groups=2),
    "embedding": F.embedding,
}


def made(way, kind):
    torch.manual_seed(0)
    make, draw = KINDS[kind]
    base = make()
    return WAYS[way][0](base) or base, draw()


def adapted(base, **config):
    model = nn.Sequential(OrderedDict(first=nn.Identity(), layer=base))
    config = {"target_modules": ["layer"], **config}
    return randomise(get_peft_model(model, RandLoraConfig(r=2, randlora_alpha=4, **config)))


def layer_of(model):
    return next(iter(layers_of(model).values()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
class TestEveryWay:
    def test_output_and_gradients(self, way, kind):
        base, x = made(way, kind)
        model = adapted(base).eval()
        twin = made(way, kind)[0].eval()
        layer = layer_of(model)
        for parameter in [*base.parameters(), *twin.parameters()]:
            parameter.requires_grad_()
        y = model(x)
        update = FUNCTIONS[kind](x, layer.get_delta_weight("default"))
        expected = twin(x) + update
        assert_close(y.detach(), expected.detach(), 1e-5)
        with torch.no_grad():
            assert_close(model(x), expected, 1e-5)

        grad = torch.randn_like(y)
        trained = (layer.randlora_lambda["default"], layer.randlora_gamma["default"])
        found = torch.autograd.grad(y, [*trained, *base.parameters()], grad)
        wanted = torch.autograd.grad(expected, [*trained, *twin.parameters()], grad)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other, 1e-5)

    def test_the_weight_is_computed_as_often_as_without_an_adapter(self, way, kind):
        """Spectral norms improve their estimate each time that the weight is read in training."""
        base, x = made(way, kind)
        model = adapted(base).train()
        twin = made(way, kind)[0]
        for _ in range(2):
            twin(x)
            model(x).sum().backward()
        assert_same_tensors(dict(base.state_dict()), dict(twin.state_dict()))

    @pytest.mark.parametrize("safe", [True, False])
    def test_merging_is_refused_before_anything_is_changed(self, way, kind, safe):
        base, x = made(way, kind)
        other = {"embedding": nn.Linear(5, 5), "linear": nn.Linear(5, 5)}.get(kind, nn.Identity())
        before_it = nn.Identity() if kind == "embedding" else nn.Conv1d(4, 4, 1) if kind == "conv1d" else nn.Identity()
        model = nn.Sequential(OrderedDict(before=before_it, layer=base, after=other))
        targets = [name for name, part in model.named_children() if not isinstance(part, nn.Identity)]
        model = randomise(get_peft_model(model, RandLoraConfig(r=2, target_modules=targets))).eval()
        expected, state = model(x).detach(), snapshot(model)
        for merge in (model.merge_adapter, model.merge_and_unload, layers_of(model)["base_model.model.layer"].merge):
            with pytest.raises(MergeError, match=r"'layer', a .*computes its 'weight'.*remove_parametrizations"):
                merge(safe_merge=safe)
            assert not any(layer.merged for layer in layers_of(model).values())
            assert_same_tensors(model.state_dict(), state)
            assert torch.equal(model(x), expected)

    def test_unloading(self, way, kind):
        base, x = made(way, kind)
        expected = base.eval()(x).detach()
        model = adapted(base).unload().eval()
        assert model.layer is base
        assert torch.equal(model(x), expected)

    @pytest.mark.parametrize("frozen", [True, False])  # torch leaves a frozen weight behind as a buffer
    def test_the_way_out(self, way, kind, frozen):
        base, x = made(way, kind)
        base.requires_grad_(not frozen).eval()(x)
        WAYS[way][1](base)
        model = adapted(base).eval()
        before, state = model(x).detach(), snapshot(model)
        assert_close(before, base(x) + FUNCTIONS[kind](x, layer_of(model).get_delta_weight("default")), 1e-5)
        model.merge_adapter()
        assert layer_of(model).merged
        assert_close(model(x).detach(), before, 1e-5)
        model.unmerge_adapter()
        assert_same_tensors(model.state_dict(), state)
        assert_close(model.merge_and_unload()(x).detach(), before, 1e-5)

    def test_computed_only_after_merging(self, way, kind):
        torch.manual_seed(0)
        model = adapted(KINDS[kind][0]())
        model.merge_adapter()
        base = layer_of(model).get_base_layer()
        WAYS[way][0](base)
        with pytest.raises(MergeError, match=r"'layer'.*computes its 'weight'"):
            model.unmerge_adapter()
        merged = layer_of(model)._merged_bits
        WAYS[way][1](base)
        if checksum(base.weight) == merged:
            model.unmerge_adapter()
        else:  # what has computed the weight has changed it for good
            with pytest.raises(MergeError, match=r"'layer'.*was changed while default was merged"):
                model.unmerge_adapter()


class TestTargetParameters:
    @pytest.mark.parametrize("way", ["weight_norm", "spectral_norm", "orthogonal"])
    def test_a_parametrized_one_is_refused(self, way):
        base, x = made(way, "linear")
        model = nn.Sequential(OrderedDict(layer=base)).eval()
        expected, state = model(x).detach(), snapshot(model)
        with pytest.raises(UnsupportedLayerError, match=r"'layer.weight' computes its 'weight'.*remove_param"):
            get_peft_model(model, RandLoraConfig(r=2, target_modules=[], target_parameters=["layer.weight"]))
        assert_same_tensors(model.state_dict(), state)
        assert torch.equal(model(x), expected)

    @pytest.mark.parametrize("way", WAYS)
    def test_one_that_is_computed_later_is_refused_when_run(self, way):
        torch.manual_seed(0)
        base = nn.Linear(7, 5)
        model = adapted(base, target_modules=[], target_parameters=["layer.weight"])
        WAYS[way][0](base)
        with pytest.raises(UnsupportedLayerError, match="computes its 'weight'"):
            model(torch.randn(3, 7))

    @pytest.mark.parametrize("way", WAYS)
    def test_an_embedding_with_a_forward_of_its_own_is_refused(self, way):
        class Offset(nn.Embedding):
            def forward(self, ids):
                return super().forward(ids + 2)

        torch.manual_seed(0)
        base = Offset(9, 5)
        model = adapted(WAYS[way][0](base) or base)
        with pytest.raises(UnsupportedLayerError, match="computes its 'weight'"):
            model(torch.tensor([[1, 2]]))


def wav2vec2():
    torch.manual_seed(0)
    return Wav2Vec2ForCTC(
        Wav2Vec2Config(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=20,
            conv_dim=(8, 8),
            conv_stride=(4, 2),
            conv_kernel=(6, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            num_adapter_layers=1,
            vocab_size=12,
            feat_extract_norm="layer",
            layerdrop=0.0,
        )
    ).eval()


class TestWav2Vec2:
    """Its positions are a convolution whose weight is normalised."""

    def adapted(self, targets):
        config = RandLoraConfig(r=2, randlora_alpha=4, target_modules=targets)
        return randomise(get_peft_model(wav2vec2(), config)).eval()

    def test_the_adapter_is_right(self):
        sound = torch.randn(1, 400, generator=torch.Generator().manual_seed(1))
        model, plain = self.adapted(["pos_conv_embed.conv"]), wav2vec2()
        conv = plain.wav2vec2.encoder.pos_conv_embed.conv
        parametrize.remove_parametrizations(conv, "weight")
        conv.weight.data += layer_of(model).get_delta_weight("default")
        assert_close(model(sound).logits.detach(), plain(sound).logits.detach(), 1e-5)

    def test_nothing_is_left_out_of_a_merged_folder(self, tmp_path):
        model = self.adapted(["pos_conv_embed.conv", "q_proj"])
        with pytest.raises(MergeError, match=r"pos_conv_embed.conv', a ParametrizedConv1d.*computes its 'weight'"):
            save_merged(model, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    def test_a_computed_weight_that_is_not_adapted_is_saved_as_it_is(self, tmp_path):
        sound = torch.randn(1, 400, generator=torch.Generator().manual_seed(1))
        model = self.adapted(["q_proj", "v_proj"])
        expected = model(sound).logits.detach()
        save_merged(model, tmp_path / "merged")
        merged, info = Wav2Vec2ForCTC.from_pretrained(tmp_path / "merged", output_loading_info=True)
        assert not any(info.values()), info
        assert_close(merged.eval()(sound).logits.detach(), expected, 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_adapters_are_added_and_converted(way):
    base, x = made(way, "linear")
    model = adapted(base).eval()
    model.base_model.add_weighted_adapter(["default"], [0.5], "a_half")
    layer = layer_of(model)
    plain, update = base(x).detach(), layer.get_delta_weight("default").detach()
    model.set_adapter("a_half")
    assert_close(model(x).detach(), plain + F.linear(x, update) / 2, 1e-5)
    model.set_adapter("default")
    file = to_lora(model, rank=5).tensors
    down, up = (next(v for k, v in file.items() if part in k) for part in ("lora_A", "lora_B"))
    assert_close(up @ down, update, 1e-5)
