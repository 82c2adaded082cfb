"""Whatever wraps a model, its adapter's file is that of the plain model, and is loaded as into the plain model."""

import warnings

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaForCausalLM

from randlora import CheckpointError, RandLoraConfig, RandLoraLayer, get_peft_model, hotswap_adapter
from randlora.convert import save_merged, to_lora

from .helpers import LLAMA_TARGETS, STACK_TARGETS, assert_close, assert_same_tensors, llama, output, randomise, stack
from .wrapping import WRAPPERS, compiled, one_process

FILE = "adapter_model.safetensors"
# all that a file may hold beside λ, γ and bases; the norm is inside of what some wrap and itself wrapped by others
PARTS = {"modules_to_save": ["norm"], "bias": "randlora_only"}
GATHERED = {name for name in WRAPPERS if "FSDP" in name}  # only the outermost wrapper may be asked for its state


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    with one_process(), torch.compiler.set_stance("force_eager"):  # what runs is what would be compiled
        yield


def base():
    return llama(attention_bias=True)


def trained(seed=3, **config):
    config = {"r": 4, "target_modules": LLAMA_TARGETS, **PARTS, **config}
    model = randomise(get_peft_model(base(), RandLoraConfig(**config)), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "randlora_" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def peft_model_in(model):
    while not isinstance(model, PeftModel):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


@torch.no_grad()
def outputs(model):
    return output(model.eval())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of the adapter of a plain model, and outputs of that."""
    folder, model = tmp_path_factory.mktemp("plain"), trained()
    model.save_pretrained(folder)
    return folder, outputs(model)


def tensors(folder):
    return load_file(folder / FILE)


@pytest.fixture(params=WRAPPERS)
def name(request):
    return request.param


class TestSaved:
    def test_from_a_wrapped_model(self, name, plain, tmp_path):
        if name in GATHERED:
            return
        peft_model_in(WRAPPERS[name](trained())).save_pretrained(tmp_path)
        assert_same_tensors(tensors(tmp_path), tensors(plain[0]))
        assert torch.equal(outputs(PeftModel.from_pretrained(base(), tmp_path)), plain[1])

    def test_the_state_of_a_wrapped_model(self, name, plain, tmp_path):
        wrapped = WRAPPERS[name](trained())
        state = wrapped.state_dict()
        peft_model_in(wrapped).save_pretrained(tmp_path / "wrapped", state_dict=state)
        trained(seed=9).save_pretrained(tmp_path / "other", state_dict=state)
        for folder in ("wrapped", "other"):
            assert_same_tensors(tensors(tmp_path / folder), tensors(plain[0]))

    def test_the_state_of_a_plain_model(self, name, plain, tmp_path):
        """As Accelerate gathers it, and `torch.distributed.checkpoint`: both take the names of wrappers out."""
        wrapped = peft_model_in(WRAPPERS[name](trained(seed=9)))
        wrapped.save_pretrained(tmp_path, state_dict=trained().state_dict())
        assert_same_tensors(tensors(tmp_path), tensors(plain[0]))

    def test_tensors(self, name):
        content = peft.get_peft_model_state_dict(WRAPPERS[name](trained()))
        assert_same_tensors(content, peft.get_peft_model_state_dict(trained()))


class TestLoaded:
    def test_tensors(self, name, plain):
        wrapped = WRAPPERS[name](trained(seed=9))
        peft.set_peft_model_state_dict(wrapped, peft.get_peft_model_state_dict(trained()))
        assert_close(outputs(wrapped), plain[1], 1e-5)

    def test_in_the_place_of_another(self, name, plain):
        wrapped = WRAPPERS[name](trained(seed=9))
        hotswap_adapter(wrapped, str(plain[0]))
        assert_close(outputs(wrapped), plain[1], 1e-5)

    def test_into_a_wrapped_model(self, name, plain):
        if name in GATHERED:
            return
        wrapped = WRAPPERS[name](trained(seed=9))
        peft_model_in(wrapped).load_adapter(plain[0], "default")
        assert_close(outputs(wrapped), plain[1], 1e-5)

    def test_beside_another(self, name, tmp_path):
        if name in GATHERED:
            return
        one = trained(modules_to_save=None, bias="none")
        one.save_pretrained(tmp_path)
        wrapped = WRAPPERS[name](trained(seed=9, modules_to_save=None, bias="none"))
        peft_model_in(wrapped).load_adapter(tmp_path, "second")
        peft_model_in(wrapped).set_adapter("second")
        assert_close(outputs(wrapped), outputs(one), 1e-5)

    def test_onto_a_wrapped_base(self, name, plain):
        if name in GATHERED:
            return
        assert_close(outputs(PeftModel.from_pretrained(WRAPPERS[name](base()), plain[0])), plain[1], 1e-5)


@pytest.mark.parametrize("name", sorted(WRAPPERS.keys() - GATHERED))
class TestMerged:
    def test_saved(self, name, plain, tmp_path):
        save_merged(WRAPPERS[name](trained()), tmp_path)
        assert_close(outputs(LlamaForCausalLM.from_pretrained(tmp_path)), plain[1], 1e-5)

    def test_as_lora(self, name):
        found, expected = to_lora(WRAPPERS[name](trained()), rank=3), to_lora(trained(), rank=3)
        assert found.config == expected.config
        assert_same_tensors(found.tensors, expected.tensors)

    def test_in_place(self, name, plain):
        model = peft_model_in(WRAPPERS[name](trained())).merge_and_unload()
        assert not any(isinstance(module, RandLoraLayer) for module in model.modules())
        assert_close(outputs(model), plain[1], 1e-5)

    def test_unloaded(self, name):
        model = peft_model_in(WRAPPERS[name](trained(bias="none", modules_to_save=None))).unload()
        assert not any(isinstance(module, RandLoraLayer) for module in model.modules())
        assert torch.equal(outputs(model), outputs(base()))


def test_a_compiled_layer_that_is_adapted_runs_its_adapter():
    """``torch.compile`` of a layer has a hold on the layer; without ``surroundings``' stance, as users run it."""
    torch.compiler.set_stance("default")
    expected = outputs(randomise(get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS))))
    model = stack()
    model.tall, model.wide = compiled(model.tall), compiled(model.wide)
    plain = outputs(model)
    model = randomise(get_peft_model(model, RandLoraConfig(r=4, target_modules=STACK_TARGETS)))
    assert_close(outputs(model), expected, 1e-6)
    assert_close(outputs(model.unload()), plain, 1e-6)


