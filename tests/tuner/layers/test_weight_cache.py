"""Updates ΔW that layers keep between calls: what they save, what they cost, when they go, and that they are right."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora import RandLoraConfig, get_peft_model, set_weight_cache
from randlora.ops import naive
from randlora.ops import plan as plans
from randlora.ops.bases import basis_from_projections
from randlora.ops.plan import Plan, force
from randlora.tuner.layers import weight_cache as held
from randlora.tuner.layers.weight_cache import held_bytes

from ..helpers import assert_close, randomise

IN, OUT = 12, 20


def bytes_of(*ranks):
    """Of the sum of the updates of adapters of these ranks, in float32, and copies of their λ and γ."""
    return 4 * (IN * OUT + sum(-(-IN // r) * (r + IN) for r in ranks))


BYTES = bytes_of(4)


class Model(nn.Module):
    def __init__(self, conv1d=False, bias=True, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        from transformers.pytorch_utils import Conv1D

        self.lin = Conv1D(OUT, IN) if conv1d else nn.Linear(IN, OUT, bias=bias)
        self.to(dtype)

    def forward(self, x):
        return self.lin(x)


@pytest.fixture(autouse=True)
def budget():
    """Each test starts with nothing held, and ends with the defaults."""
    gc.collect()
    for holder in held._living():
        holder.release()
    yield
    set_weight_cache(evaluation=2 << 30, training=0)


def adapted(**kind):
    model = get_peft_model(Model(**kind), RandLoraConfig(r=4, target_modules=["lin"]))
    return randomise(model).eval()


def settled(model, x, calls=400):
    """The output after enough calls to make holding worth it."""
    with torch.no_grad():
        for _ in range(calls):
            y = model(x)
            if held_bytes():
                break
        return model(x), y


X = torch.randn(1, IN, generator=torch.Generator().manual_seed(3))


class TestEvaluation:
    @pytest.mark.parametrize("kind", [{}, {"conv1d": True}, {"bias": False}], ids=str)
    def test_it_is_held_after_some_calls_and_gives_the_same(self, kind, monkeypatch):
        monkeypatch.setattr(plans, "rates", plans.Rates(element=0.0))  # as if the layer were large
        model = adapted(**kind)
        with torch.no_grad():
            first = model(X)
        assert held_bytes() == 0  # one token alone does not pay for the sum
        later, _ = settled(model, X)
        assert held_bytes() == BYTES
        torch.testing.assert_close(later, first)

    def test_a_call_that_forms_the_sum_anyway_keeps_it(self):
        model = adapted()
        with torch.no_grad():
            model(torch.randn(500, IN))
        assert held_bytes() == BYTES

    def test_several_active_adapters_are_one_sum(self):
        model = adapted()
        model.add_adapter("other", RandLoraConfig(r=3, target_modules=["lin"]))
        randomise(model).eval()
        model.base_model.set_adapter(["default", "other"])
        with torch.no_grad():
            expected = model.base_model.model.lin.base_layer(X)
            for name in ("default", "other"):
                expected = expected + X @ model.base_model.model.lin.get_delta_weight(name).T
        torch.testing.assert_close(settled(model, X)[0], expected)
        assert held_bytes() == bytes_of(4, 3)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_under_either_mode_and_trainable_afterwards(self, mode):
        model = adapted()
        with mode():
            model(torch.randn(500, IN))
        assert held_bytes() == BYTES
        model.train()
        model(X).sum().backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "randlora_" in n)

    def test_not_in_half_precision(self):
        """There the sum would round small updates away."""
        settled(adapted(dtype=torch.bfloat16), X.bfloat16(), calls=30)
        assert held_bytes() == 0

    def test_not_while_gradients_are_recorded(self):
        adapted()(torch.randn(500, IN))
        assert held_bytes() == 0


def change_lambda(model):
    with torch.no_grad():
        model.base_model.model.lin.randlora_lambda["default"].mul_(2)


def change_gamma(model):
    with torch.no_grad():
        model.base_model.model.lin.randlora_gamma["default"].add_(0.1)


def change_weight(model):
    with torch.no_grad():
        model.base_model.model.lin.base_layer.weight.zero_()


def replace_lambda(model):
    p = model.base_model.model.lin.randlora_lambda["default"]
    p.data = p.data * 3


def load_state(model):
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})


def rescale(model):
    model.base_model.model.lin.scaling["default"] *= 2


def through_data(model):
    model.base_model.model.lin.randlora_lambda["default"].data.mul_(2)


def weight_through_data(model):
    model.base_model.model.lin.base_layer.weight.data.mul_(2)


def one_number_through_numpy(model):
    model.base_model.model.lin.randlora_gamma["default"].detach().numpy()[1, 2] += 3


def average_of_all(model):
    """As diffusers' ``EMAModel.copy_to`` writes: into base weights too."""
    for p in model.parameters():
        p.data.copy_((0.25 * p.data).to(p.device).data)


