"""doctor: a healthy machine, and an ill one."""

from pathlib import Path

import pytest
import tomllib
import torch

from cli.helpers import answer, invoke
from randlora.analysis import environment

PROMISED = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["dependencies"]


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
    broken = [f["name"] for f in found["findings"] if f["verdict"] == "broken"]
    assert broken == ["dense layer", "very sparse layer", "structured layer"]


def test_a_package_that_is_too_old_is_named_with_the_way_out(monkeypatch):
    true_version = environment.version
    monkeypatch.setattr(environment, "version", lambda name: "0.1" if name == "peft" else true_version(name))
    assert "pip install 'peft>=" in invoke("doctor", code=1).stdout


@pytest.mark.parametrize(
    ("package", "version"), [("torch", "2.10.0"), ("transformers", "4.57.6"), ("transformers", "5.24.0")]
)
def test_versions_outside_of_the_promised_ranges_are_named(monkeypatch, package, version):
    true_version = environment.version
    monkeypatch.setattr(environment, "version", lambda name: version if name == package else true_version(name))
    monkeypatch.setattr(environment, "requires", lambda _: PROMISED)
    found = [finding for finding in environment._versions() if finding.verdict == "broken"]
    assert [finding.name for finding in found] == [package]
    assert version in found[0].detail
    assert f"pip install '{package}" in found[0].detail


def test_what_breaks_on_import_is_a_finding(monkeypatch):
    def explode(*_args):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(environment, "get_basis", explode)
    assert "RuntimeError: no such instruction" in invoke("doctor", code=1).stdout
