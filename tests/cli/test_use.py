"""eval, predict, generate and push: a run of `train`, used."""

import copy
import csv
import json
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from cli.helpers import answer, invoke
from randlora.cli import console
from randlora.errors import ConfigError
from randlora.train import publish, trained
from randlora.train.infer import generate_text
from randlora.train.run import train
from randlora.train.settings import load_settings
from randlora.train.tasks.language import prompt_tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_bert, reviews):
    folder = tmp_path_factory.mktemp("run")
    values = {
        "model": tiny_bert,
        "data": reviews,
        "r": 8,
        "learning_rate": 3e-3,
        "epochs": 12,
        "batch_size": 16,
        "max_length": 16,
    }
    train(load_settings(overrides={**values, "output_dir": str(folder)}))
    return folder


class TestEval:
    def test_the_run_s_own_data_gives_the_run_s_own_score(self, run):
        found = answer("eval", run)["adapter"]
        metrics = json.loads((run / "metrics.json").read_text())["metrics"]
        assert found["accuracy"] == pytest.approx(metrics["eval_accuracy"])
        assert found["loss"] == pytest.approx(metrics["eval_loss"], abs=1e-4)
        assert found["examples"] == 12

    def test_other_data_and_the_base_model(self, run, reviews):
        found = answer("eval", run / "adapter", "--data", reviews, "--base")
        assert found["adapter"]["examples"] == found["base"]["examples"] == 120
        assert found["adapter"]["correct"] > found["base"]["correct"]
        assert sum(count for count, _ in found["adapter"]["by_label"].values()) == 120
        text = invoke("eval", run, "--data", reviews, "--base").stdout
        assert "95% confidence" in text
        assert "base, with an untrained head: " in text

    @pytest.mark.parametrize("method", ["vera", "full", "head"])
    def test_runs_of_other_methods(self, method, tiny_bert, reviews, tmp_path):
        values = {"model": tiny_bert, "data": reviews, "max_steps": 3, "max_length": 16, "learning_rate": 1e-2}
        done = train(load_settings(overrides={**values, "method": method, "output_dir": str(tmp_path)}))
        result = invoke("eval", tmp_path, "--json")
        assert json.loads(result.stdout)["adapter"]["loss"] == pytest.approx(done.metrics["eval_loss"], abs=1e-4)
        assert "Specified to not" not in result.stderr  # PEFT of VeRA, which the settings ask for

    def test_a_language_model(self, adapter, reviews):
        found = answer("eval", adapter, "--data", reviews)["adapter"]
        assert found["perplexity"] > 1
        assert found["tokens"] > 100
        assert "perplexity" in invoke("eval", adapter, "--data", reviews).stdout

    def test_labels_that_the_model_does_not_know(self, run, tmp_path):
        (tmp_path / "d.csv").write_text("text,label\nfine,neutral\n")
        text = invoke("eval", run, "--data", tmp_path / "d.csv", code=2).output
        assert "neutral" in text
        assert "positive" in text


