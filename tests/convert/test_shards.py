"""Merged weights in the format of ``save_pretrained``, without a second copy of the model in memory."""

import json
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from randlora import ConfigError, MergeError, RandLoraConfig, RandLoraLayer, get_peft_model
from randlora.convert import save_merged
from tuner.helpers import (
    LLAMA_TARGETS,
    adapted,
    assert_close,
    assert_same_tensors,
    bert,
    gpt2,
    layers_of,
    llama,
    output,
    randomise,
    snapshot,
    stack,
)

MODELS = {
    "llama": (llama, LLAMA_TARGETS),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"]),
    "bert": (bert, ["query", "value", "dense"]),
}


def reloaded(folder, build=llama):
    model, info = type(build()).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("shard", ["5GB", "10KB", 1], ids=str)
@pytest.mark.parametrize(("build", "targets"), MODELS.values(), ids=MODELS)
class TestFormat:
    def test_it_loads_and_computes_the_same(self, build, targets, shard, tmp_path):
        model = adapted(build, targets)
        save_merged(model, tmp_path / "merged", max_shard_size=shard)
        assert_close(output(reloaded(tmp_path / "merged", build)).detach(), output(model).detach(), 1e-5)

    def test_it_is_what_merging_and_saving_writes(self, build, targets, shard, tmp_path):
        model = adapted(build, targets)
        save_merged(model, tmp_path / "merged", max_shard_size=shard)
        model.merge_and_unload().save_pretrained(tmp_path / "whole", max_shard_size=shard)
        for name in ("config.json", "generation_config.json"):
            files = [tmp_path / folder / name for folder in ("merged", "whole")]
            assert files[0].exists() == files[1].exists()
            assert not files[0].exists() or files[0].read_text() == files[1].read_text()
        assert_same_tensors(content(tmp_path / "merged"), content(tmp_path / "whole"))

    def test_the_model_stays_as_it_was(self, build, targets, shard, tmp_path):
        model = adapted(build, targets)
        state, before, names = snapshot(model), output(model), [name for name, _ in model.named_modules()]
        save_merged(model, tmp_path / "merged", max_shard_size=shard)
        assert_same_tensors(model.state_dict(), state)
        assert torch.equal(output(model), before)
        assert [name for name, _ in model.named_modules()] == names


