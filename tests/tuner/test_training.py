"""Training as users do it: loops, checkpointing, compilation, precision, bias, Trainer."""

import copy

import pytest
import torch
from peft import prepare_model_for_kbit_training
from torch import nn

from randlora import RandLoraConfig, get_peft_model
from randlora.ops.plan import Plan, force

from .helpers import (
    LLAMA_TARGETS,
    STACK_TARGETS,
    assert_close,
    assert_same_tensors,
    bert,
    features,
    gpt2,
    gradients,
    llama,
    ours,
    output,
    randomise,
    stack,
    tokens,
)


def train(model: nn.Module, steps: int = 12, lr: float = 1e-2) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    x = features(batch=(32,))
    target = torch.stack([x[:, 0], x[:, 1] * x[:, 2], x[:, 3].abs()], dim=1)
    losses = []
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class TestWhatTrains:
    def test_only_lambda_and_gamma(self):
        model = get_peft_model(llama(), RandLoraConfig(r=4, target_modules=LLAMA_TARGETS))
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trainable) == 2 * 7 * 2
        assert all(name.endswith((".randlora_lambda.default", ".randlora_gamma.default")) for name in trainable)

    def test_their_number_is_that_of_the_paper(self, capsys):
        model = get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS))
        # n·(r + m): tall m=10 n=3, wide m=9 n=3, square m=9 n=3
        expected = 3 * (4 + 10) + 3 * (4 + 9) + 3 * (4 + 9)
        trainable, total = model.get_nb_trainable_parameters()
        assert trainable == expected
        assert total == expected + sum(p.numel() for p in stack().parameters())
        model.print_trainable_parameters()
        assert f"trainable params: {expected}" in capsys.readouterr().out

    def test_a_smaller_rank_trains_more(self):
        counts = [
            get_peft_model(llama(), RandLoraConfig(r=r, target_modules=["q_proj"])).get_nb_trainable_parameters()[0]
            for r in (1, 2, 4, 8, 16)
        ]
        assert counts == sorted(counts, reverse=True)
        assert len(set(counts)) == 5

    def test_training_learns_and_leaves_everything_else(self):
        model = get_peft_model(stack(), RandLoraConfig(r=4, randlora_alpha=8, target_modules=STACK_TARGETS))
        before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        losses = train(model, steps=40)
        assert losses[-1] < 0.8 * losses[0]
        assert_same_tensors({name: p for name, p in model.named_parameters() if name in before}, before)

    @pytest.mark.parametrize("bias", ["none", "all", "randlora_only"])
    def test_bias(self, bias):
        model = get_peft_model(stack(), RandLoraConfig(r=4, bias=bias, target_modules=["tall", "wide"]))
        biases = {name for name, p in model.named_parameters() if p.requires_grad and "bias" in name}
        prefix = "base_model.model."
        adapted = {f"{prefix}{name}.base_layer.bias" for name in ("tall", "wide")}
        rest = {f"{prefix}{name}.bias" for name in ("square", "head")}
        assert biases == {"none": set(), "all": adapted | rest, "randlora_only": adapted}[bias]
        before = {name: p.detach().clone() for name, p in model.named_parameters() if name in biases}
        train(model, steps=2)
        after = dict(model.named_parameters())
        assert all(not torch.equal(after[name], value) for name, value in before.items())

    @pytest.mark.parametrize("plan", [Plan("token", "token", "token"), Plan("fused", "fused", "weight")], ids=str)
    def test_bias_gradient_is_that_of_the_base_layer(self, plan):
        model = get_peft_model(stack(), RandLoraConfig(r=4, bias="all", target_modules=["tall", "wide"]))
        plain = stack()
        with force(plan):
            output(model).square().sum().backward()
        output(plain).square().sum().backward()
        found = gradients(model)
        for name in ("tall", "wide"):
            assert_close(found[f"base_model.model.{name}.base_layer.bias"], getattr(plain, name).bias.grad, 1e-5)

    def test_modules_to_save(self):
        config = RandLoraConfig(r=4, target_modules=STACK_TARGETS, modules_to_save=["head"])
        model = get_peft_model(stack(), config)
        original = model.base_model.model.head.original_module.weight.detach().clone()
        train(model, steps=2)
        head = model.base_model.model.head
        assert torch.equal(head.original_module.weight, original)
        assert not torch.equal(head.modules_to_save["default"].weight, original)


