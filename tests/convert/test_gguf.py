"""A merged folder, and a LoRA, as llama.cpp's converters take them: names, dtype, tokenizer; and back from GGUF."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from randlora import RandLoraConfig, get_peft_model
from randlora.convert import convert_folder_to_lora
from randlora.convert.merged_folder import merge_folder
from tuner.helpers import randomise

SHAPE = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,  # smaller than the others, and their rows are in another order in GGUF
    vocab_size=50,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
TOKENS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """Folders base, adapter, merged and lora."""
    place = tmp_path_factory.mktemp("gguf")
    torch.manual_seed(0)
    LlamaForCausalLM(SHAPE).save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    base = LlamaForCausalLM.from_pretrained(place / "base")
    model = get_peft_model(base, RandLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(model, "default").save_pretrained(place / "adapter")
    merge_folder(place / "adapter", place / "merged")
    convert_folder_to_lora(place / "adapter", place / "lora", rank=32)
    return place


def names() -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE.num_hidden_layers)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


class TestMergedFolder:
    def test_each_tensor_has_a_name_in_gguf(self, folder):
        tensors = load_file(folder / "merged" / "model.safetensors")
        assert len(tensors) == 9 * SHAPE.num_hidden_layers + 3
        assert None not in {names().get_name(name, (".weight", ".bias")) for name in tensors}

    def test_the_config_says_what_the_converter_asks_for(self, folder):
        config = json.loads((folder / "merged" / "config.json").read_text())
        assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
        assert {name: config[name] for name in ("vocab_size", "num_key_value_heads", "max_position_embeddings")} == {
            "vocab_size": 50,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in (folder / "merged").iterdir()}

    def test_transformers_reads_it_back_from_gguf(self, folder, tmp_path):
        write_gguf(load_file(folder / "merged" / "model.safetensors"), tmp_path / "merged.gguf")
        back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf")
        merged = logits(LlamaForCausalLM.from_pretrained(folder / "merged"))
        assert torch.equal(logits(back), merged)
        assert not torch.allclose(merged, logits(LlamaForCausalLM.from_pretrained(folder / "base")), atol=1e-2)


class TestSentencepiece:
    """Transformers no longer writes `tokenizer.model`, where the converter finds the scores of the pieces."""

    @pytest.fixture
    def with_pieces(self, folder):
        file = folder / "base" / "tokenizer.model"
        file.write_bytes(b"pieces")
        yield
        file.unlink()

    @pytest.mark.usefixtures("with_pieces")
    def test_its_file_goes_with_the_merged_model(self, folder, tmp_path):
        assert merge_folder(folder / "adapter", tmp_path / "merged").tokenizer
        assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == b"pieces"

    @pytest.mark.usefixtures("with_pieces")
    @pytest.mark.parametrize("change", ["more", "other"])
    def test_a_tokenizer_of_the_adapter_must_still_have_these_pieces(self, folder, tmp_path, change):
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        for file in (folder / "adapter").iterdir():
            (adapter / file.name).write_bytes(file.read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        if change == "more":
            tokenizer.add_tokens(["<extra>"])
        else:
            tokenizer = tokenizer.train_new_from_iterator(["other words"], vocab_size=30)
        tokenizer.save_pretrained(adapter)
        merge_folder(adapter, tmp_path / "merged")
        assert (tmp_path / "merged" / "tokenizer.model").exists() == (change == "more")


def test_each_factor_of_a_lora_has_a_name_and_all_have_one_scale(folder):
    """The converter knows one alpha, and llama.cpp divides it by the rank of each layer."""
    config = json.loads((folder / "lora" / "adapter_config.json").read_text())
    tensors = load_file(folder / "lora" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * SHAPE.num_hidden_layers
    for name, tensor in tensors.items():
        layer, _, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        assert names().get_name(f"{layer}.weight", (".weight",))
        assert tensor.shape[0 if factor == "lora_A" else 1] == config["lora_alpha"] == 32


def write_gguf(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """The tensors of a Llama under the names and in the order of GGUF, without a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(SHAPE.num_hidden_layers)
    writer.add_context_length(SHAPE.max_position_embeddings)
    writer.add_embedding_length(SHAPE.hidden_size)
    writer.add_feed_forward_length(SHAPE.intermediate_size)
    writer.add_head_count(SHAPE.num_attention_heads)
    writer.add_head_count_kv(SHAPE.num_key_value_heads)
    writer.add_layer_norm_rms_eps(SHAPE.rms_norm_eps)
    writer.add_vocab_size(SHAPE.vocab_size)
    for name, tensor in tensors.items():
        heads = {"q_proj": SHAPE.num_attention_heads, "k_proj": SHAPE.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # the halves of a rotary pair stand side by side
            pairs = tensor.reshape(heads, 2, -1, SHAPE.hidden_size)
            value = pairs.transpose(1, 2).reshape(tensor.shape).numpy()
        else:
            value = tensor.numpy()
        writer.add_tensor(names().get_name(name, (".weight", ".bias")), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
