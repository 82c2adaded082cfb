"""Threads that share a model in evaluation: each gets what it would get alone, whenever the others come and go."""

import copy
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch.utils.hooks import RemovableHandle

from randlora import AdapterNamesError, RandLoraConfig, get_peft_model

from ..helpers import assert_close, features, randomise
from .test_mixed_batch import BASE, Experts, adapted, alone

PATIENCE = 20.0
NAMES = ["x", BASE, "y"]


class Thread(threading.Thread):
    """A call in a thread of its own."""

    def __init__(self, name: str, call: Callable[[], torch.Tensor]) -> None:
        super().__init__(name=name, daemon=True)
        self.call, self.found, self.error = call, None, None
        self.start()

    def run(self) -> None:
        try:
            self.found = self.call()
        except BaseException as error:  # for whoever asks for the result
            self.error = error

    def result(self) -> torch.Tensor:
        self.join(PATIENCE)
        assert not self.is_alive(), "the thread hangs"
        if self.error is not None:
            raise self.error
        return self.found


class Gate:
    """Stops the thread of a name in front of a module, until it is opened."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self.name, self.reached, self.open = name, threading.Event(), threading.Event()
        module.register_forward_pre_hook(self.stop)

    def stop(self, *_: object) -> None:
        if threading.current_thread().name == self.name:
            self.reached.set()
            assert self.open.wait(PATIENCE)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tall, self.wide = torch.nn.Linear(10, 17), torch.nn.Linear(17, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(torch.tanh(self.tall(x)))


class Blocks(torch.nn.Module):
    """Regions to compile: a block of two layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.block, self.head, self.end = Block(), torch.nn.Linear(9, 3), torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.head(self.block(x)))


def output(model, batch, **options):
    with torch.no_grad():
        return model(batch, **options)


def rows_alone(model, names, batch):
    with torch.no_grad():
        return torch.cat([alone(model, name, batch[row : row + 1]) for row, name in enumerate(names)])


class TestNames:
    """``adapter_names`` are those of one call in one thread."""

    def test_a_call_ends_while_another_thread_enters_a_layer(self):
        """Torch has then copied the hooks of the layer, and asks for each how it wants to be called."""
        model, batch = adapted(modules_to_save=["head"]), features(batch=(3,))
        model.set_adapter("x")
        expected = rows_alone(model, NAMES, batch), rows_alone(model, ["x"] * 3, batch)
        inner = model.base_model.model
        gates = [Gate(inner.square, "named"), Gate(inner.tall, "plain")]
        named = Thread("named", lambda: output(model, batch, adapter_names=NAMES))
        assert gates[0].reached.wait(PATIENCE)
        plain = Thread("plain", lambda: output(model, batch))
        assert gates[1].reached.wait(PATIENCE)
        gates[0].open.set()
        assert_close(named.result(), expected[0], 1e-6)
        gates[1].open.set()
        assert_close(plain.result(), expected[1], 1e-6)

    def test_hooks_of_two_threads_get_the_same_id(self):
        """Torch counts ids with ``+= 1``: a thread that is interrupted there sets the counter back."""
        model, batch = adapted(modules_to_save=["head"]), features(batch=(3,))
        model.base_model.model.head.modules_to_save["x"].bias.data.fill_(3.0)
        expected = {name: rows_alone(model, [name] * 3, batch) for name in "xy"}
        model.set_adapter("y")
        gate = Gate(model.base_model.model.tall, "first")
        before = RemovableHandle.next_id
        first = Thread("first", lambda: output(model, batch, adapter_names=["x"] * 3))
        assert gate.reached.wait(PATIENCE)
        RemovableHandle.next_id, after = before, RemovableHandle.next_id
        second = Thread("second", lambda: output(model, batch, adapter_names=["y"] * 3))
        assert_close(second.result(), expected["y"], 1e-6)
        gate.open.set()
        RemovableHandle.next_id = max(after, RemovableHandle.next_id)
        assert_close(first.result(), expected["x"], 1e-6)

    def test_a_copy_made_meanwhile_has_no_names(self):
        model, batch = adapted(modules_to_save=["head"]), features(batch=(3,))
        copies = []
        handle = model.base_model.model.square.register_forward_pre_hook(
            lambda *_: copies.append(copy.deepcopy(model.base_model.model))
        )
        expected = output(model, batch)
        output(model, batch, adapter_names=["y", BASE, "y"])
        handle.remove()
        assert_close(output(copies[1], batch), expected, 1e-6)

    def test_calls_within_calls(self):
        model, batch = adapted(), features(batch=(3,))
        other = adapted()
        expected, inner = rows_alone(model, NAMES, batch), rows_alone(other, ["y"] * 3, batch)
        found = []
        handle = model.base_model.model.tall.register_forward_pre_hook(
            lambda *_: found.append(output(other, batch, adapter_names=["y"] * 3))
        )
        assert_close(output(model, batch, adapter_names=NAMES), expected, 1e-6)
        handle.remove()
        assert_close(found[0], inner, 1e-6)
        assert_close(output(model, batch), rows_alone(model, ["x"] * 3, batch), 1e-6)

    def test_many_threads_that_hardly_get_a_turn(self):
        model, batch = adapted(modules_to_save=["head"]), features(batch=(3,))
        model.set_adapter("x")
        wanted = {"plain": None, "mixed": NAMES, "y": ["y"] * 3, "none": [BASE] * 3}
        expected = {kind: rows_alone(model, names or ["x"] * 3, batch) for kind, names in wanted.items()}

        def calls(kind):
            options = {} if wanted[kind] is None else {"adapter_names": wanted[kind]}
            return torch.stack([output(model, batch, **options) for _ in range(20)])

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [Thread(kind, lambda kind=kind: calls(kind)) for kind in list(wanted) * 4]
            found = [(thread.name, thread.result()) for thread in threads]
        finally:
            sys.setswitchinterval(interval)
        for kind, outputs in found:
            assert_close(outputs, expected[kind].expand_as(outputs), 1e-6, kind)

    def test_a_wrapper_that_is_not_known_is_refused(self):
        model = adapted(modules_to_save=["head"])
        head = model.base_model.model.head
        head.__class__ = type("Unknown", (type(head),), {})
        with pytest.raises(AdapterNamesError, match="Unknown"):
            model(features(batch=(3,)), adapter_names=NAMES)


