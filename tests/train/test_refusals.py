"""Mistakes that would else end in a traceback of a library, in a silent wrong result or in a full memory."""

import csv
import shutil

import pytest
from transformers import AutoModelForSequenceClassification, Trainer

from randlora.errors import ConfigError
from randlora.train.run import resolve, train
from randlora.train.settings import load_settings
from randlora.train.tasks import TASKS
from randlora.train.tasks.language import looks_ahead


@pytest.fixture
def settings(tmp_path, tiny_bert, reviews):
    def make(**values):
        defaults = {"model": tiny_bert, "data": reviews, "output_dir": str(tmp_path / "run"), "r": 8, "max_steps": 1}
        return load_settings(None, {**defaults, **values})

    return make


@pytest.mark.parametrize("method", ["randlora", "lora", "full", "head"])
def test_modules_to_save_that_do_not_exist(settings, method):
    with pytest.raises(ConfigError, match=r"modules_to_save=\['poler'\]"):
        resolve(settings(method=method, modules_to_save=["pooler", "poler"]))


def test_inputs_longer_than_the_model_takes(settings):
    with pytest.raises(ConfigError, match=r"max_length=1024.*at most 512"):
        resolve(settings(max_length=1024))


def test_a_input_column_without_text(settings, tmp_path):
    path = tmp_path / "d.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((n, "good" if n % 2 else "bad") for n in range(40))])
    with pytest.raises(ConfigError, match=r"column 'text'.*int64.*input_column"):
        resolve(settings(data=str(path)))


def test_a_target_that_is_no_regular_expression(settings):
    with pytest.raises(ConfigError, match=r"target_modules='\(query': is no regular expression"):
        settings(target_modules="(query")


def test_targets_that_are_not_there_are_told_which_are(settings):
    with pytest.raises(ConfigError, match=r"named dense, key, query, value$"):
        resolve(settings(target_modules="nothing_like_it"))


def test_labels_that_are_measures(settings, tmp_path):
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(f"film {n},{n / 7}\n" for n in range(40)))
    with pytest.raises(ConfigError, match=r"labels such as 0\.14.*words or whole numbers"):
        resolve(settings(data=str(tmp_path / "d.csv")))


def test_a_folder_of_images_for_a_task_of_texts(settings, tmp_path):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"needs task='image-classification'"):
        resolve(settings(data=str(tmp_path / "images")))


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_made(settings, tmp_path, output):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"output_dir=.*{output}"):
        train(settings(output_dir=str(tmp_path / output)))


def test_a_classifier_for_other_labels_gets_a_new_head(settings, tmp_path, tiny_bert, tokenizer):
    AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=5, ignore_mismatched_sizes=True
    ).save_pretrained(tmp_path / "five")
    tokenizer.save_pretrained(tmp_path / "five")
    assert train(settings(model=str(tmp_path / "five"))).steps == 1


def test_the_logits_of_a_language_model_are_not_kept(settings, tiny_llama, monkeypatch):
    kept = []
    loop = Trainer.evaluation_loop

    def spy(*args, **kwargs):
        output = loop(*args, **kwargs)
        kept.append(output.predictions)
        return output

    monkeypatch.setattr(Trainer, "evaluation_loop", spy)
    train(settings(model=tiny_llama, task="causal-lm", max_length=16))
    assert [losses.shape[1] for losses in kept] == [2]  # of each chunk its loss and its number of tokens


def test_a_result_is_saved_before_it_is_evaluated(settings, tmp_path, monkeypatch):
    def out_of_memory(*_args, **_kwargs):
        raise MemoryError

    monkeypatch.setattr(Trainer, "predict", out_of_memory)
    with pytest.raises(MemoryError):
        train(settings())
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def test_a_model_without_a_tokenizer(settings, tmp_path, tiny_bert):
    shutil.copytree(tiny_bert, tmp_path / "bare")
    for file in [*(tmp_path / "bare").glob("tokenizer*"), *(tmp_path / "bare").glob("vocab*")]:
        file.unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer that can be read .*AutoTokenizer"):
        resolve(settings(model=str(tmp_path / "bare")))


def test_an_encoder_is_no_language_model_and_a_decoder_is(tiny_bert, tiny_llama):
    with pytest.raises(ConfigError, match="is of type 'bert' and sees the tokens that it is to predict"):
        TASKS["causal-lm"].load_model(
            load_settings(None, {"model": tiny_bert, "data": "d", "task": "causal-lm"}), [], None
        )
    model = TASKS["causal-lm"].load_model(load_settings(None, {"model": tiny_llama, "data": "d"}), [], None)
    assert not looks_ahead(model)