class TestPredict:
    def test_texts(self, run, sentences):
        texts, labels = zip(*sentences[:4], strict=True)  # that it was trained on
        found = answer("predict", run, *texts)["predictions"]
        assert [one["label"] for one in found] == list(labels)
        assert sum(found[0]["probabilities"].values()) == pytest.approx(1)

    def test_from_stdin_and_files_into_a_file(self, run, reviews, tmp_path):
        assert invoke("predict", run, stdin="good great 1\nbad poor 2\n").stdout.count("\t") == 4
        invoke("predict", run, "--data", reviews, "--output", tmp_path / "new/labels.jsonl")
        lines = [json.loads(line) for line in (tmp_path / "new/labels.jsonl").read_text().splitlines()]
        assert len(lines) == 120
        (tmp_path / "texts.txt").write_text("good fine 1\n")
        assert len(answer("predict", run, "--data", tmp_path / "texts.txt")["predictions"]) == 1

    def test_a_table_keeps_its_columns(self, run, tmp_path):
        (tmp_path / "new.csv").write_text('id,text\n7,good great 1\n8,"bad, poor"\n')
        invoke("predict", run, "--data", tmp_path / "new.csv", "--output", tmp_path / "out.csv")
        with (tmp_path / "out.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [(row["id"], row["text"]) for row in rows] == [("7", "good great 1"), ("8", "bad, poor")]
        found = answer("predict", run, "good great 1", "bad, poor")["predictions"]
        assert [row["predicted"] for row in rows] == [one["label"] for one in found]
        assert float(rows[0]["confidence"]) == pytest.approx(max(found[0]["probabilities"].values()), abs=1e-5)
        text = invoke("predict", run, "--data", tmp_path / "out.csv", "--output", tmp_path / "o.csv", code=2).output
        assert "has the columns ['predicted', 'confidence'] already" in text
        assert "must end in" in invoke("predict", run, "good", "--output", tmp_path / "x.xlsx", code=2).output

    def test_a_table_keeps_its_headings_and_cells_as_written(self, run, tmp_path):
        """An index without a heading, a heading twice, and texts that a reader takes for numbers or for nothing."""
        head, rows = ",text,id,id,rate", ["0,good great 1,007,NA,1.50", "1,bad poor 2,010,,true"]
        for name, ending in (("a", ".csv"), ("b", ".tsv")):
            lines = "\n".join([head, *rows]).replace(",", "\t" if ending == ".tsv" else ",")
            (tmp_path / (name + ending)).write_text(lines + "\n")
        files = ["--data", tmp_path / "a.csv", "--data", tmp_path / "b.tsv"]
        invoke("predict", run, *files, "--output", tmp_path / "out.csv")
        found = [line.rsplit(",", 2) for line in (tmp_path / "out.csv").read_text().splitlines()]
        assert found[0] == [head, "predicted", "confidence"]
        assert [line[0] for line in found[1:]] == rows * 2

    def test_data_in_another_encoding(self, run, tmp_path):
        (tmp_path / "d.csv").write_text("text,label\ngood – fine 1,positive\n", encoding="cp1252")
        data = ["--data", tmp_path / "d.csv"]
        assert "encoding, such as cp1252" in invoke("eval", run, *data, code=2).output
        assert answer("eval", run, *data, "--encoding", "cp1252")["adapter"]["examples"] == 1
        invoke("predict", run, *data, "--encoding", "cp1252", "--output", tmp_path / "out.csv")
        assert "good – fine 1,positive" in (tmp_path / "out.csv").read_text(encoding="utf-8")

    def test_columns_of_the_run_and_several_files(self, tiny_bert, tmp_path):
        for name in "ab":
            rows = "".join(f"{name} {n},{'yes' if n % 2 else 'no'}\n" for n in range(10))
            (tmp_path / f"{name}.csv").write_text(f"sentence,verdict\n{rows}")
        files = [flag for name in "ab" for flag in ("--data", tmp_path / f"{name}.csv")]
        columns = ["--input-column", "sentence", "--label-column", "verdict"]
        steps = ["--r", 8, "--max-steps", 1, "--max-length", 16, "--report-to", "none"]
        done = answer("train", "--model", tiny_bert, *files, *columns, *steps, "--output-dir", tmp_path / "run")
        assert done["steps"] == 1
        assert answer("eval", tmp_path / "run", *files)["adapter"]["examples"] == 20
        assert len(answer("predict", tmp_path / "run", *files)["predictions"]) == 20

    def test_a_folder_of_images(self, tmp_path):
        vit = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
        ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **vit)).save_pretrained(tmp_path / "vit")
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
        for number in range(6):
            folder = tmp_path / "images" / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / f"{number}.png")
        flags = ["--data", tmp_path / "images", "--task", "image-classification"]
        found = answer("predict", tmp_path / "vit", *flags)["predictions"]
        assert sorted(one["text"].rpartition("/")[2] for one in found) == [f"{number}.png" for number in range(6)]
        assert answer("predict", tmp_path / "vit", found[0]["text"])["predictions"][0] == found[0]
        invoke("predict", tmp_path / "vit", *flags, "--output", tmp_path / "o.csv")
        with (tmp_path / "o.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert all(row["file"].split("/")[-2] == row["label"] for row in rows)
        assert [row["predicted"] for row in rows] == [one["label"] for one in found]

    def test_batches_make_no_difference(self, run):
        texts = ["good", "bad poor dull awful 7", "fine lovely"]
        one, all_ = (answer("predict", run, *texts, "--batch-size", size)["predictions"] for size in (1, 3))
        for a, b in zip(one, all_, strict=True):
            assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)

    def test_a_merged_model_knows_the_names_of_its_labels(self, run, sentences, tmp_path):
        text, label = sentences[0]
        invoke("merge", run, tmp_path / "merged")
        assert answer("predict", tmp_path / "merged", text)["predictions"][0]["label"] == label

    def test_a_converted_adapter_knows_the_names_of_its_labels(self, run, sentences, tmp_path):
        text, label = sentences[0]
        invoke("convert", run, tmp_path / "lora", "--to", "lora", "--rank", 32)
        assert answer("predict", tmp_path / "lora", text)["predictions"][0]["label"] == label

    def test_a_converted_adapter_gives_several_labels(self, tiny_bert, tmp_path):
        rows = [{"text": f"good {n}", "label": ["red", "blue"][: n % 3]} for n in range(30)]
        (tmp_path / "d.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        steps = ["--r", 8, "--max-steps", 1, "--max-length", 16, "--report-to", "none"]
        invoke("train", "--model", tiny_bert, "--data", tmp_path / "d.jsonl", *steps, "--output-dir", tmp_path / "run")
        invoke("convert", tmp_path / "run", tmp_path / "lora", "--to", "lora", "--rank", 8)
        found = answer("predict", tmp_path / "lora", "good 1")["predictions"][0]
        assert set(found["probabilities"]) == {"red", "blue"}
        assert isinstance(found["labels"], list)

    def test_labels_survive_the_loss_of_the_data(self, run, sentences, tmp_path):
        text = next(text for text, label in sentences if label == "positive")
        moved = shutil.copytree(run, tmp_path / "moved")
        (moved / "resolved.yaml").write_text((moved / "resolved.yaml").read_text().replace("reviews.csv", "gone.csv"))
        (moved / "base_model").mkdir(exist_ok=True)
        (moved / "base_model/config.json").write_text('{"id2label": {"0": "thumbs down", "1": "thumbs up"}}')
        assert answer("predict", moved, text)["predictions"][0]["label"] == "thumbs up"
        shutil.rmtree(moved / "base_model")
        assert answer("predict", moved, text)["predictions"][0]["label"] == "LABEL_1"


class TestUnfinished:
    """A run of which the checkpoints are there and the result is not."""

    @pytest.fixture
    def stopped(self, run, tmp_path):
        folder = shutil.copytree(run, tmp_path / "stopped")
        shutil.rmtree(folder / "adapter")
        return folder

    @pytest.mark.parametrize("command", ["eval", "predict", "merge", "inspect"])
    def test_it_is_said_how_to_go_on(self, stopped, command, tmp_path):
        more = {"predict": ["good"], "merge": [tmp_path / "merged"]}.get(command, [])
        text = " ".join(invoke(command, stopped, *more, code=2).output.split())
        assert "has not ended" in text
        assert "--resume auto" in text
        assert "checkpoint-" in text

    def test_a_checkpoint_is_used_as_the_adapter_would_be(self, run, stopped, tmp_path, sentences):
        last = max((stopped / "checkpoints").glob("checkpoint-*"), key=lambda one: int(one.name.rpartition("-")[2]))
        assert answer("eval", last)["adapter"] == answer("eval", run)["adapter"]
        invoke("merge", last, tmp_path / "merged")
        text, label = sentences[0]
        assert answer("predict", tmp_path / "merged", text)["predictions"][0]["label"] == label


class TestGenerate:
    def test_what_transformers_generates(self, adapter, tiny_llama):
        found = answer("generate", adapter, "--prompt", "good film", "--temperature", 0, "--max-new-tokens", 6)
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), adapter).eval()
        inputs = {k: v for k, v in tokenizer("good film", return_tensors="pt").items() if k != "token_type_ids"}
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        assert found["text"].split() == tokenizer.decode(ids, skip_special_tokens=True).split()

    def test_a_seed_repeats_and_stdin_prompts(self, adapter):
        first, second = (
            invoke("generate", adapter, "--seed", 1, "--max-new-tokens", 5, stdin="good\n").stdout for _ in range(2)
        )
        assert first == second

    def test_a_conversation(self, adapter, monkeypatch):
        lines = iter(["good film", "", "and then", None])

        def typed(_prompt):
            line = next(lines)
            if line is None:
                raise EOFError
            return line

        asked = []
        monkeypatch.setattr("builtins.input", typed)
        monkeypatch.setattr("randlora.cli.generate.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
        true_generate = __import__("randlora.train.infer", fromlist=["x"]).generate_text

        def note(model, prompt, **options):
            asked.append(prompt)
            if len(asked) == 2:
                raise KeyboardInterrupt  # ends the answer, not the conversation
            return true_generate(model, prompt, **options)

        monkeypatch.setattr("randlora.train.infer.generate_text", note)
        assert "Ctrl-D" in invoke("generate", adapter, "--max-new-tokens", 3).stdout
        assert asked == ["good film", "and then"]

    def test_a_chat_template_gets_the_whole_conversation(self, adapter):
        model = trained.load_trained(adapter)
        model.processor.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        pieces = []
        messages = [{"role": "user", "content": "good"}]
        text = generate_text(model, messages, pieces.append, max_new_tokens=4, temperature=0)
        assert "".join(pieces) == text

    def test_no_more_than_the_model_has_positions_for(self, adapter):
        model = trained.load_trained(adapter)
        model.model.config.max_position_embeddings = 8
        asked = len(prompt_tokens(model.processor, "good film"))
        pieces = []
        generate_text(model, "good film", pieces.append, max_new_tokens=100, temperature=0)
        assert len("".join(pieces).split()) <= 8 - asked
        with pytest.raises(ConfigError, match=r"the prompt has 22 tokens, .* takes 8"):
            generate_text(model, "good " * 20, pieces.append)

    def test_a_prompt_is_not_closed(self, tokenizer):
        closing = copy.deepcopy(tokenizer)
        assert prompt_tokens(closing, "good")[-1] == closing.sep_token_id
        closing.eos_token = closing.sep_token
        assert prompt_tokens(closing, "good")[-1] != closing.sep_token_id


class _Hub:
    """What was asked of the hub."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def create_repo(self, repo_id, **options):
        if self.error:
            raise self.error
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, *, folder_path, **options):
        names = sorted(file.name for file in folder_path.iterdir())
        self.calls.append(("upload", names, options))
        return SimpleNamespace(commit_url="https://hub/commit/1")


class TestPush:
    def test_the_card_is_filled_and_uploaded(self, run, tmp_path, monkeypatch):
        copied, hub = shutil.copytree(run, tmp_path / "run"), _Hub()
        monkeypatch.setattr(publish, "HfApi", lambda: hub)
        done = answer("push", copied, "me/reviews", "--private", "--license", "mit")
        assert done["url"] == "https://hub/commit/1"
        (_, repo, options), (_, names, upload) = hub.calls
        assert (repo, options["private"]) == ("me/reviews", True)
        assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(names)
        assert upload["repo_id"] == "me/reviews"
        card = (copied / "adapter/README.md").read_text()
        metrics = json.loads((run / "metrics.json").read_text())
        assert f"{metrics['trainable_parameters']:,} trained parameters" in card
        assert f"{metrics['metrics']['eval_accuracy']:.4f}" in card
        assert "license: mit" in card
        assert "pipeline_tag: text-classification" in card
        assert str(tmp_path) not in card
        assert 'AutoModelForSequenceClassification.from_pretrained("' in card
        assert ", num_labels=2)" in card
        assert "learning_rate: 0.003" in card
        assert "alpha: 160" in card

    def test_each_task_has_its_class_and_pipeline(self, run, tmp_path):
        copied = shutil.copytree(run, tmp_path / "run")
        settings = (run / "resolved.yaml").read_text()
        for task, name, pipeline in (
            ("token-classification", "AutoModelForTokenClassification", "token-classification"),
            ("image-classification", "AutoModelForImageClassification", "image-classification"),
        ):
            (copied / "resolved.yaml").write_text(settings.replace("sequence-classification", task))
            card = answer("push", copied, "me/x", "--dry-run")["card"]
            assert f"base = {name}.from_pretrained(" in card
            assert f"pipeline_tag: {pipeline}" in card

    def test_a_dry_run_writes_nothing(self, run, monkeypatch):
        monkeypatch.setattr(publish, "HfApi", lambda: pytest.fail("the hub was asked"))
        before = {file: file.read_bytes() for file in (run / "adapter").iterdir()}
        result = invoke("push", run, "me/x", "--dry-run")
        assert "from randlora import PeftModel" in result.stdout
        assert "base model by a folder of this machine" in result.output
        assert {file: file.read_bytes() for file in (run / "adapter").iterdir()} == before

    def test_a_readme_of_one_s_own_stays(self, run, tmp_path, monkeypatch):
        copied = shutil.copytree(run, tmp_path / "run")
        (copied / "adapter/README.md").write_text("# mine\n")
        monkeypatch.setattr(publish, "HfApi", _Hub)
        invoke("push", copied, "me/x")
        assert (copied / "adapter/README.md").read_text() == "# mine\n"

    @pytest.mark.parametrize(
        ("error", "code", "expected"),
        [
            (LocalTokenNotFoundError("no token"), 2, "hf auth login"),
            (HfHubHTTPError("no", response=SimpleNamespace(status_code=403, headers={}, request=None)), 2, "403"),
            (
                HfHubHTTPError("bad", response=SimpleNamespace(status_code=500, headers={}, request=None)),
                1,
                "refused",
            ),
            (OSError("no route"), 1, "out of reach"),
        ],
        ids=["token", "forbidden", "server", "network"],
    )
    def test_what_the_hub_refuses(self, run, tmp_path, monkeypatch, error, code, expected):
        copied = shutil.copytree(run, tmp_path / "run")
        monkeypatch.setattr(publish, "HfApi", lambda: _Hub(error))
        assert expected in invoke("push", copied, "me/x", code=code).output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("eval nowhere", "name a run, an adapter or a model folder"),
        ("eval ADAPTER", "belongs to no run"),
        ("eval RUN --data nowhere.csv", "nowhere.csv"),
        ("eval RUN --model nowhere", "nowhere"),
        ("generate ADAPTER --model BERT --prompt x", "cannot be loaded onto"),
        ("predict ADAPTER good", "predict is for classifiers"),
        ("predict RUN good --data d.csv", "give one or the other"),
        ("predict RUN --data nowhere.txt", "nowhere.txt"),
        ("predict RUN good --output RUN", "is a folder: name a file in it"),
        ("predict RUN", "there are no texts"),
        ("generate RUN --prompt x", "generate is for language models"),
        ("generate ADAPTER --prompt x --top-p 2", "top_p=2.0"),
        ("generate ADAPTER --prompt x --temperature -1", "temperature=-1.0"),
        ("generate ADAPTER --prompt x --max-new-tokens 0", "max_new_tokens=0"),
        ("push RUN noslash", "must be user/name"),
        ("push RUN a/b/c", "a/b/c"),
        ("push nowhere me/x", "neither an adapter nor a run"),
        ("bench --hidden 100", "hidden=100"),
        ("bench --rounds 0", "rounds=0"),
        ("plan LLAMA --params many", "params='many'"),
        ("plan LLAMA --params 1M --r 4", "only one"),
        ("plan nowhere --r 4", "nowhere"),
        ("plan VIT --r 4", "is of type 'vit', for which Transformers has no AutoModelForCausalLM: name another task"),
    ],
)
def test_mistakes_end_with_code_2(arguments, expected, run, adapter, tiny_llama, tiny_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ViTConfig().save_pretrained(tmp_path / "vit")
    for name, place in {
        "RUN": run,
        "ADAPTER": adapter,
        "LLAMA": tiny_llama,
        "BERT": tiny_bert,
        "VIT": tmp_path / "vit",
    }.items():
        arguments = arguments.replace(name, str(place))
    assert expected in invoke(*arguments.split(), code=2, stdin="").output.replace("\n", "")


def test_a_long_title_is_not_broken(capsys):
    console.console().print(console.plain_table(["a"], [["1"]], "a title that is longer than its table"))
    assert "a title that is longer than its table" in capsys.readouterr().out


def test_plan_says_which_r(tiny_llama):
    found = answer("plan", tiny_llama, "--match-lora", 4, "--batch-size", 2, "--length", 16)
    assert found["lora"]["r"] == 4
    assert answer("plan", tiny_llama, "--length", 16)["chosen"]["r"] == 32  # without a budget, that of `train`
    text = invoke("plan", tiny_llama, "--params", "5k", "--bases", "very-sparse", "--length", 16).stdout
    assert "a larger r means fewer parameters" in text
    assert "←" in text


def test_bench_measures_every_method():
    found = answer("bench", "--hidden", 64, "--layers", 1, "--tokens", 16, "--r", 8, "--rounds", 1)
    assert [m["ratio"] for m in found["methods"] if m["method"] == "frozen"] == [1.0]
    assert len(found["methods"]) == 6
    assert found["rates"]["element"] > 0
