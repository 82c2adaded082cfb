"""inspect, diff, convert and merge: what they say of an adapter, what they write, and what they refuse."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli.conftest import save_adapter
from cli.helpers import answer, invoke
from randlora.analysis import effective_rank, singular_values

WEIGHTS = "adapter_model.safetensors"


def changed(folder, target, change):
    """A copy of an adapter with other tensors or another config."""
    shutil.copytree(folder, target)
    tensors, config = load_file(target / WEIGHTS), json.loads((target / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def logits(base, folder):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


class TestInspect:
    def test_layers_norms_and_ranks_are_those_of_the_loaded_model(self, adapter, tiny_llama):
        found = answer("inspect", adapter)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), adapter)
        assert found["bases"] == "verified"
        assert found["whole"]
        assert found["parameters"] == sum(p.numel() for n, p in model.named_parameters() if "randlora_" in n)
        assert len(found["layers"]) == 14
        for layer in found["layers"]:
            module = model.get_base_model().get_submodule(layer["name"])
            update = module.get_delta_weight("default").detach()
            assert layer["shape"] == [module.out_features, module.in_features]
            assert layer["update_norm"] == pytest.approx(float(update.norm()), rel=1e-5)
            assert layer["effective_rank"] == pytest.approx(effective_rank(singular_values(update)), rel=1e-3)

    def test_text(self, adapter):
        text = invoke("inspect", adapter).stdout
        assert "verified by fingerprint" in text
        assert "no bases in it" in text
        assert "more layers: --all" in text
        assert "more layers" not in invoke("inspect", adapter, "--all").stdout

    def test_whole_bases_in_the_file_need_no_base_model(self, adapter_with_bases, tmp_path):
        alone = changed(
            adapter_with_bases, tmp_path / "alone", lambda _, config: config.update(base_model_name_or_path="nowhere")
        )
        found = answer("inspect", alone)
        assert found["bases"] == "verified"
        assert found["layers"][0]["shape"] is None
        assert found["layers"][0]["update_norm"] is None
        assert found["layers"][0]["lambda_norm"] > 0

    def test_without_bases_and_base_model_it_says_what_it_cannot_know(self, adapter, tmp_path, tiny_llama):
        alone = changed(adapter, tmp_path / "alone", lambda _, config: config.update(base_model_name_or_path="nowhere"))
        assert answer("inspect", alone)["bases"] == "unknown"
        assert "--model" in invoke("inspect", alone).stdout
        assert answer("inspect", alone, "--model", tiny_llama)["bases"] == "verified"

    def test_wrong_bases_end_with_code_1(self, adapter, tmp_path):
        wrong = changed(adapter, tmp_path / "wrong", lambda _, config: config.update(projection_prng_key=1))
        assert answer("inspect", wrong, code=1)["bases"] == "wrong"

    def test_a_value_that_is_not_finite_ends_with_code_1(self, adapter, tmp_path):
        def spoil(tensors, _):
            tensors[next(name for name in sorted(tensors) if name.endswith("randlora_gamma"))][0, 0] = float("nan")

        found = answer("inspect", changed(adapter, tmp_path / "nan", spoil), code=1)
        assert found["not_finite"] == ["model.layers.0.mlp.down_proj.γ"]
        assert found["layers"][0]["update_norm"] is None  # JSON has no NaN

    def test_an_adapter_that_has_not_been_trained(self, tiny_llama, tmp_path):
        save_adapter(tiny_llama, tmp_path, target_modules=["q_proj"])
        zero = changed(tmp_path, tmp_path / "zero", lambda t, _: [v.zero_() for n, v in t.items() if "lambda" in n])
        assert answer("inspect", zero)["layers"][0]["effective_rank"] == 0
        assert "changes nothing yet" in invoke("inspect", zero).stdout

    def test_names_from_the_file_neither_mark_up_nor_control_the_terminal(self, adapter, tmp_path):
        strange = changed(
            adapter,
            tmp_path / "x",
            lambda t, c: (t.update({"a[/]\x1b[2Jb": torch.ones(1)}), c.update(peft_version="[/]")),
        )
        text = invoke("inspect", strange).stdout
        assert "a[/]\\x1b[2Jb" in text
        assert "saved by peft [/]" in text

    def test_a_config_without_its_defaults(self, adapter, tmp_path):
        short = changed(adapter, tmp_path / "x", lambda _, config: config.pop("projection_prng_key"))
        assert "bases of key 0" in invoke("inspect", short).stdout

    def test_a_run_has_its_adapter_in_it(self, adapter, tmp_path):
        shutil.copytree(adapter, tmp_path / "adapter")
        assert answer("inspect", tmp_path)["path"] == str(tmp_path / "adapter")


class TestDiff:
    def test_the_same_with_and_without_bases(self, adapter_with_bases, tiny_llama, tmp_path):
        other = save_adapter(tiny_llama, tmp_path, target_modules=["k_proj", "q_proj"], save_projection=False)
        found = answer("diff", adapter_with_bases, other)
        assert found["same_effect"]
        assert found["config"] == {"save_projection": [True, False]}

    def test_how_far_and_in_which_direction(self, adapter, tmp_path):
        double = changed(adapter, tmp_path / "x", lambda t, _: [v.mul_(2) for n, v in t.items() if "lambda" in n])
        found = answer("diff", adapter, double, code=1)
        assert not found["same_effect"]
        for layer in found["layers"]:
            assert layer["relative"] == pytest.approx(1, rel=1e-5)
            assert layer["cosine"] == pytest.approx(1, rel=1e-5)
        assert "they differ" in invoke("diff", adapter, double, code=1).stdout

    def test_layers_that_do_the_same_are_counted_and_not_listed(self, adapter, tmp_path):
        def change(tensors, _):
            next(value for name, value in sorted(tensors.items()) if name.endswith("q_proj.randlora_lambda")).mul_(2)

        other = changed(adapter, tmp_path / "x", change)
        text = invoke("diff", adapter, other, code=1).stdout
        assert text.count("_proj") == 1
        assert "13 of 14 layers do the same in both" in text
        assert invoke("diff", adapter, other, "--all", code=1).stdout.count("_proj") == 14

    def test_other_layers(self, adapter, adapter_with_bases):
        found = answer("diff", adapter_with_bases, adapter, code=1)
        assert len(found["only_second"]) == 10
        assert found["only_first"] == []

    def test_unknown_updates_are_said_to_be_unknown(self, adapter, tmp_path):
        alone = changed(adapter, tmp_path / "alone", lambda _, config: config.update(base_model_name_or_path="nowhere"))
        assert "not known" in invoke("diff", alone, alone, code=1).stdout


class TestCompact:
    def test_a_file_without_bases_that_computes_the_same(self, adapter_with_bases, tiny_llama, tmp_path):
        done = answer("convert", adapter_with_bases, tmp_path / "small", "--to", "compact")
        assert done["bytes_after"] < done["bytes_before"]
        assert not [name for name in load_file(tmp_path / "small" / WEIGHTS) if name.endswith(("_A", "_B"))]
        assert torch.equal(logits(tiny_llama, tmp_path / "small"), logits(tiny_llama, adapter_with_bases))

    def test_in_place(self, adapter_with_bases, tiny_llama, tmp_path):
        folder = shutil.copytree(adapter_with_bases, tmp_path / "adapter")
        (folder / "tokenizer.json").write_text("{}")
        invoke("convert", folder, "--to", "compact", "--in-place")
        assert {file.name for file in folder.iterdir()} >= {WEIGHTS, "adapter_config.json", "tokenizer.json"}
        assert not [file for file in folder.iterdir() if file.name.startswith(".")]
        assert torch.equal(logits(tiny_llama, folder), logits(tiny_llama, adapter_with_bases))


class TestLora:
    def test_what_is_lost_is_said(self, adapter, tiny_llama, tmp_path):
        done = answer("convert", adapter, tmp_path / "lora", "--to", "lora", "--energy", "1.0")
        assert max(layer["relative_error"] for layer in done["layers"]) < 1e-6
        assert torch.allclose(logits(tiny_llama, tmp_path / "lora"), logits(tiny_llama, adapter), atol=1e-4)
        assert "the worst of 14" in invoke("convert", adapter, tmp_path / "r2", "--to", "lora", "--rank", 2).stdout


class TestOfLora:
    """The tools take the LoRA that a run is compared with."""

    @pytest.fixture
    def lora(self, adapter, tmp_path):
        invoke("convert", adapter, tmp_path / "lora", "--to", "lora", "--rank", 4)
        return tmp_path / "lora"

    def test_inspect(self, lora):
        found = answer("inspect", lora)
        assert found["bases"] == "none"
        assert found["whole"]
        tensors = load_file(lora / WEIGHTS)
        assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
        for layer in found["layers"]:
            name = f"base_model.model.{layer['name']}"
            update = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]  # whose scaling is 1
            assert layer["shape"] == list(update.shape)
            assert layer["update_norm"] == pytest.approx(float(update.norm()), rel=1e-5)
            assert layer["effective_rank"] <= 4 + 1e-6
        assert "LoRA for" in invoke("inspect", lora).stdout

    def test_a_damaged_one_ends_with_code_1(self, lora, tmp_path):
        bad = changed(lora, tmp_path / "bad", lambda t, _: next(iter(t.values())).fill_(float("nan")))
        assert len(answer("inspect", bad, code=1)["not_finite"]) == 1

    def test_diff_with_itself_and_with_what_it_came_from(self, lora, adapter):
        assert answer("diff", lora, lora)["same_effect"]
        found = answer("diff", adapter, lora, code=1)
        assert found["only_first"] == found["only_second"] == []
        lost = {layer["name"]: layer["relative"] for layer in found["layers"]}
        again = answer("convert", adapter, lora.parent / "again", "--to", "lora", "--rank", 4)["layers"]
        assert lost == pytest.approx({layer["name"]: layer["relative_error"] for layer in again}, rel=1e-3)

    def test_merge(self, lora, tiny_llama, tmp_path):
        assert answer("merge", lora, tmp_path / "merged")["tokenizer"]
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        with torch.no_grad():
            found = merged(torch.arange(10)[None]).logits
        assert torch.allclose(found, logits(tiny_llama, lora), atol=1e-4)


def test_merge_gives_a_model_that_needs_nothing_else(adapter, tiny_llama, tmp_path):
    done = answer("merge", adapter, tmp_path / "merged")
    assert done["tokenizer"]
    assert done["dtype"] == "float32"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found = merged(torch.arange(10)[None]).logits
    assert torch.allclose(found, logits(tiny_llama, adapter), atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("good")["input_ids"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("inspect nowhere", "no adapter folder 'nowhere'"),
        ("inspect EMPTY", "it has no adapter_config.json"),
        ("inspect RUN", "there is one in"),
        ("inspect LORA", "has no adapter_model.safetensors"),
        ("inspect ADAPTER --model nowhere", "'nowhere' is neither a folder"),
        ("inspect ADAPTER --model BERT", "does not fit"),
        ("inspect BROKEN", "no safetensors file, or a damaged one"),
        ("inspect HALF", "do not belong together"),
        ("inspect FLAT", "do not belong together"),
        ("inspect BASIS", "a basis has 3"),
        ("inspect MODULES --model LLAMA", "does not fit LlamaForCausalLM"),
        ("convert HUGE EMPTY/x --to lora --rank 4", "is not finite"),
        ("diff ADAPTER nowhere", "nowhere"),
        ("diff ADAPTER LORA", "has no adapter_model.safetensors"),
        ("convert ADAPTER --to compact", "name a new folder, or say --in-place"),
        ("convert ADAPTER EMPTY/x --to compact --in-place", "name a new folder, or say --in-place"),
        ("convert ADAPTER EMPTY/x --to compact", "as compact as it gets"),
        ("convert ADAPTER --to lora --in-place --rank 4", "name a new folder"),
        ("convert ADAPTER EMPTY/x --to lora", "give one of them"),
        ("convert ADAPTER EMPTY/x --to lora --rank 0", "rank=0 must be at least 1"),
        ("convert ADAPTER ADAPTER --to lora --rank 4", "something in"),
        ("convert ADAPTER EMPTY/x --to gguf", "'gguf' is not one of"),
        ("merge nowhere EMPTY/x", "'nowhere' is no folder"),
        ("merge ADAPTER ADAPTER", "something in"),
        ("merge ADAPTER EMPTY/x --dtype float8", "dtype='float8'"),
        ("merge ADAPTER EMPTY/x --max-shard-size big", "max_shard_size='big'"),
        ("merge ADAPTER EMPTY/x --model nowhere", "'nowhere' is neither a folder"),
        ("merge ADAPTER EMPTY/x --model BERT", "cannot be loaded onto"),
        ("merge LORA EMPTY/x", "does not say which model it is for"),
        ("merge BROKEN EMPTY/x", "no safetensors file, or a damaged one"),
        ("convert ADAPTER EMPTY/x --to lora --rank 4 --model BERT", "cannot be loaded onto"),
    ],
)
def test_mistakes_end_with_code_2_and_change_nothing(
    arguments, expected, adapter, tiny_bert, tiny_llama, tmp_path, monkeypatch
):
    def half(tensors, _):
        del tensors[next(name for name in tensors if name.endswith("gamma"))]

    def flat(tensors, _):
        tensors.update({name: tensor.flatten() for name, tensor in tensors.items()})

    def basis(tensors, _):
        tensors.update({f"base_model.randlora_{x}": torch.ones(3) for x in "AB"})

    def huge(tensors, _):
        tensors.update({name: torch.full_like(tensor, 3e38) for name, tensor in tensors.items()})

    def modules(_, config):
        config["modules_to_save"] = [""]  # the whole model

    places = {
        "EMPTY": tmp_path / "empty",
        "RUN": tmp_path / "run",
        "LORA": tmp_path / "lora",
        "BROKEN": tmp_path / "truncated",
        "HALF": tmp_path / "half",
        "FLAT": tmp_path / "flat",
        "BASIS": tmp_path / "basis",
        "HUGE": tmp_path / "huge",
        "MODULES": tmp_path / "modules",
        "LLAMA": tiny_llama,
        "ADAPTER": adapter,
        "BERT": tiny_bert,
    }
    places["EMPTY"].mkdir()
    if "RUN" in arguments:
        shutil.copytree(adapter, places["RUN"] / "best")
    if "LORA" in arguments:
        places["LORA"].mkdir()
        (places["LORA"] / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if "BROKEN" in arguments:
        shutil.copytree(adapter, places["BROKEN"])
        (places["BROKEN"] / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:300])
    for name, change in {"HALF": half, "FLAT": flat, "BASIS": basis, "HUGE": huge, "MODULES": modules}.items():
        if name in arguments:
            changed(adapter, places[name], change)
    monkeypatch.chdir(tmp_path)
    for name, place in places.items():
        arguments = arguments.replace(name, str(place))
    before = {file: file.read_bytes() for file in adapter.iterdir()}
    result = invoke(*arguments.split(), code=2)
    assert expected in result.output.replace("\n", "")
    assert {file: file.read_bytes() for file in adapter.iterdir()} == before
    assert not list(places["EMPTY"].iterdir())


def test_an_interruption_of_a_merge_leaves_nothing(adapter, tmp_path, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("randlora.convert.shards._write_shard", interrupt)
    assert "nothing has been written" in invoke("merge", adapter, tmp_path / "merged", code=130).output
    assert not list(tmp_path.iterdir())