def load_state_assigning(model):
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()}, assign=True)


def other_basis(model):
    layer = model.base_model.model.lin
    layer.bind_basis("default", basis_from_projections(torch.randn(4, 1, IN), torch.randn(OUT, 3, 4)))


CHANGES = [
    change_lambda,
    change_gamma,
    change_weight,
    replace_lambda,
    load_state,
    rescale,
    through_data,
    weight_through_data,
    one_number_through_numpy,
    average_of_all,
    load_state_assigning,
    other_basis,
]


class TestItIsNeverStale:
    @pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
    def test_after_a_change(self, change):
        model = adapted()
        before, _ = settled(model, X)
        assert held_bytes() == BYTES
        change(model)
        with torch.no_grad():
            after = model(X)
            layer = model.base_model.model.lin
            expected = layer.base_layer(X) + X @ layer.get_delta_weight("default").T
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, expected)

    def test_for_another_adapter_at_the_addresses_of_a_deleted_one(self):
        def config():
            return RandLoraConfig(r=8, randlora_alpha=8, target_modules=["lin"])

        model = get_peft_model(Model(), config(), adapter_name="keep").eval()
        layer, x = model.base_model.model.lin, torch.randn(500, IN)
        for _ in range(30):
            model.add_adapter("new", config())
            model.set_adapter("new")
            nn.init.normal_(layer.randlora_lambda["new"])
            model.eval()
            with torch.no_grad():
                found = [model(x) for _ in range(3)][-1]
                assert held_bytes()
                torch.testing.assert_close(found, layer.base_layer(x) + x @ layer.get_delta_weight("new").T)
            model.set_adapter("keep")
            model.delete_adapter("new")

    def test_numbers_that_are_equal_to_none_are_compared_too(self):
        """NaN is held as any other bits, and goes with them."""
        model, x = adapted(), torch.randn(500, IN)
        lam = model.base_model.model.lin.randlora_lambda["default"]
        before = lam.detach().clone()
        with torch.no_grad():
            expected = model(x)
            lam.data.fill_(float("nan"))
            assert model(x).isnan().all()
            assert model(x).isnan().all()
            lam.data.copy_(before)
            torch.testing.assert_close(model(x), expected)

    def test_switching_and_disabling(self):
        model = adapted()
        model.add_adapter("other", RandLoraConfig(r=3, target_modules=["lin"]))
        randomise(model).eval()
        layer = model.base_model.model.lin
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            found, _ = settled(model, X)
            expected = layer.base_layer(X) + X @ layer.get_delta_weight(name).T
            torch.testing.assert_close(found, expected.detach())
        with model.disable_adapter(), torch.no_grad():
            torch.testing.assert_close(model(X), layer.base_layer(X))


LEAVES = {
    "train": lambda model: model.train(),
    "dtype": lambda model: model.double(),
    "device": lambda model: model.to("meta"),
    "merge": lambda model: model.merge_adapter(),
    "budget": lambda model: set_weight_cache(evaluation=0),
    "delete": lambda model: model.delete_adapter("default"),
}


class TestItGoes:
    @pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES)
    def test_at_once(self, leave):
        model = adapted()
        settled(model, X)
        assert held_bytes() == BYTES
        leave(model)
        assert held_bytes() == 0

    def test_with_the_layer(self):
        model = adapted()
        settled(model, X)
        tensor = weakref.ref(model.base_model.model.lin._held._held.update)
        del model
        gc.collect()
        assert tensor() is None
        assert held_bytes() == 0

    def test_eval_keeps_it(self):
        model = adapted()
        settled(model, X)
        model.eval()
        assert held_bytes() == BYTES

    def test_copies_and_pickles_hold_nothing(self):
        model = adapted()
        expected, _ = settled(model, X)
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert held_bytes() == BYTES
        with torch.no_grad():
            torch.testing.assert_close(twin(X), expected)
            torch.testing.assert_close(loaded(X), expected)


def test_traced_in_evaluation():
    """A trace is checked by tracing again, which would find an update held that was not before."""
    model, x = adapted().base_model.model, torch.randn(500, IN)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x), model(x))