class TestCompiled:
    """Code that was compiled without names gets them: Dynamo is not guarded on hooks."""

    @pytest.fixture
    def model(self):
        torch._dynamo.reset()
        model = adapted(Blocks, ["tall", "wide"], ["wide"], modules_to_save=["head"])
        model.base_model.model.head.modules_to_save["x"].bias.data.fill_(3.0)
        yield model
        torch._dynamo.reset()

    def compile(self, model):
        inner = model.base_model.model
        for region in (inner.block, inner.head):
            region.compile(backend="aot_eager")

    @pytest.mark.parametrize("first", ["plain", "named"])
    def test_names_come_and_go(self, model, first):
        batch, calls = features(batch=(3,)), [NAMES, ["y", "x", "x"], None, ["y", "y", BASE]]
        expected = [rows_alone(model, names or ["x"] * 3, batch) for names in calls]
        self.compile(model)
        if first == "plain":
            assert_close(output(model, batch), expected[2], 1e-6)
        for names, right in zip(calls, expected, strict=True):
            named = {} if names is None else {"adapter_names": names}
            assert_close(output(model, batch, **named), right, 1e-6, str(names))

    @pytest.mark.parametrize("whole", [False, True], ids=["regions", "whole"])
    def test_threads(self, model, whole):
        batch = features(batch=(3,))
        expected = [rows_alone(model, names, batch) for names in (["x"] * 3, NAMES, NAMES[::-1])]
        if whole:
            model.compile(backend="aot_eager")
        else:
            self.compile(model)
        gate = Gate(model.base_model.model.end, "named")
        named = Thread("named", lambda: output(model, batch, adapter_names=NAMES))
        assert gate.reached.wait(PATIENCE)
        assert_close(output(model, batch), expected[0], 1e-6)
        assert_close(output(model, batch, adapter_names=NAMES[::-1]), expected[2], 1e-6)
        gate.open.set()
        assert_close(named.result(), expected[1], 1e-6)
        assert_close(output(model, batch), expected[0], 1e-6)


class TestParameters:
    """A module runs with W + ΔW in the place of a parameter: of one thread at a time."""

    def test_one_thread_does_not_see_the_exchange_of_another(self):
        torch.manual_seed(0)
        model = get_peft_model(
            torch.nn.Sequential(Experts()), RandLoraConfig(r=2, target_modules=[], target_parameters=["0.stack"])
        )
        randomise(model).eval()
        wrapper, batch = model.base_model.model[0], torch.randn(2, 6)
        weight = wrapper.base_layer.stack
        with torch.no_grad():
            total = weight + wrapper.get_delta_weight("default")
            expected = torch.einsum("bi,eoi->bo", wrapper.base_layer.gate(batch), total)
        first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

        def meet(*_):
            if threading.current_thread().name == "first":
                first_in.set()
                second_in.wait(0.5)  # in vain: the second waits for its turn
            else:
                second_in.set()
                first_out.wait(0.5)

        wrapper.base_layer.gate.register_forward_pre_hook(meet)
        first = Thread("first", lambda: output(model, batch))
        assert first_in.wait(PATIENCE)
        second = Thread("second", lambda: output(model, batch))
        assert_close(first.result(), expected, 1e-6)
        first_out.set()
        assert_close(second.result(), expected, 1e-6)
        assert wrapper.base_layer.stack is weight
        assert_close(output(model, batch), expected, 1e-6)
