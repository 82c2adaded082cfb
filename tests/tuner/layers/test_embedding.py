"""Embeddings: the contract, and what an embedding has besides its weight."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from randlora import RandLoraConfig, UnsupportedLayerError, get_peft_model
from randlora.tuner.layers.embedding import Embedding

from ..contract import Contract
from ..helpers import assert_close, assert_same_tensors, llama, ours, randomise, snapshot, tokens


class EmbeddingContract(Contract):
    kind = Embedding
    settings: dict = {}  # noqa: RUF012
    lookups = (2, 3)

    def make_base(self):
        dim, num = self.shape
        return nn.Embedding(num, dim, **self.settings)

    def input(self, dtype=torch.float32):
        return torch.randint(0, self.shape[1], self.lookups, generator=torch.Generator().manual_seed(2))

    def to_layout(self, update):
        return update.T


class TestManyRows(EmbeddingContract):
    shape = (9, 31)  # (dim, num_embeddings)


class TestManyRowsAllLookedUp(EmbeddingContract):
    shape = (9, 31)
    lookups = (4, 17)


class TestFewRows(EmbeddingContract):
    shape = (19, 7)


class TestFewRowsAllLookedUp(EmbeddingContract):
    shape = (19, 7)
    lookups = (11,)


class TestGradientsByFrequency(EmbeddingContract):
    shape = (9, 31)
    settings = {"scale_grad_by_freq": True}  # noqa: RUF012

    def apply(self, base, x, weight):
        return F.embedding(x, weight, scale_grad_by_freq=True)

    def input(self, dtype=torch.float32):
        return torch.tensor([[1, 1, 1], [4, 1, 30]])


class TestSparse(EmbeddingContract):
    shape = (9, 31)
    settings = {"sparse": True}  # noqa: RUF012

    def apply(self, base, x, weight):
        return F.embedding(x, weight)


class TestPadding(EmbeddingContract):
    shape = (9, 31)
    settings = {"padding_idx": 4}  # noqa: RUF012

    def input(self, dtype=torch.float32):
        return torch.tensor([[4, 1, 2], [4, 5, 30]])

    def to_layout(self, update):
        kept = torch.ones(31, 1, dtype=update.dtype)
        kept[4] = 0
        return update.T * kept

    def apply(self, base, x, weight):
        return F.embedding(x, weight, padding_idx=4)

    def test_the_padding_row_stays(self):
        layer = self.layer()
        assert not layer(torch.tensor([4])).any()
        self.quietly(layer.merge)
        assert not layer.get_base_layer().weight[4].any()


class TestGemma(EmbeddingContract):
    shape = (9, 31)

    def make_base(self):
        return Gemma3TextScaledWordEmbedding(31, 9, padding_idx=None, embed_scale=3.0)


def test_max_norm_is_refused():
    with pytest.raises(UnsupportedLayerError, match=r"'0' is an Embedding with max_norm=1.0"):
        ours(nn.Sequential(nn.Embedding(31, 9, max_norm=1.0)), target_modules=["0"])


def test_dropout_leaves_indices_alone():
    layer = randomise(ours(nn.Sequential(nn.Embedding(31, 9)), r=4, target_modules=["0"], randlora_dropout=0.5)).model[
        0
    ]
    ids = torch.arange(6)
    assert torch.equal(layer.train()(ids), layer.eval()(ids))


class TestTied:
    """An output layer that shares its weight with the embedding."""

    def adapted(self, *targets, tie=True):
        base = llama(tie_word_embeddings=tie)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, about tied layers
            model = get_peft_model(base, RandLoraConfig(r=4, randlora_alpha=4, target_modules=list(targets)))
        return randomise(model).eval()

    @pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="-".join)
    def test_merging_one_leaves_the_other(self, targets):
        model = self.adapted(*targets)
        state, expected = snapshot(model), model(input_ids=tokens()).logits
        twin = copy.deepcopy(model)
        twin.merge_adapter()
        assert_close(twin(input_ids=tokens()).logits.detach(), expected.detach(), 1e-5)
        twin.unmerge_adapter()
        assert_same_tensors(twin.state_dict(), state)
        base = twin.get_base_model()
        inside = [getattr(m, "base_layer", m) for m in (base.get_input_embeddings(), base.get_output_embeddings())]
        assert inside[0].weight is inside[1].weight

    def test_a_merged_model_says_that_it_is_no_longer_tied(self, tmp_path):
        model = self.adapted("embed_tokens", "q_proj")
        expected = model(input_ids=tokens()).logits
        with pytest.warns(UserWarning, match="no longer tied"):
            merged = model.merge_and_unload()
        assert merged.config.tie_word_embeddings is False
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path)
        assert_close(again(input_ids=tokens()).logits.detach(), expected.detach(), 1e-5)

    def test_an_adapter_of_an_embedding_is_saved_without_the_embedding(self, tmp_path):
        model = self.adapted("embed_tokens", tie=False)
        expected = model(input_ids=tokens()).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(tmp_path, save_embedding_layers=False)
            again = PeftModel.from_pretrained(llama(tie_word_embeddings=False), tmp_path).eval()
        assert_close(again(input_ids=tokens()).logits.detach(), expected.detach(), 1e-6)