def test_as_exact_as_the_model():
    """In float64 the update of a float32 adapter is no float32 number."""
    model, x = adapted(dtype=torch.float64), torch.randn(500, IN, dtype=torch.float64)
    layer = model.base_model.model.lin
    lam, gamma = (held["default"].detach().double() for held in (layer.randlora_lambda, layer.randlora_gamma))
    A, B = layer.randlora_A["default"].squeeze(1).double(), layer.randlora_B["default"].flatten(1).double()
    update = naive.delta_weight(A, B, lam, gamma, layer.scaling["default"], OUT, IN)
    with torch.no_grad():
        for tokens in (500, 500, 1):
            expected = layer.base_layer(x[:tokens]) + x[:tokens] @ update.T
            torch.testing.assert_close(model(x[:tokens]), expected, rtol=1e-12, atol=1e-12)
    assert held_bytes() > 8 * IN * OUT


class TestBudget:
    def test_a_layer_without_room_computes_as_before(self):
        set_weight_cache(evaluation=BYTES + 1)
        first, second = adapted(), adapted()
        expected, _ = settled(first, X)
        found, _ = settled(second, X, calls=30)
        assert held_bytes() == BYTES
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("name", ["evaluation", "training"])
    def test_negative_is_refused(self, name):
        with pytest.raises(ValueError, match=f"the {name} budget is a number of bytes"):
            set_weight_cache(**{name: -1})

    def test_is_part_of_the_package(self):
        assert randlora.set_weight_cache is set_weight_cache


class TestTraining:
    def gradients(self, model, batches, plan):
        model.train().zero_grad()
        for batch in batches:
            with force(plan):
                model(batch).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize("plan", [Plan("token", "token", "token"), Plan("fused", "fused", "weight")], ids=str)
    def test_one_sum_serves_all_micro_batches_and_gives_the_same_gradients(self, plan):
        model = adapted()
        batches = [torch.randn(300, IN, requires_grad=True) for _ in range(3)]
        expected = self.gradients(model, batches, plan)
        wanted_inputs = [batch.grad.clone() for batch in batches]
        assert held_bytes() == 0
        set_weight_cache(training=BYTES)
        for batch in batches:
            batch.grad = None
        found = self.gradients(model, batches, plan)
        for name, value in expected.items():
            assert_close(found[name], value, 1e-5, name)
        for batch, value in zip(batches, wanted_inputs, strict=True):
            assert_close(batch.grad, value, 1e-5)

    def test_an_optimiser_step_ends_it(self):
        set_weight_cache(training=BYTES)
        model = adapted().train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        x = torch.randn(300, IN)
        model(x).sum().backward()
        assert held_bytes() == BYTES
        update = model.base_model.model.lin._held._held.update
        optimizer.step()
        model(x)
        assert model.base_model.model.lin._held._held.update is not update
        assert held_bytes() == BYTES

    @pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adagrad", "bitsandbytes"])
    def test_optimisers_that_leave_the_version_as_it_is_learn_the_same(self, kind):
        def losses(budget):
            set_weight_cache(training=budget)
            model, found = adapted().train(), []
            parameters = [p for p in model.parameters() if p.requires_grad]
            if kind == "bitsandbytes":
                optimizer = pytest.importorskip("bitsandbytes").optim.AdamW(parameters, lr=1e-2)
            else:
                optimizer = getattr(torch.optim, kind)(parameters, lr=1e-5 if kind == "SGD" else 1e-2, fused=True)
            generator = torch.Generator().manual_seed(4)
            x, y = torch.randn(300, IN, generator=generator), torch.randn(300, OUT, generator=generator)
            for _ in range(20):
                loss = (model(x) - y).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.detach())
                assert held_bytes() == budget
            return torch.stack(found)

        without = losses(0)
        torch.testing.assert_close(losses(BYTES), without, rtol=1e-5, atol=0)
        assert without[-1] < 0.97 * without[0]

    def test_a_penalty_on_the_gradient_has_the_same_gradients(self):
        """Dx depends on λ and γ, also where a held update has made it."""

        def gradients(budget):
            set_weight_cache(training=budget)
            model, x = adapted().train(), torch.randn(300, IN, generator=torch.Generator().manual_seed(4))
            (dx,) = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x, create_graph=True)
            assert held_bytes() == budget
            return torch.autograd.grad(dx.square().sum(), [p for p in model.parameters() if p.requires_grad])

        for value, wanted in zip(gradients(BYTES), gradients(0), strict=True):
            assert_close(value, wanted, 1e-5)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_may_find_held_when_it_computes_again(self, reentrant):
        """What was not held before."""
        model, x = adapted().train(), torch.randn(4, IN, requires_grad=True)

        def gradients(budget):
            set_weight_cache(training=budget)
            model.zero_grad()
            for _ in range(60):
                checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
            return [p.grad for p in model.parameters() if p.requires_grad]

        expected = gradients(0)
        found = gradients(BYTES)
        assert held_bytes() == BYTES
        for value, wanted in zip(found, expected, strict=True):
            assert_close(value, wanted, 1e-5)
