"""Adapters by name on one base model: what is served, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from cli.conftest import save_adapter
from randlora.errors import BasisMismatchError, CheckpointError, ConfigError, UnknownModelError
from randlora.serve.adapters import Adapters
from randlora.serve.named_paths import named_paths
from randlora.tuner.layers.base import adapted
from serve.conftest import served


def logits(adapters, *names):
    ids = torch.arange(10, 15).repeat(len(names), 1)
    with torch.inference_mode(), adapters.rows([adapters.named(name).key for name in names]) as model:
        return model(input_ids=ids).logits


class TestLoading:
    def test_rows_have_the_adapters_that_they_name(self, folder, base):
        adapters = served(folder, "law", "code")
        both = logits(adapters, "law", base, "code")
        for row, name in enumerate(("law", base, "code")):
            assert torch.allclose(both[row], logits(adapters, name)[0], atol=1e-5)
        plain = AutoModelForCausalLM.from_pretrained(base).eval()
        with torch.inference_mode():
            assert torch.allclose(both[1], plain(input_ids=torch.arange(10, 15)[None]).logits[0], atol=1e-5)
        assert (both[0] - both[2]).abs().max() > 1e-3

    def test_all_share_bases_base_model_and_tokenizer(self, folder, base):
        adapters = served(folder, "law", "code", "third")
        assert len({id(one.trained.processor) for one in adapters.served}) == 1
        assert len({id(one.trained.model) for one in adapters.served}) == 1
        for layer in adapted(adapters.base.model).values():
            assert len({id(basis) for basis in layer.bases.values()}) == 1

    def test_tokenizers_of_adapters_are_theirs_and_shared_where_they_are_equal(self, folder, base, tmp_path):
        for name, template in (("a", "A"), ("b", "A"), ("c", "C")):
            shutil.copytree(folder / "law", tmp_path / name)
            tokenizer = AutoTokenizer.from_pretrained(base)
            tokenizer.chat_template = template
            tokenizer.save_pretrained(tmp_path / name)
        a, b, c = (one.trained.processor for one in served(tmp_path, "a", "b", "c").served[1:])
        assert a is b
        assert (a.chat_template, c.chat_template) == ("A", "C")

    def test_all_can_go_and_come_again(self, folder, base, recwarn):
        adapters = served(folder, "law", "code")
        expected = logits(adapters, "law", "code", base)
        for name in ("law", "code"):
            adapters.forget(adapters.withdraw(name))
        assert [one.name for one in adapters.served] == [base]
        assert torch.allclose(logits(adapters, base)[0], expected[2], atol=1e-5)
        assert not [layer for layer in adapted(adapters.base.model).values() if layer.r]
        for name in ("code", "law"):
            adapters.load(name, folder / name)
        assert torch.allclose(logits(adapters, "law", "code", base), expected, atol=1e-5)
        assert not [one for one in recwarn if "active" in str(one.message)]

    def test_a_base_model_alone_takes_adapters_later(self, folder, base):
        adapters = Adapters.for_paths([], base)
        assert logits(adapters, base).shape[0] == 1
        adapters.load("law", folder / "law")
        assert torch.allclose(logits(adapters, "law"), logits(served(folder, "law"), "law"), atol=1e-5)

    def test_adapters_of_several_ranks_and_targets(self, folder, base, tmp_path):
        save_adapter(base, tmp_path / "small", seed=5, r=4, target_modules=["q_proj"], save_projection=False)
        save_adapter(base, tmp_path / "tall", seed=6, target_modules=["down_proj"], very_sparse=True)
        adapters = served(folder, "law")
        for name in ("small", "tall"):
            adapters.load(name, tmp_path / name)
        alone = {name: logits(served(tmp_path, name), name)[0] for name in ("small", "tall")}
        mixed = logits(adapters, "tall", "law", base, "small")
        assert torch.allclose(mixed[0], alone["tall"], atol=1e-5)
        assert torch.allclose(mixed[3], alone["small"], atol=1e-5)


class TestRefusals:
    @pytest.fixture
    def adapters(self, folder):
        return served(folder, "law")

    def refused(self, adapters, path, match, name="x", error=ConfigError):
        before = [one.name for one in adapters.served]
        expected = logits(adapters, "law")
        with pytest.raises(error, match=match) as found:
            adapters.load(name, path)
        assert "\n" not in str(found.value)
        assert [one.name for one in adapters.served] == before
        assert torch.equal(logits(adapters, "law"), expected)
        assert not [one for one in adapted(adapters.base.model).values() if len(one.r) > 1]

    def test_another_base_model(self, adapters, tiny_llama, tmp_path):
        save_adapter(tiny_llama, tmp_path / "a")
        self.refused(adapters, tmp_path / "a", f"is for the base model '{tiny_llama}', and .*base' is served")

    def test_another_base_model_that_the_user_says_is_this(self, base, folder, tmp_path):
        moved = Path(shutil.copytree(base, tmp_path / "moved"))
        adapters = Adapters.for_paths([folder / "law"], str(moved))
        adapters.load("law", folder / "law")
        adapters.load("code", folder / "code")  # for the same as the first
        assert adapters.served[0].name == str(moved)

    def test_a_classifier_s(self, adapters, base, tmp_path):
        save_adapter(base, tmp_path / "a", task_type="SEQ_CLS")
        self.refused(adapters, tmp_path / "a", "serve is for language models, and the adapter in .* sequence-class")

    def test_modules_that_are_trained_in_full(self, adapters, base, tmp_path):
        save_adapter(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
        self.refused(adapters, tmp_path / "a", "brings 1 tensors beside λ and γ, such as .*lm_head.*: merge it")

    def test_biases_of_the_base_model(self, adapters, base, tmp_path):
        save_adapter(base, tmp_path / "a", target_modules=["q_proj"], bias="all")
        model = AutoModelForCausalLM.from_pretrained(base)
        if any(name.endswith("bias") for name, _ in model.named_parameters()):
            self.refused(adapters, tmp_path / "a", "beside λ and γ")

    def test_experts_whose_one_weight_serves_all_rows(self, base, tmp_path):
        tokenizer, sizes = AutoTokenizer.from_pretrained(base), {"num_local_experts": 2, "num_experts_per_tok": 1}
        sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(tmp_path / "moe")
        tokenizer.save_pretrained(tmp_path / "moe")
        moe = str(tmp_path / "moe")
        save_adapter(moe, tmp_path / "law", target_modules=["q_proj"])
        save_adapter(moe, tmp_path / "experts", target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
        match = r"cannot be served beside others, because it adapts 'model\.layers\.0\.mlp\.experts', .*: merge it"
        self.refused(served(tmp_path, "law"), tmp_path / "experts", match)
        alone = Adapters.for_paths([tmp_path / "experts"])
        with pytest.raises(ConfigError, match=match):
            alone.load("experts", tmp_path / "experts")
        alone.load("law", tmp_path / "law")  # what was refused has left nothing behind
        assert torch.allclose(logits(alone, "law"), logits(served(tmp_path, "law"), "law"), atol=1e-5)

    def test_another_method(self, adapters, base, tmp_path):
        get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        ).save_pretrained(tmp_path / "a")
        self.refused(adapters, tmp_path / "a", "is an adapter of LORA, not of RandLoRA", error=CheckpointError)

    def test_other_bases(self, adapters, base, tmp_path):
        save_adapter(base, tmp_path / "a", save_projection=False)
        config = tmp_path / "a/adapter_config.json"
        config.write_text(config.read_text().replace('"projection_prng_key": 0', '"projection_prng_key": 1'))
        self.refused(adapters, tmp_path / "a", "fingerprint", error=BasisMismatchError)

    def test_other_shapes(self, adapters, folder, tmp_path):
        shutil.copytree(folder / "law", tmp_path / "a")
        config = tmp_path / "a/adapter_config.json"
        config.write_text(config.read_text().replace('"r": 8', '"r": 4'))
        self.refused(adapters, tmp_path / "a", "values of λ for .*, whose rank is 4", error=CheckpointError)

    def test_codes_that_the_base_model_has_not(self, adapters, folder, base, tmp_path):
        shutil.copytree(folder / "code", tmp_path / "run/adapter")
        (tmp_path / "run/resolved.yaml").write_text(f"model: {base}\ndata: d\ntask: chat\nquantization: 4bit\n")
        self.refused(adapters, tmp_path / "run", "quantization='4bit', and it is served with 'none'")

    def test_what_is_no_adapter(self, adapters, base, tmp_path):
        self.refused(adapters, tmp_path / "gone", "is no folder", error=CheckpointError)
        self.refused(adapters, Path(base), "is no adapter", error=CheckpointError)

    @pytest.mark.parametrize("name", ["", "a\nb"])
    def test_names_that_nobody_can_type(self, adapters, folder, name):
        self.refused(adapters, folder / "code", "printable", name=name)

    def test_a_name_that_is_taken(self, adapters, folder, base):
        self.refused(adapters, folder / "code", "already", name="law")
        self.refused(adapters, folder / "code", "already", name=base)

    def test_an_unknown_name_is_told_some_of_those_that_there_are(self, adapters, folder):
        with pytest.raises(UnknownModelError, match=r"no model 'lwa' here; there are '.*base', 'law'$"):
            adapters.named("lwa")
        adapters._served |= {str(number): adapters.named("law") for number in range(1000)}
        with pytest.raises(UnknownModelError, match=r"'17' and 982 more$"):
            adapters.named("lwa")

    def test_nothing_to_serve(self):
        with pytest.raises(ConfigError, match="name an adapter, or a base model by --model"):
            Adapters.for_paths([])


class TestNamedPaths:
    def test_runs_adapters_folders_of_them_and_names(self, tmp_path):
        for path in ("runs/a/adapter", "runs/b", "one"):
            (tmp_path / path).mkdir(parents=True)
            (tmp_path / path / "adapter_config.json").touch()
        (tmp_path / "runs/a/resolved.yaml").touch()
        (tmp_path / "runs/notes").mkdir()
        found = named_paths([str(tmp_path / "runs"), f"v1.2={tmp_path / 'one'}", str(tmp_path / "gone")])
        assert [one.name for one in found] == ["a", "b", "v1.2", "gone"]
        assert [one.found for one in found] == [True, True, False, False]
        assert named_paths([str(tmp_path / "runs/a/adapter")])[0].name == "a"

    def test_two_of_one_name(self, tmp_path):
        with pytest.raises(ConfigError, match=r"would both be 'a': name one of them as NAME=PATH"):
            named_paths(["x/a", "y/a"])