class TestGradientCheckpointing:
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("build", [llama, bert, gpt2])
    def test_same_gradients(self, build, reentrant):
        targets = {llama: LLAMA_TARGETS, bert: ["query", "dense"], gpt2: ["c_attn", "c_proj"]}[build]
        model = get_peft_model(build(), RandLoraConfig(r=4, randlora_alpha=8, target_modules=targets))
        randomise(model).train()
        output(model).square().sum().backward()
        expected = gradients(model)
        model.zero_grad()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        output(model).square().sum().backward()
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(found[name], value, 1e-6, name)

    def test_prepared_as_for_quantised_training(self):
        base = prepare_model_for_kbit_training(llama())
        model = randomise(get_peft_model(base, RandLoraConfig(r=4, target_modules=LLAMA_TARGETS))).train()
        output(model).sum().backward()
        assert all(gradient.norm() > 0 for gradient in gradients(model).values())


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
    def test_dtype_of_lambda_and_gamma(self, dtype, autocast_adapter_dtype):
        config = RandLoraConfig(r=4, target_modules=STACK_TARGETS)
        model = get_peft_model(stack().to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
        expected = torch.float32 if autocast_adapter_dtype else dtype
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
        y = output(randomise(model), dtype)
        assert y.dtype == dtype
        y.float().sum().backward()
        assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {expected}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_base_is_close_to_float64(self, dtype):
        config = {"r": 4, "randlora_alpha": 8, "target_modules": STACK_TARGETS}
        half = randomise(ours(stack().to(dtype), **config))
        exact = copy.deepcopy(half).double()
        tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        found, expected = output(half, dtype), output(exact, torch.float64)
        assert_close(found.detach(), expected.detach(), tolerance)
        found.double().square().sum().backward()
        expected.square().sum().backward()
        for name, value in gradients(exact).items():
            assert_close(gradients(half)[name], value, 3 * tolerance, name)

    def test_autocast(self):
        model = randomise(ours(llama(), r=4, randlora_alpha=8, target_modules=LLAMA_TARGETS), scale=0.1)
        expected = output(model)
        expected.square().sum().backward()
        exact = gradients(model)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            found = output(model)
            loss = found.float().square().sum()
        loss.backward()
        assert_close(found.detach(), expected.detach(), 3e-2)
        for name, value in gradients(model).items():
            assert value.dtype == torch.float32
            assert_close(value, exact[name], 2e-1, name)

    @pytest.mark.parametrize("init_weights", [True, False])
    def test_parameters_are_never_rounded_to_the_base_dtype(self, init_weights):
        config = {"r": 4, "target_modules": STACK_TARGETS, "init_weights": init_weights}
        torch.manual_seed(0)
        model = ours(stack().bfloat16(), **config)
        gamma = model.model.tall.randlora_gamma["default"]
        assert torch.equal(gamma, torch.full_like(gamma, 1 / 10 if init_weights else 1 / 17))
        lam = model.model.tall.randlora_lambda["default"]
        assert init_weights or not torch.equal(lam, lam.bfloat16().float())

    def test_lambda_below_the_resolution_of_bf16_trains(self):
        model = ours(stack().bfloat16(), r=4, target_modules=STACK_TARGETS)
        lam = model.model.tall.randlora_lambda["default"]
        lam.data.fill_(1.0)
        optimizer = torch.optim.SGD([lam], lr=1e-4)
        lam.grad = torch.ones_like(lam)
        optimizer.step()
        assert torch.equal(lam, torch.full_like(lam, 1 - 1e-4))


@pytest.mark.parametrize("build", [stack, llama])
def test_compiled_training_in_one_graph_without_recompilation(build):
    torch._dynamo.reset()
    targets = STACK_TARGETS if build is stack else LLAMA_TARGETS
    key = 100 + len(targets)  # bases that nothing else has used, so that the first call is the first
    model = randomise(ours(build(), r=4, randlora_alpha=8, projection_prng_key=key, target_modules=targets))
    plain = copy.deepcopy(model)
    # whole models of transformers may break the graph for reasons of their own: compile an adapted block
    block, reference = (m.model if build is stack else m.model.model.layers[0].mlp for m in (model, plain))
    x = features() if build is stack else torch.randn(3, 8, 16)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-6) for m in (block, reference)]
    for step in range(4):
        results = []
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            for run, optimizer in zip((compiled, reference), optimizers, strict=True):
                y = run(x)
                optimizer.zero_grad()
                y.square().sum().backward()
                optimizer.step()
                results.append(y.detach())
        assert_close(results[0], results[1], 1e-5)