def content(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                assert name not in found
                found[name] = tensors.get_tensor(name)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        assert json.loads(index.read_text())["weight_map"].keys() == found.keys()
    return dict(sorted(found.items()))


class TestMemory:
    def test_never_more_than_a_shard_of_merged_weights(self, tmp_path, monkeypatch):
        """A second copy of the adapted weights would be 14 of them."""
        model = adapted(llama)
        largest = max(layer.weight.nbytes for layer in layers_of(model).values())
        alive, most = weakref.WeakSet(), []
        merged_weight = RandLoraLayer.merged_weight

        def counted(layer, *args, **kwargs):
            merged = merged_weight(layer, *args, **kwargs)
            alive.add(merged.untyped_storage())
            most.append(sum(storage.nbytes() for storage in alive))
            return merged

        monkeypatch.setattr(RandLoraLayer, "merged_weight", counted)
        save_merged(model, tmp_path / "merged", max_shard_size=2 * largest)
        assert len(most) == 14
        assert max(most) <= 2 * largest
        assert not list(alive)

    def test_a_process_holds_the_model_and_little_more(self, tmp_path):
        run = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        model, more = map(int, run.stdout.split()[-2:])
        assert model > 100_000  # kB
        assert more < model / 3


PEAK = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from randlora import RandLoraConfig, get_peft_model
from randlora.convert import save_merged
config = LlamaConfig(vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=16,
                     num_attention_heads=4)
model = LlamaForCausalLM(config)
size = sum(p.nbytes for p in model.parameters()) // 1000
model = get_peft_model(model, RandLoraConfig(r=64, target_modules="all-linear"))
def memory(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
save_merged(model, sys.argv[1] + "/first", max_shard_size="8MB")  # imports, thread pools, cast bases
before = memory("VmRSS:")
try:
    open("/proc/self/clear_refs", "w").write("5")
    save_merged(model, sys.argv[1] + "/second", max_shard_size="8MB")
    print(size, memory("VmHWM:") - before)
except OSError:
    print(size, 0)  # a system that does not let a process forget its peak
"""


class TestWhichAdapters:
    def test_the_active_ones(self, tmp_path):
        model = adapted(llama)
        model.add_adapter("y", RandLoraConfig(r=3, target_modules=["q_proj", "lm_head"]))
        randomise(model, "y", seed=8)
        model.base_model.set_adapter(["default", "y"])
        save_merged(model, tmp_path / "merged")
        assert_close(output(reloaded(tmp_path / "merged")).detach(), output(model).detach(), 1e-5)

    def test_chosen_ones(self, tmp_path):
        model = adapted(llama)
        model.add_adapter("y", RandLoraConfig(r=3, target_modules=["q_proj", "lm_head"]))
        randomise(model, "y", seed=8)
        save_merged(model, tmp_path / "merged", adapter_names=["y"])
        model.set_adapter("y")
        assert_close(output(reloaded(tmp_path / "merged")).detach(), output(model).detach(), 1e-5)

    def test_modules_to_save(self, tmp_path):
        model = adapted(bert, ["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
        model.base_model.model.classifier.modules_to_save["default"].weight.data.fill_(0.1)
        save_merged(model, tmp_path / "merged")
        assert_close(output(reloaded(tmp_path / "merged", bert)).detach(), output(model).detach(), 1e-5)

    def test_that_transformers_has_added(self, tmp_path):
        model = llama()
        model.add_adapter(RandLoraConfig(r=4, randlora_alpha=8, target_modules=LLAMA_TARGETS))
        randomise(model)
        save_merged(model, tmp_path / "merged")
        assert_close(output(reloaded(tmp_path / "merged")).detach(), output(model).detach(), 1e-5)
        model.save_pretrained(tmp_path / "adapter")
        assert (tmp_path / "adapter" / "adapter_config.json").exists()


def tied(**changes):
    return llama(tie_word_embeddings=True, **changes)


class TestTiedEmbeddings:
    @pytest.mark.parametrize("shard", ["5GB", 1], ids=str)
    def test_they_are_saved_once(self, tmp_path, shard):
        model = adapted(tied, LLAMA_TARGETS)
        save_merged(model, tmp_path / "merged", max_shard_size=shard)
        assert "lm_head.weight" not in content(tmp_path / "merged")
        found = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
        assert found.lm_head.weight is found.model.embed_tokens.weight
        assert_close(output(found).detach(), output(model).detach(), 1e-5)

    @pytest.mark.parametrize("shard", ["5GB", 1], ids=str)
    def test_an_adapted_output_layer_is_untied(self, tmp_path, shard):
        """Merging in place would change the input embeddings too."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = adapted(tied, ["q_proj", "lm_head"])
        save_merged(model, tmp_path / "merged", max_shard_size=shard)
        found = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
        assert found.lm_head.weight is not found.model.embed_tokens.weight
        assert_close(output(found).detach(), output(model).detach(), 1e-5)


class TestFromFolders:
    @pytest.fixture
    def saved(self, tmp_path):
        llama().save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        config = RandLoraConfig(r=4, randlora_alpha=8, target_modules=LLAMA_TARGETS, task_type="CAUSAL_LM")
        model = randomise(get_peft_model(base, config)).eval()
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path, output(model).detach()

    def test_the_adapter_says_where_its_base_is(self, saved):
        folder, expected = saved
        save_merged(folder / "adapter", folder / "merged")
        assert_close(output(reloaded(folder / "merged")).detach(), expected, 1e-5)

    def test_a_base_that_has_moved(self, saved):
        folder, expected = saved
        (folder / "base").rename(folder / "moved")
        save_merged(str(folder / "adapter"), str(folder / "merged"), base_model_path=folder / "moved")
        assert_close(output(reloaded(folder / "merged")).detach(), expected, 1e-5)

    def test_a_classifier(self, tmp_path):
        bert().save_pretrained(tmp_path / "base")
        base = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
        )
        config = RandLoraConfig(r=4, randlora_alpha=8, target_modules=["query"], task_type="SEQ_CLS")
        model = randomise(get_peft_model(base, config)).eval()
        model.save_pretrained(tmp_path / "adapter")
        options = {"num_labels": 5, "ignore_mismatched_sizes": True}
        save_merged(tmp_path / "adapter", tmp_path / "merged", **options)
        found = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert_close(output(found).detach(), output(model).detach(), 1e-5)

    def test_an_adapter_of_nowhere(self, saved):
        folder, _ = saved
        path = folder / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
        with pytest.raises(ConfigError, match="base_model_path"):
            save_merged(folder / "adapter", folder / "merged")


class TestAllOrNothing:
    def test_a_failure_half_way_leaves_nothing(self, tmp_path):
        model = adapted(llama)
        model.base_model.model.model.layers[1].mlp.down_proj.randlora_gamma["default"].data.fill_(float("nan"))
        with pytest.raises(MergeError, match="not finite"):
            save_merged(model, tmp_path / "merged", max_shard_size=1)
        assert not list(tmp_path.iterdir())

    def test_what_is_there_is_not_touched(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ConfigError, match="something in"):
            save_merged(adapted(llama), tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]

    def test_an_empty_folder_is_filled(self, tmp_path):
        (tmp_path / "merged").mkdir()
        save_merged(adapted(llama), tmp_path / "merged")
        assert (tmp_path / "merged" / "model.safetensors").stat().st_mode & 0o044
        assert (tmp_path / "merged").stat().st_mode & 0o055
        assert [file.name for file in tmp_path.iterdir()] == ["merged"]


class TestRefused:
    def test_models_of_others(self, tmp_path):
        model = get_peft_model(stack(), RandLoraConfig(r=4, target_modules=["tall"]))
        with pytest.raises(ConfigError, match="merge_and_unload"):
            save_merged(model, tmp_path / "merged")

    def test_what_is_merged_already(self, tmp_path):
        model = adapted(llama)
        model.merge_adapter()
        with pytest.raises(MergeError, match="unmerge_adapter"):
            save_merged(model, tmp_path / "merged")

    def test_nothing_to_merge(self, tmp_path):
        with pytest.raises(ConfigError, match="nothing to merge"):
            save_merged(adapted(llama), tmp_path / "merged", adapter_names=["z"])
        with pytest.raises(ConfigError, match="nothing to merge"):
            save_merged(llama(), tmp_path / "merged")

    @pytest.mark.parametrize("size", [0, -1, "5", "GB", "0GB", True, "5 apples"], ids=str)
    def test_sizes_that_are_none(self, size, tmp_path):
        with pytest.raises(ConfigError, match="max_shard_size"):
            save_merged(adapted(llama), tmp_path / "merged", max_shard_size=size)

    def test_offloaded_tensors(self, tmp_path):
        model = adapted(llama)
        model.base_model.model.model.embed_tokens.to("meta")
        with pytest.raises(MergeError, match="embed_tokens"):
            save_merged(model, tmp_path / "merged")


def test_bfloat16(tmp_path):
    model = adapted(llama).to(torch.bfloat16)
    save_merged(model, tmp_path / "merged")
    found = reloaded(tmp_path / "merged")
    assert found.dtype == torch.bfloat16
    assert_same_tensors(found.state_dict(), model.merge_and_unload().state_dict())


def test_it_is_no_adapter_any_more(tmp_path):
    save_merged(adapted(llama), tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("adapter*"))
    with pytest.raises(ValueError, match="adapter_config"):
        PeftModel.from_pretrained(llama(), tmp_path / "merged")


def mixtral():
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


@pytest.mark.parametrize("targets", [["q_proj"], []], ids=str)
@pytest.mark.parametrize(
    "parameters", [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"], ["gate.weight"]], ids=str
)
def test_experts_are_merged_too(targets, parameters, tmp_path):
    model = adapted(mixtral, targets, target_parameters=parameters)
    expected = output(model).detach()
    with model.disable_adapter():
        plain = output(model).detach()
    save_merged(model, tmp_path / "merged")
    merged = MixtralForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (expected - plain).norm() > 1e-3 * plain.norm()
    assert_close(output(merged).detach(), expected, 1e-5)


def test_what_merging_would_change_is_refused(tmp_path):
    model = adapted(llama)
    layer = model.base_model.model.model.layers[1].mlp.up_proj.get_base_layer()
    plain = layer.forward
    layer.forward = lambda x: plain(x) / 2
    with pytest.raises(MergeError, match=r"'model.layers.1.mlp.up_proj', a Linear.*with a merged weight"):
        save_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