@pytest.mark.parametrize(
    "target_modules", ["all-linear", r"model\.layers\.1\.(self_attn|mlp)\.[a-z]+_proj", LLAMA_TARGETS]
)
def test_targets_are_named_as_in_the_plain_model(target_modules):
    config = {"r": 4, "target_modules": target_modules, "layers_to_transform": None}
    config |= {"rank_pattern": {r"model\.layers\.1\.mlp\.up_proj": 3}}
    expected = peft.get_peft_model_state_dict(get_peft_model(base(), RandLoraConfig(**config)))
    for name in ("activation checkpointing", "checkpointed layers", "compiled regions", "compiled base"):
        found = peft.get_peft_model_state_dict(get_peft_model(WRAPPERS[name](base()), RandLoraConfig(**config)))
        assert_same_tensors(found, expected)


def test_adapted_from_the_names_of_a_state():
    content = peft.get_peft_model_state_dict(trained(modules_to_save=None, bias="none"))
    names = {name.removeprefix("base_model.model."): value for name, value in content.items()}
    wrapped = WRAPPERS["compiled blocks"](base())
    peft.inject_adapter_in_model(RandLoraConfig(r=4, target_modules=["q_proj"]), wrapped, state_dict=names)
    assert sum(isinstance(module, RandLoraLayer) for module in wrapped.modules()) == 14


WRAPS = {
    "compiled": compiled,
    "checkpointed": checkpoint_wrapper,
    "DataParallel": DataParallel,
    "averaged": lambda module: AveragedModel(module).eval(),
}


class TestAnyModuleInAnyWrapper:
    @given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(sorted(WRAPS))), min_size=1, max_size=6))
    def test_saved_and_loaded(self, plain, tmp_path_factory, places):
        def wrapped(seed):
            model = trained(seed)
            for number, how in places:  # those inside of wrappers, and wrappers themselves, come again
                paths = [path for path, module in model.named_modules() if may_be_wrapped(path, module)]
                path = paths[number % len(paths)]
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, WRAPS[how](model.get_submodule(path)))
            return model

        model, folder = wrapped(3), tmp_path_factory.mktemp("any")
        model.save_pretrained(folder)
        assert_same_tensors(tensors(folder), tensors(plain[0]))
        trained(9).save_pretrained(folder, state_dict=model.state_dict())
        assert_same_tensors(tensors(folder), tensors(plain[0]))
        other = wrapped(9)
        other.load_adapter(plain[0], "default")
        assert_close(outputs(other), plain[1], 1e-5)