def test_bases_go_with_a_model_before_anything_is_compiled():
    """A compiled call that needed them first would cast them within its graph."""
    model = ours(stack(), r=4, projection_prng_key=4321, target_modules=STACK_TARGETS)
    forms = model.model.tall.basis("default").stored.forms
    before = len(list(forms))
    model.bfloat16()
    assert len(list(forms)) == before + 1
    with torch.inference_mode():
        torch.compile(model.model, backend="aot_eager", fullgraph=True)(features().bfloat16())
    assert len(list(forms)) == before + 1


AUTOCAST = [None, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("autocast", AUTOCAST, ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
def test_a_whole_compiled_model_is_one_graph_forward_and_backward(dtype, autocast):
    torch._dynamo.reset()
    model = ours(llama(num_hidden_layers=1).to(dtype), r=4, randlora_alpha=8, target_modules=LLAMA_TARGETS)
    compiled = torch.compile(randomise(model).model, fullgraph=True, backend="aot_eager")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ids, found = tokens(), []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        compiled(input_ids=ids, use_cache=False)  # what it makes of the bases must serve training, or not be kept
    for run in (compiled, model.model):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append({name: p.grad.clone() for name, p in parameters.items()} | {"loss": loss.detach()})
    for name, gradient in found[0].items():
        assert_close(gradient, found[1][name], TOLERANCE[dtype if autocast is None else autocast], name)


@pytest.mark.parametrize("kind", [{}, {"structured": True, "groups": 4}], ids=["dense", "structured"])
def test_one_compiled_graph_for_several_numbers_of_tokens(kind):
    torch._dynamo.reset()
    model = randomise(ours(stack().bfloat16(), r=4, target_modules=STACK_TARGETS, **kind))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.model, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for count in (9, 12, 10):
        x = torch.randn(count, features().shape[-1]).bfloat16().requires_grad_()
        found = []
        for run in (compiled, model.model):
            with force(Plan("token", "token", "token")):  # the cheapest one depends on the number of tokens
                run(x).sum().backward()
            found.append(x.grad)
            x.grad = None
        assert_close(*found, TOLERANCE[torch.bfloat16])
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


class TestNothingIsKept:
    def test_saved_tensors_of_a_model_are_inputs_and_parameters(self):
        """No layer keeps its Ã or ΔW: the parameters' sizes times the number of layers would show."""
        model = randomise(ours(stack(), r=4, target_modules=STACK_TARGETS))
        known = {t.untyped_storage().data_ptr() for t in model.parameters()}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = model(features())
        extra = {t.untyped_storage().data_ptr(): t for t in saved if t.untyped_storage().data_ptr() not in known}
        # x, and the outputs of three tanh, which the layers' inputs share
        assert sorted(t.shape[-1] for t in extra.values()) == sorted([10, 17, 9, 9])
        y.sum().backward()

    def test_one_input_shared_by_three_layers_is_kept_once(self):
        model = ours(llama(num_hidden_layers=1), r=4, target_modules=["q_proj", "k_proj", "v_proj"])
        attention = model.model.model.layers[0].self_attn
        x = torch.randn(2, 5, 16, requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            outputs = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
        assert len([t for t in saved if t.data_ptr() == x.data_ptr()]) == 3
        assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in (x, *model.parameters())}
        sum(y.sum() for y in outputs).backward()


def test_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(llama(), RandLoraConfig(r=4, randlora_alpha=8, target_modules=LLAMA_TARGETS))
    data = [{"input_ids": row, "labels": row} for row in tokens(batch=8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_steps=3,
        disable_tqdm=True,
        use_cpu=True,
    )
    before = output(model)
    Trainer(model=model, args=arguments, train_dataset=data).train()
    saved = sorted(path.name for path in (tmp_path / "checkpoint-3").glob("adapter_*"))
    assert saved == ["adapter_config.json", "adapter_model.safetensors"]
    from randlora import PeftModel

    model.eval()
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-3")
    assert torch.equal(output(loaded), output(model))
    assert not torch.equal(output(loaded), before)
