"""doctor: a healthy machine, and an ill one."""

import torch

from cli.helpers import answer, invoke
from randlora.analysis import environment


def test_this_machine_is_healthy():
    found = answer("doctor")
    assert found["healthy"]
    by_name = {finding["name"]: finding for finding in found["findings"]}
    assert by_name["torch"]["detail"] == torch.__version__
    assert by_name["registration"]["verdict"] == by_name["dense layer"]["verdict"] == "ok"
    assert "nothing is broken" in invoke("doctor").stdout


def test_products_that_compute_nonsense_are_found(monkeypatch):
    monkeypatch.setattr(
        environment, "adapted_linear", lambda x, _bases, _lam, _gamma, _scaling, out: x.new_zeros(len(x), out)
    )
    found = answer("doctor", code=1)
    assert [f["name"] for f in found["findings"] if f["verdict"] == "broken"] == ["dense layer", "very sparse layer"]


def test_a_package_that_is_too_old_is_named_with_the_way_out(monkeypatch):
    true_version = environment.version
    monkeypatch.setattr(environment, "version", lambda name: "0.1" if name == "peft" else true_version(name))
    assert "pip install 'peft>=" in invoke("doctor", code=1).stdout


def test_what_breaks_on_import_is_a_finding(monkeypatch):
    def explode(*_args):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(environment, "get_basis", explode)
    assert "RuntimeError: no such instruction" in invoke("doctor", code=1).stdout
