"""Each task: what it reads, what counts, what it refuses, and that a tiny model learns it and can be used."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image
from transformers import (
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from randlora.errors import ConfigError
from randlora.train.data import load_data
from randlora.train.infer import generate_text, predict_labels, score
from randlora.train.run import resolve, train
from randlora.train.settings import TrainSettings
from randlora.train.tasks import TASKS
from randlora.train.tasks.base import IGNORED
from randlora.train.trained import load_trained

TEMPLATE = (
    "{% for m in messages %}[CLS] {{ m['role'] }} {{ m['content'] }} [SEP]{% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant{% endif %}"
)


def settings(model, data, output, **changes) -> TrainSettings:
    values = {
        "model": str(model),
        "data": str(data),
        "output_dir": str(output / "run"),
        "r": 8,
        "max_length": 32,
        "batch_size": 8,
        "max_steps": 30,
        "learning_rate": 1e-2,
        "report_to": ["none"],
    }
    return TrainSettings(**{**values, **changes})


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tagged(tmp_path):
    """Names of two kinds; each word tells its tag."""
    words = {"anna": "B-PER", "smith": "I-PER", "berlin": "B-LOC", "saw": "O", "xyzzyquux": "O"}
    rows = [
        {"tokens": [*pair, f"{n}"], "tags": [words[pair[0]], words[pair[1]], "O"]}
        for n in range(20)
        for pair in (("anna", "smith"), ("saw", "berlin"), ("xyzzyquux", "anna"))
    ]
    return write_lines(tmp_path / "tagged.jsonl", rows)


@pytest.fixture
def colours(tmp_path):
    """Two colours of image, in folders named after them."""
    draw = np.random.default_rng(0)
    for name, colour in (("red", (200, 20, 20)), ("blue", (20, 20, 200))):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(20):
            pixels = np.clip(np.array(colour) + draw.integers(-20, 20, (24, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory):
    set_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **shape)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


class TestTokenClassification:
    @pytest.mark.parametrize("method", ["randlora", "lora"])
    def test_it_learns_and_is_used(self, tiny_bert, tagged, tmp_path, method):
        result = train(settings(tiny_bert, tagged, tmp_path, task="token-classification", method=method))
        assert result.metrics["eval_accuracy"] > 0.9
        assert result.metrics["eval_f1"] > 0.8
        row = json.loads((tmp_path / "run/predictions.jsonl").read_text().splitlines()[0])
        assert len(row["label"].split()) == len(row["predicted"].split()) == 3
        trained = load_trained(tmp_path / "run")
        assert isinstance(trained.model.base_model.model, BertForTokenClassification)
        (found,) = predict_labels(trained, ["anna smith saw berlin"])
        assert found.words == ["anna", "smith", "saw", "berlin"]
        assert found.labels[0] == "B-PER"
        again = score(trained).outcome.metrics
        assert again["accuracy"] == pytest.approx(result.metrics["eval_accuracy"])

    def test_the_first_piece_of_a_word_has_its_tag(self, tiny_bert, tagged, tmp_path):
        run = resolve(settings(tiny_bert, tagged, tmp_path, task="token-classification"))
        prepared = TASKS["token-classification"].prepare(run.data.train, run.processor, run.settings)
        for row, given in zip(prepared, run.data.train, strict=True):
            assert [label for label in row["labels"] if label != IGNORED] == given["tags"]
            assert row["labels"][0] == row["labels"][-1] == IGNORED  # [CLS], [SEP]
        assert any(
            len(row["input_ids"]) > 2 + len(given["tokens"])
            for row, given in zip(prepared, run.data.train, strict=True)
        )

    def test_numbers_with_names(self, tiny_bert, tmp_path):
        features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=["O", "B-X"]))})
        data = Dataset.from_dict({"tokens": [["a", str(n)] for n in range(20)], "tags": [[1, 0]] * 20}, features)
        data.save_to_disk(tmp_path / "saved")
        found = load_data(settings(tiny_bert, tmp_path / "saved", tmp_path, task="token-classification"))
        assert found.labels == ["O", "B-X"]
        assert found.train["tags"][0] == [1, 0]

    def test_rows_that_do_not_fit(self, tiny_bert, tmp_path):
        data = write_lines(tmp_path / "bad.jsonl", [{"tokens": ["a", "b"], "tags": ["O"]}] * 20)
        with pytest.raises(ConfigError, match=r"row 0 of .* has 2 tokens and 1 tags"):
            load_data(settings(tiny_bert, data, tmp_path, task="token-classification"))


class TestChat:
    @pytest.fixture
    def template(self, tmp_path):
        path = tmp_path / "template.jinja"
        path.write_text(TEMPLATE)
        return str(path)

    @pytest.fixture
    def talks(self, tmp_path):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"say {word} {n}"},
                    {"role": "assistant", "content": word},
                    {"role": "user", "content": "again"},
                    {"role": "assistant", "content": word},
                ]
            }
            for n in range(12)
            for word in ("good", "bad")
        ]
        return write_lines(tmp_path / "talks.jsonl", rows)

    def test_only_answers_count(self, tiny_llama, talks, template, tmp_path):
        run = resolve(settings(tiny_llama, talks, tmp_path, task="chat", chat_template=template))
        prepared = TASKS["chat"].prepare(run.data.train, run.processor, run.settings)
        for row, given in zip(prepared, run.data.train, strict=True):
            word = given["messages"][1]["content"]
            counted = [one for one in row["labels"] if one != IGNORED]
            assert run.processor.decode(counted).split() == [word, "[SEP]"] * 2
            assert all(label in (IGNORED, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))

    def test_it_learns_and_answers(self, tiny_llama, talks, template, tmp_path):
        result = train(settings(tiny_llama, talks, tmp_path, task="chat", chat_template=template, max_steps=60))
        log = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
        assert result.metrics["eval_perplexity"] == pytest.approx(math.exp(result.metrics["eval_loss"]), rel=0.2)
        trained = load_trained(tmp_path / "run")
        assert trained.processor.chat_template == TEMPLATE
        pieces = []
        text = generate_text(trained, "say good 3", pieces.append, max_new_tokens=2, temperature=0)
        assert text == "".join(pieces)
        assert score(trained).outcome.metrics["loss"] == pytest.approx(result.metrics["eval_loss"], rel=0.2)

    @pytest.mark.parametrize("packing", [None, True])
    def test_prompt_and_completion_as_text(self, tiny_llama, tmp_path, packing):
        rows = [{"prompt": f"question {n}", "completion": "good answer"} for n in range(20)]
        data = write_lines(tmp_path / "pairs.jsonl", rows)
        run = resolve(settings(tiny_llama, data, tmp_path, task="chat", packing=packing))
        prepared = TASKS["chat"].prepare(run.data.train, run.processor, run.settings)
        labels = [label for row in prepared for label in row["labels"]]
        words = run.processor.decode([label for label in labels if label != IGNORED]).split()
        assert words[:2] == ["good", "answer"]
        assert set(words) <= {"good", "answer", "[SEP]"}
        if packing:
            assert {len(row["input_ids"]) for row in prepared} == {32}

    def test_prompts_and_completions_as_messages(self, tiny_llama, template, tmp_path):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"say {n}"}],
                "completion": [{"role": "assistant", "content": "good"}],
            }
            for n in range(20)
        ]
        data = write_lines(tmp_path / "pairs.jsonl", rows)
        run = resolve(settings(tiny_llama, data, tmp_path, task="chat", chat_template=template))
        row = TASKS["chat"].prepare(run.data.train, run.processor, run.settings)[0]
        assert run.processor.decode([one for one in row["labels"] if one != IGNORED]).split() == ["good", "[SEP]"]

    def test_no_template_is_refused(self, tiny_llama, talks, tmp_path):
        with pytest.raises(ConfigError, match="has no chat template: name a file with one by chat_template"):
            train(settings(tiny_llama, talks, tmp_path, task="chat"))

    def test_a_template_that_rewrites_what_was_said_is_refused(self, tiny_llama, talks, tmp_path):
        path = tmp_path / "template.jinja"
        path.write_text("{{ messages | length }} {% for m in messages %}{{ m['content'] }} {% endfor %}")
        with pytest.raises(ConfigError, match="writes earlier turns anew"):
            train(settings(tiny_llama, talks, tmp_path, task="chat", chat_template=str(path)))

    def test_answers_that_are_cut_off_are_left_out_with_a_warning(self, tiny_llama, tmp_path):
        rows = [{"prompt": "word " * (40 if n % 2 else 1) + str(n), "completion": "yes"} for n in range(20)]
        data = write_lines(tmp_path / "pairs.jsonl", rows)
        run = resolve(settings(tiny_llama, data, tmp_path, task="chat", eval_fraction=0.5))
        with pytest.warns(UserWarning, match="have no answer within max_length=32"):
            prepared = TASKS["chat"].prepare(run.data.train, run.processor, run.settings)
        assert 0 < len(prepared) < len(run.data.train)

    def test_text_is_no_conversation(self, tiny_llama, reviews, tmp_path):
        with pytest.raises(ConfigError, match="has no column 'messages'"):
            load_data(settings(tiny_llama, reviews, tmp_path, task="chat"))


class TestImages:
    @pytest.mark.parametrize("method", ["randlora", "lora", "head", "full"])
    def test_it_learns_and_is_used(self, tiny_vit, colours, tmp_path, method):
        rate = 1e-3 if method == "full" else 1e-2
        chosen = settings(tiny_vit, colours, tmp_path, task="image-classification", method=method, learning_rate=rate)
        result = train(chosen)
        assert result.metrics["eval_accuracy"] == 1.0
        if method in ("randlora", "lora"):
            trained = load_trained(tmp_path / "run")
            assert "classifier.base_layer" not in dict(trained.model.base_model.model.named_modules())
            paths = [str(colours / "red/0.png"), str(colours / "blue/0.png")]
            assert [one.label for one in predict_labels(trained, paths)] == ["red", "blue"]
            assert score(trained, str(colours)).outcome.metrics["accuracy"] == 1.0

    def test_a_table_of_paths(self, tiny_vit, colours, tmp_path):
        lines = [f"images/{name}/{number}.png,{name}" for name in ("red", "blue") for number in range(20)]
        (tmp_path / "table.csv").write_text("image,label\n" + "\n".join(lines) + "\n")
        run = resolve(settings(tiny_vit, tmp_path / "table.csv", tmp_path, task="image-classification"))
        batch = TASKS["image-classification"].prepare(run.data.train, run.processor, run.settings)[:3]
        assert batch["pixel_values"].shape == (3, 3, 16, 16)
        assert run.data.labels == ["blue", "red"]

    def test_what_is_no_image_is_refused(self, tiny_vit, colours, tmp_path):
        train(settings(tiny_vit, colours, tmp_path, task="image-classification", max_steps=1))
        (tmp_path / "text.png").write_text("nothing to see")
        with pytest.raises(ConfigError, match="no image that can be read"):
            list(predict_labels(load_trained(tmp_path / "run"), [str(tmp_path / "text.png")]))
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConfigError, match="holds no images in folders named by their labels"):
            load_data(settings(tiny_vit, tmp_path / "empty", tmp_path, task="image-classification"))


def test_labels_of_other_data_are_matched_by_name(tiny_bert, tmp_path):
    features = [
        Features({"text": Value("string"), "label": ClassLabel(names=names)}) for names in (["a", "b"], ["b", "a"])
    ]
    Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features[0]).save_to_disk(tmp_path / "train")
    Dataset.from_dict({"text": ["z", "w"], "label": [0, 1]}, features[1]).save_to_disk(tmp_path / "test")
    found = load_data(settings(tiny_bert, tmp_path / "train", tmp_path, eval_data=str(tmp_path / "test")))
    assert found.train["label"][:] == [0, 1]
    assert found.evaluation["label"][:] == [1, 0]


@pytest.mark.parametrize("packing", [None, False])
def test_packing(tiny_llama, reviews, tmp_path, packing):
    run = resolve(settings(tiny_llama, reviews, tmp_path, task="causal-lm", packing=packing))
    prepared = TASKS["causal-lm"].prepare(run.data.train, run.processor, run.settings)
    lengths = {len(row["input_ids"]) for row in prepared}
    assert (lengths == {32}) == (packing is None)
    if packing is False:
        assert len(prepared) == len(run.data.train)
        result = train(run.settings)
        assert math.isfinite(result.metrics["eval_loss"])


def test_vera(tiny_bert, reviews, tmp_path):
    train(settings(tiny_bert, reviews, tmp_path, method="vera", max_steps=2))
    assert load_trained(tmp_path / "run").model.peft_config["default"].peft_type.value == "VERA"


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_weights(tokenizer, reviews, tmp_path, quantization):
    set_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    tiny_llama = tmp_path / "llama"  # of 64, the smallest block of 4-bit codes
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tiny_llama)
    tokenizer.save_pretrained(tiny_llama)
    result = train(
        settings(
            tiny_llama, reviews, tmp_path, task="causal-lm", quantization=quantization, target_modules="q_proj,v_proj"
        )
    )
    log = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    trained = load_trained(tmp_path / "run")
    assert trained.model.get_base_model().is_quantized
    assert score(trained).outcome.metrics["loss"] == pytest.approx(result.metrics["eval_loss"], rel=0.05)
    assert torch.isfinite(torch.tensor(result.metrics["eval_loss"]))
