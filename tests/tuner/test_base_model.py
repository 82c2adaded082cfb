"""Configs of base models that are damaged, or asked for by a stranger."""

import json

import pytest

from randlora import ConfigError
from randlora.tuner.base_model import empty_base
from reliability.limits import bounded

from .helpers import llama

FAULTS = {
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
    "a negative size": ({"hidden_size": -4}, "negative dimension"),
    "a size beyond 64 bits": ({"hidden_size": 10**30}, "no model can be made"),
    "a size that is a word": ({"hidden_size": "big"}, "expected int"),
    "too many heads": ({"num_attention_heads": 10**9}, "not a multiple"),
}


def test_the_config_itself_is_sound(tmp_path):
    llama().config.save_pretrained(tmp_path)
    assert all(p.is_meta for p in empty_base(tmp_path, "CAUSAL_LM").parameters())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_config_is_refused_in_one_line(fault, tmp_path):
    change, said = FAULTS[fault]
    (tmp_path / "config.json").write_text(json.dumps(llama().config.to_dict() | change))
    with bounded(), pytest.raises(ConfigError, match=said) as refusal:
        empty_base(tmp_path, "CAUSAL_LM")
    assert "\n" not in str(refusal.value)


def test_so_is_one_within_another(tmp_path):
    content = {"model_type": "llava", "text_config": llama().config.to_dict() | {"num_hidden_layers": 10**9}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with bounded(), pytest.raises(ConfigError, match="num_hidden_layers=1000000000"):
        empty_base(tmp_path, None)
