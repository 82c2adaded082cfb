"""Advice is for what a user left open, and for nothing else."""

import pytest

from randlora.train.advice import SCALING, STRUCTURED, advice
from randlora.train.settings import load_settings

NEEDED = {"model": "m", "data": "d.csv"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [SCALING, STRUCTURED]),
        ({"scaling": "peft"}, [STRUCTURED]),
        ({"alpha": 3}, [STRUCTURED]),
        ({"learning_rate": 1e-3}, [STRUCTURED]),
        ({"learning_rate": "auto"}, [STRUCTURED]),
        ({"structured": True}, [SCALING]),
        ({"structured": False}, [SCALING]),
        ({"very_sparse": True, "scaling": "paper"}, []),
        ({"resume": "auto"}, []),
        *(({"method": method}, []) for method in ("lora", "vera", "full", "head")),
    ],
)
def test_advice(given, expected):
    assert advice(load_settings(None, {**NEEDED, **given})) == expected
