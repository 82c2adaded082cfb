from pathlib import Path

import pytest
import yaml

from randlora.errors import ConfigError
from randlora.train.settings import LEARNING_RATES, TrainSettings, load_settings

NEEDED = {"model": "m", "data": "d.csv"}


def test_flags_beat_the_file(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: m\ndata: d.csv\nr: 8\nepochs: 2\n")
    settings = load_settings(config, {"r": 4})
    assert (settings.r, settings.epochs, settings.model) == (4, 2.0, "m")


def test_every_fault_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        load_settings(None, {"r": 0, "dropout": 1.5, "method": "lorra", "epocs": 3})
    message = str(caught.value)
    for expected in (
        "r=0",
        "dropout=1.5",
        "method='lorra'",
        "epocs",
        "did you mean 'epochs'",
        "model: missing",
        "data",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eval_fraction", 0), ("eval_fraction", 1), ("max_length", 1), ("alpha", 0), ("learning_rate", -1),
        ("warmup_fraction", 1), ("weight_decay", -0.1), ("epochs", 0), ("max_steps", 0), ("batch_size", 0),
        ("gradient_accumulation", 0), ("seed", -1), ("save_steps", 0), ("eval_steps", 0), ("scaling", "none"),
        ("schedule", "step"), ("task", "ner"), ("bf16", "perhaps"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        load_settings(None, {**NEEDED, name: value})


@pytest.mark.parametrize(
    ("content", "expected"),
    [("- a\n- b\n", "holds a list"), ("model: [", "is no YAML"), (b"\xff\xfe\x00", "is no YAML")],
)
def test_a_bad_file_is_named(tmp_path, content, expected):
    config = tmp_path / "run.yaml"
    config.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=expected):
        load_settings(config)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_settings("nowhere.yaml")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("all-linear", "all-linear"),
        ("query", ["query"]),
        ("query, value", ["query", "value"]),
        (r".*\.query$", r".*\.query$"),
        (["query"], ["query"]),
    ],
)
def test_targets_as_peft_takes_them(given, expected):
    assert load_settings(None, {**NEEDED, "target_modules": given}).targets == expected


def test_each_method_has_a_learning_rate_of_its_own():
    for method, rate in LEARNING_RATES.items():
        assert load_settings(None, {**NEEDED, "method": method}).peak_learning_rate == rate
    assert load_settings(None, {**NEEDED, "learning_rate": 0.5}).peak_learning_rate == 0.5


def test_the_papers_scaling_has_an_alpha_and_a_learning_rate_of_its_own():
    paper = load_settings(None, {**NEEDED, "scaling": "paper", "r": 8})
    assert (paper.peak_learning_rate, paper.scaling_alpha) == (3e-3, 16)
    given = load_settings(None, {**NEEDED, "scaling": "paper", "alpha": 5, "learning_rate": 0.5})
    assert (given.peak_learning_rate, given.scaling_alpha) == (0.5, 5)
    other = load_settings(None, {**NEEDED, "scaling": "paper", "method": "lora", "r": 8})
    assert (other.peak_learning_rate, other.scaling_alpha) == (LEARNING_RATES["lora"], 16)


def test_resolved_settings_have_the_numbers_that_are_taken():
    found = load_settings(None, {**NEEDED, "r": 8}).resolved()
    assert (found["learning_rate"], found["alpha"]) == (3e-4, 160)
    assert load_settings(None, {**NEEDED, "method": "vera"}).resolved()["alpha"] is None
    given = {**NEEDED, "method": "lora", "learning_rate": 0.5, "alpha": 3.0}
    assert load_settings(None, given).resolved() == load_settings(None, given).model_dump()


def test_resolved_settings_read_back_as_they_were(tmp_path):
    settings = load_settings(None, {**NEEDED, "modules_to_save": "pooler,score", "alpha": 3})
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump()))
    assert load_settings(path) == settings
    assert settings.modules_to_save == ["pooler", "score"]


@pytest.mark.parametrize("config", sorted(Path(__file__).parents[2].glob("configs/*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_can_be_used(config):
    assert isinstance(load_settings(config), TrainSettings)


def test_configs_are_shipped():
    assert list(Path(__file__).parents[2].glob("configs/*.yaml"))
