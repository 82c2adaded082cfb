"""Random sequences of all that can change an adapted layer, against a reference that keeps nothing between calls.

The reference is W + Σ s·ΔW in float64, formed anew for each comparison from the parameters as they are, with bases that
PEFT's own class has drawn. Calls of many tokens come between, so that the layers hold updates, and so that these are
asked for again.
"""

import tempfile
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers.pytorch_utils import Conv1D

from randlora import PeftModel, RandLoraConfig, get_peft_model, set_weight_cache
from randlora.ops import naive
from randlora.tuner.layers.weight_cache import held_bytes
from tuner.helpers import assert_close, layers_of, randomise, theirs

from .children import SLOW

NAMES = ["u", "v", "w"]
TARGETS = ["tall", "wide", "conv1d"]
IN, MIDDLE, OUT = 9, 16, 11
RANKS = st.sampled_from([3, 4])
PICKS = st.integers(0, 11)
TOKENS = st.sampled_from([1, 3, 60, 400])
FACTORS = st.sampled_from([0.5, -1.0, 1.5])
DIVERGED = 1e6
OPTIMIZERS = {
    "SGD": lambda p, fused: torch.optim.SGD(p, lr=1e-2, fused=fused),
    "AdamW": lambda p, fused: torch.optim.AdamW(p, lr=1e-2, fused=fused),
    "Adagrad": lambda p, fused: torch.optim.Adagrad(p, lr=1e-2, fused=fused),
}
counted: Counter[str] = Counter()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.tall, self.wide = nn.Linear(IN, MIDDLE), nn.Linear(MIDDLE, IN, bias=False)
        self.conv1d = Conv1D(OUT, IN)
        nn.init.normal_(self.conv1d.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1d(self.wide(self.tall(x)))


def config(rank: int) -> RandLoraConfig:
    return RandLoraConfig(r=rank, randlora_alpha=2 * rank, target_modules=TARGETS)


@pytest.fixture(scope="module", autouse=True)
def bases():
    """A and B by rank, as PEFT draws them; and the default budgets afterwards."""
    for rank in (3, 4):
        drawn = theirs(Model(), r=rank, target_modules=TARGETS)
        States.bases[rank] = (drawn.randlora_A["default"].squeeze(1), drawn.randlora_B["default"].flatten(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)
        yield
    set_weight_cache(evaluation=2 << 30, training=0)
    assert counted["held"] > 0
    print(f"\nsequences: {dict(counted)}")


# Writers past the counters of versions and the notices of optimisers, and those that tell


def in_place(p: Tensor, factor: float) -> None:
    with torch.no_grad():
        p.mul_(factor)


def through_data(p: Tensor, factor: float) -> None:
    p.data.mul_(factor)


def average(p: Tensor, factor: float) -> None:
    """As ``EMAModel.copy_to`` and ``SyncRefModelCallback`` write."""
    p.data.copy_((0.3 * p.data + 0.7 * factor * p.data).to(p.device).data)


def through_numpy(p: Tensor, factor: float) -> None:
    p.detach().numpy()[...] *= factor


def other_data(p: Tensor, factor: float) -> None:
    p.data = p.data * factor


def vector(p: Tensor, factor: float) -> None:
    vector_to_parameters(parameters_to_vector([p]) * factor, [p])


def swapped(p: Tensor, factor: float) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(p.detach() * factor, requires_grad=p.requires_grad))


def one_number(p: Tensor, factor: float) -> None:
    p.data.view(-1)[-1] += factor


WRITERS = [in_place, through_data, average, through_numpy, other_data, vector, swapped, one_number]


class States(RuleBasedStateMachine):
    bases: dict[int, tuple[Tensor, Tensor]] = {}  # noqa: RUF012 - by rank, the same for all

    @initialize(rank=RANKS)
    def begin(self, rank):
        set_weight_cache(evaluation=2 << 30, training=0)
        counted["sequences"] += 1
        self.model = get_peft_model(Model(), config(rank), "u")
        self.ranks, self.scales, self.active = {"u": rank}, {"u": 2.0}, ["u"]
        self.seed = 0
        self.arrived("u")

    # Adapters come and go

    @precondition(lambda self: self.free)
    @rule(rank=RANKS, at_once=st.booleans())
    def add(self, rank, at_once):
        name = self.free[0]
        self.model.add_adapter(name, config(rank))
        self.ranks[name], self.scales[name] = rank, 2.0
        self.arrived(name)
        if at_once:
            self.activate([name])

    @precondition(lambda self: len(self.ranks) > 1)
    @rule(pick=PICKS)
    def delete(self, pick):
        name = self.picked(pick)
        self.model.delete_adapter(name)
        del self.ranks[name], self.scales[name]
        left = [n for n in self.active if n != name]
        self.active = left or sorted(self.ranks)[:1]
        self.model.active_adapter = self.active[0]

    @rule(pick=PICKS, old_name=st.booleans())
    def save_and_load(self, pick, old_name):
        """Under a new name, or its own after other values have been there."""
        name = self.picked(pick)
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[name])
            saved = {(path, i): p.detach().clone() for path, i, p in self.parameters(name)}
            rank = self.ranks[name]
            if old_name and len(self.ranks) > 1:
                self.delete(pick)
                new = name
            elif self.free:
                new = self.free[0]
            else:
                return
            self.model.load_adapter(f"{folder}/{name}", new)
        self.ranks[new], self.scales[new] = rank, 2.0
        self.model.eval()
        for path, i, p in self.parameters(new):
            assert torch.equal(p, saved[path, i]), (path, i)
        self.activate([new])

    @rule(pick=PICKS, other=PICKS)
    def set_adapter(self, pick, other):
        self.activate(list(dict.fromkeys([self.picked(pick), self.picked(other)])))

    @rule(pick=PICKS, factor=FACTORS)
    def set_scale(self, pick, factor):
        for layer in self.layers.values():
            layer.set_scale(self.picked(pick), factor)
        self.scales[self.picked(pick)] = 2.0 * factor

    # Values change

    @rule(
        kind=st.sampled_from(sorted(OPTIMIZERS)),
        fused=st.booleans(),
        cached=st.booleans(),
        training=st.booleans(),
        tokens=TOKENS,
    )
    def train(self, kind, fused, cached, training, tokens):
        """Two steps of two micro-batches; with the gradients of the reference."""
        set_weight_cache(training=1 << 20 if cached else 0)
        self.model.train(training)
        named = [(name, path, i, p) for name in self.active for path, i, p in self.parameters(name)]
        optimizer = OPTIMIZERS[kind]([p for *_, p in named], fused)
        before = [p.detach().clone() for *_, p in named]
        for _ in range(2):
            optimizer.zero_grad()
            expected = None
            for _ in range(2):
                x = self.inputs(tokens).requires_grad_()
                self.loss(self.model(x)).backward()
                gradients = self.reference_gradients(x, named)
                expected = gradients if expected is None else [a + b for a, b in zip(expected, gradients, strict=True)]
            counted["held in training"] += cached and held_bytes() > 0
            if not max(float(wanted.abs().max()) for wanted in expected) < DIVERGED:
                break
            for (name, path, i, p), wanted in zip(named, expected, strict=True):
                assert_close(p.grad, wanted, 1e-3, f"{name} {path} {i}")
            optimizer.step()
        optimizer.zero_grad()
        self.model.eval()
        if not self.reference(self.inputs(tokens).double(), self.active).abs().max() < DIVERGED:
            with torch.no_grad():  # the next sequence of steps would leave float32
                for value, (*_, p) in zip(before, named, strict=True):
                    p.copy_(value)

    @rule(pick=PICKS, writer=st.sampled_from(WRITERS), factor=FACTORS, which=st.sampled_from([0, 1]))
    def write(self, pick, writer, factor, which):
        for _, i, p in self.parameters(self.picked(pick)):
            if i == which:
                writer(p, factor)

    @rule(writer=st.sampled_from(WRITERS), factor=FACTORS, path=st.sampled_from(TARGETS))
    def write_base(self, writer, factor, path):
        writer(self.layers[path].base_layer.weight, factor)

    @rule(factor=FACTORS, assign=st.booleans())
    def load_state(self, factor, assign):
        state = {name: value.clone() * factor for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(state, assign=assign)

    @rule(pick=PICKS, path=st.sampled_from(TARGETS))
    def other_parameters(self, pick, path):
        layer, name = self.layers[path], self.picked(pick)
        for held in (layer.randlora_lambda, layer.randlora_gamma):
            held[name] = nn.Parameter(held[name].detach() * 2, requires_grad=held[name].requires_grad)

    @rule(pick=PICKS, path=st.sampled_from(TARGETS))
    def write_into_what_is_given_out(self, pick, path):
        """Which changes nothing."""
        layer, name = self.layers[path], self.picked(pick)
        with torch.no_grad():
            given = [layer.randlora_A[name], layer.randlora_B[name], self.model.base_model.randlora_B[name]]
            for tensor in (*given, *layer.get_scaled_bases(name), layer.get_delta_weight(name)):
                tensor.data.mul_(3)

    # It is asked

    @rule(tokens=TOKENS, times=st.integers(1, 40))
    def call(self, tokens, times):
        x = self.inputs(tokens)
        with torch.no_grad():
            for _ in range(times):
                found = self.model(x)
        self.assert_right(found, x)

    @rule(pick=PICKS, budget=st.sampled_from([0, 1500, 2 << 30]))
    def other_budget(self, pick, budget):
        set_weight_cache(evaluation=budget)

    @rule(pick=PICKS)
    def mixed_batch(self, pick):
        names, x = [self.picked(pick), "__base__", self.picked(pick + 1)], self.inputs(3)
        with torch.no_grad():
            found = self.model(x, adapter_names=names)
        for name, row, value in zip(names, x, found, strict=True):
            assert_close(value, self.reference(row.double(), [] if name == "__base__" else [name]), 1e-4, name)

    @invariant()
    def right(self):
        """With many tokens, after which an update is held, and with few."""
        for tokens in (400, 1):
            x = self.inputs(tokens)
            with torch.no_grad():
                self.assert_right(self.model(x), x)
            counted["held"] += held_bytes() > 0

    # How it is done

    @property
    def layers(self):
        return layers_of(self.model.base_model.model)

    @property
    def free(self):
        return [name for name in NAMES if name not in self.ranks]

    def picked(self, number):
        present = sorted(self.ranks)
        return present[number % len(present)]

    def parameters(self, name):
        return [
            (path, i, held[name])
            for path, layer in self.layers.items()
            for i, held in enumerate((layer.randlora_lambda, layer.randlora_gamma))
        ]

    def arrived(self, name):
        self.seed += 1
        randomise(self.model, name, self.seed)
        self.model.eval()

    def activate(self, names):
        self.model.base_model.set_adapter(names)
        self.model.active_adapter = names[0]
        self.active = names

    def inputs(self, tokens):
        self.seed += 1
        return torch.randn(tokens, IN, generator=torch.Generator().manual_seed(self.seed))

    def loss(self, y):
        return y.square().mean()

    def reference(
        self, x: Tensor, names: list[str], values: dict[tuple[str, str, int], Tensor] | None = None
    ) -> Tensor:
        """The output in float64; ``values`` are λ and γ where they are to be differentiated in."""
        for path in TARGETS:
            layer, base = self.layers[path], self.layers[path].base_layer
            weight = base.weight.detach().double()
            weight = weight.T if path == "conv1d" else weight
            for name in names:
                A, B = self.bases[self.ranks[name]]
                lam, gamma = (
                    values[name, path, i] if values else p[name].detach().double()
                    for i, p in enumerate((layer.randlora_lambda, layer.randlora_gamma))
                )
                weight = weight + naive.delta_weight(
                    A.double(), B.double(), lam, gamma, self.scales[name], *weight.shape
                )
            x = naive.linear(x, weight, None, torch.zeros_like(weight))
            x = x if base.bias is None else x + base.bias.detach().double()
        return x

    def reference_gradients(self, x, named):
        values = {(name, path, i): p.detach().double().requires_grad_() for name, path, i, p in named}
        loss = self.loss(self.reference(x.detach().double(), self.active, values))
        return torch.autograd.grad(loss, list(values.values()))

    def assert_right(self, found, x):
        assert_close(found, self.reference(x.double(), self.active), 1e-4, str(self.active))


States.TestCase.settings = settings(
    max_examples=1000 if SLOW else 40, stateful_step_count=30 if SLOW else 15, suppress_health_check=list(HealthCheck)
)
TestStates = pytest.mark.filterwarnings("ignore")(States.TestCase)