def may_be_wrapped(path, module):
    """Modules in the base model that are called, and not read past their call; torch compiles nothing twice."""
    called = type(module).__name__ not in ("ModuleList", "ModuleDict", "ParameterDict", "Dropouts")
    return called and path.count(".") > 1 and "_orig_mod" not in (path.rpartition(".")[2], *module._modules)


def lacking(model, part):
    return {name: value for name, value in model.state_dict().items() if part not in name}


class TestNothingIsLacking:
    @pytest.mark.parametrize(
        ("state", "match"),
        [
            (lambda model: {}, r"lacks 28 of 28 tensors .* has none"),
            (lambda model: lacking(model, "1.mlp.up_proj.randlora_gamma"), r"lacks 1 of 28 .*1\.mlp\.up_proj"),
            (lambda model: lacking(model, "lambda"), "lacks 14 of 28"),
            (lambda model: base().state_dict(), "lacks 28 of 28"),
            (lambda model: trained(r=3).state_dict(), r"lacks 28 of 28 .* in shape \(3, 6\), not \(4, 4\)"),
            (lambda model: {n: v.flatten()[:0] for n, v in model.state_dict().items()}, r"in shape \(0,\), not"),
        ],
    )
    @pytest.mark.parametrize("safe_serialization", [True, False])
    @pytest.mark.filterwarnings("ignore:safe_serialization=False")
    def test_in_a_file(self, state, match, safe_serialization, tmp_path):
        model = trained()
        with pytest.raises(CheckpointError, match=match):
            model.save_pretrained(tmp_path, state_dict=state(model), safe_serialization=safe_serialization)
        assert not [file for file in tmp_path.iterdir() if file.name.startswith("adapter_model")]

    def test_in_what_transformers_writes(self, plain, tmp_path):
        model = base()
        model.load_adapter(str(plain[0]))
        with pytest.raises(CheckpointError, match="lacks 28 of 28"):
            model.save_pretrained(tmp_path, state_dict={})
        assert not (tmp_path / FILE).exists()

    def test_but_processes_that_write_nothing_hold_nothing(self, tmp_path):
        model = trained(modules_to_save=None, bias="none")
        model.save_pretrained(tmp_path, state_dict={}, is_main_process=False)
        assert peft.get_peft_model_state_dict(model, state_dict={}).keys() == {
            f"randlora_{basis}_used" for basis in "AB"
        }
        assert not list(tmp_path.iterdir())

    def test_shares_of_deepspeed_are_in_its_own_checkpoint(self, tmp_path):
        """The Trainer saves ``{}`` first where DeepSpeed is not to gather, and then DeepSpeed's checkpoint."""
        model = trained()
        for number, parameter in enumerate(model.parameters()):
            parameter.ds_id = number
        with pytest.warns(UserWarning, match="stage3_gather_16bit_weights_on_model_save"):
            model.save_pretrained(tmp_path, state_dict={})
        assert not (tmp_path / FILE).exists()

    def test_one_adapter_of_a_state_that_holds_no_other(self, tmp_path):
        model = trained(modules_to_save=None, bias="none")
        model.add_adapter("other", RandLoraConfig(r=3, target_modules=["q_proj"]))
        state = {name: value for name, value in model.state_dict().items() if not name.endswith(".other")}
        with pytest.raises(CheckpointError, match=r"'other'.* lacks 4 of 4 .*selected_adapters"):
            model.save_pretrained(tmp_path, state_dict=state)
        model.save_pretrained(tmp_path / "one", selected_adapters=["default"], state_dict=state)
        assert_close(outputs(PeftModel.from_pretrained(base(), tmp_path / "one")), outputs(model), 1e-6)

    def test_of_other_methods_is_their_affair(self, tmp_path):
        model = get_peft_model(base(), LoraConfig(target_modules=["q_proj"]))
        model.save_pretrained(tmp_path, state_dict={})
        assert tensors(tmp_path) == {}


class TestWarnings:
    def test_of_a_pickle(self, tmp_path):
        model = trained()
        with pytest.warns(UserWarning, match=r"adapter_model\.bin, a pickle, which loading refuses"):
            model.save_pretrained(tmp_path, safe_serialization=False)

    def test_of_transformers_way_of_loading_into_wrapped_models(self, plain):
        wrapped = WRAPPERS["activation checkpointing"](base())
        with pytest.warns(UserWarning, match="PeftModel.from_pretrained"):
            wrapped.load_adapter(str(plain[0]))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*wraps")
            base().load_adapter(str(plain[0]))
