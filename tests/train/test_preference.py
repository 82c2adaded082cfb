"""DPO, KTO and ORPO: what is learned, and every number beside one that is computed otherwise."""

import importlib.util
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli.helpers import answer, invoke
from fixtures import BAD, GOOD
from randlora.errors import ConfigError
from randlora.report.page import write_report
from randlora.train.infer import generate_text, score
from randlora.train.preference import require_trl
from randlora.train.publish import publish
from randlora.train.rewards import Rewards
from randlora.train.run import make_trainer, resolve, train
from randlora.train.settings import load_settings
from randlora.train.tasks import TASKS
from randlora.train.tasks.preference import log_probs
from randlora.train.trained import load_trained

trl = pytest.importorskip("trl", minversion="1.8")

ALL = ("dpo", "kto", "orpo")
TEMPLATE = (
    "{% for m in messages %}[CLS] {{ m['role'] }} : {{ m['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Training and held-out pairs in conversations, and a chat template."""
    folder = tmp_path_factory.mktemp("preferences")
    (folder / "template.jinja").write_text(TEMPLATE)
    for name, numbers in (("train", range(23)), ("held_out", range(23, 30))):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"how was film {n}"}],
                "chosen": [{"role": "assistant", "content": f"{GOOD[n % 4]} {'film ' * (n % 3)}"}],
                "rejected": [{"role": "assistant", "content": f"{BAD[n % 4]} {BAD[n % 3]}"}],
            }
            for n in numbers
        ]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def settings(files, tiny_llama, tmp_path_factory):
    def make(task, output=None, **values):
        common = {
            "model": tiny_llama,
            "data": str(files / "train.jsonl"),
            "eval_data": str(files / "held_out.jsonl"),
            "chat_template": str(files / "template.jinja"),
            "output_dir": str(output or tmp_path_factory.mktemp(task)),
            "r": 8,
            "batch_size": 8,
            "max_length": 32,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "schedule": "constant",
            "report_to": ["none"],
        }
        return load_settings(None, {**common, "task": task, **values})

    return make


@pytest.fixture(scope="module")
def runs(settings):
    """A run of each task."""
    return {task: train(settings(task, max_steps=12, beta=0.3)) for task in ALL}


def folder_of(result):
    return Path(result.result_path).parent


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def losses(folder):
    return [entry["loss"] for entry in history(folder) if "loss" in entry]


@pytest.mark.parametrize("task", ALL)
class TestEveryTask:
    def test_it_learns_what_is_preferred(self, runs, task):
        result, found = runs[task], losses(folder_of(runs[task]))
        assert np.mean(found[-3:]) < np.mean(found[:3])
        assert result.metrics["eval_rewards/margins"] > 0
        assert result.metrics["eval_rewards/accuracies"] > 0.5
        assert any("rewards/margins" in entry for entry in history(folder_of(result)))
        assert set(TASKS[task].metric_names) <= {name.removeprefix("eval_") for name in result.metrics}

    def test_it_leaves_one_adapter_and_each_example(self, runs, task):
        folder = folder_of(runs[task])
        assert not [path for path in (folder / "adapter").iterdir() if path.is_dir()]
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        assert len(rows) == (14 if task == "kto" else 7)
        assert all(0 < row["confidence"] < 1 and "how was film 2" in row["text"] for row in rows)
        if task != "orpo":
            assert np.mean([row["loss"] for row in rows]) == pytest.approx(runs[task].metrics["eval_loss"], rel=1e-5)

    @pytest.mark.parametrize("batch_size", [2, 32])
    def test_eval_gives_the_same_numbers(self, runs, task, batch_size):
        found = score(load_trained(folder_of(runs[task])), batch_size=batch_size)
        for name, value in found.outcome.metrics.items():
            assert value == pytest.approx(runs[task].metrics[f"eval_{name}"], abs=1e-5)

    def test_they_are_those_of_the_formulas(self, runs, task, settings, tiny_llama):
        """In float64, answer by answer, from models of Transformers and PEFT alone."""
        run = resolve(settings(task))
        prepared = TASKS[task].prepare(run.data.evaluation, run.processor, run.settings)
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float64").eval()
        other = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32")
        tuned = PeftModel.from_pretrained(other, runs[task].result_path).merge_and_unload().double().eval()
        expected = FORMULAS[task](tuned, base, prepared, 0.3)
        for name, value in expected.items():
            assert runs[task].metrics[f"eval_{name}"] == pytest.approx(value, abs=2e-4), name

    def test_it_answers(self, runs, task):
        trained = load_trained(folder_of(runs[task]))
        pieces = []
        text = generate_text(trained, "how was film 3", pieces.append, max_new_tokens=2, temperature=0)
        assert text == "".join(pieces)
        assert trained.processor.chat_template == TEMPLATE

    def test_a_run_that_was_cut_off_ends_as_one_that_was_not(self, settings, task, tmp_path):
        values = {"max_steps": 4, "save_steps": 2}
        train(settings(task, tmp_path / "whole", **values))
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        shutil.rmtree(tmp_path / "cut/checkpoints/checkpoint-4")
        train(settings(task, tmp_path / "cut", resume="auto", **values))
        whole, cut = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[name], cut[name]) for name in whole)
        assert losses(tmp_path / "whole") == losses(tmp_path / "cut")

    def test_a_search_of_the_rate_goes_to_its_end(self, settings, task, tmp_path, monkeypatch):
        monkeypatch.setattr("randlora.train.search.MOST", 3)
        given = settings(task, tmp_path / "run", learning_rate="auto", eval_data=None)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(given.model_dump(exclude_unset=True, by_alias=True)))
        said = invoke("train", "--config", tmp_path / "run.yaml").stdout
        tried = {float(rate): float(loss) for rate, loss in re.findall(r"learning rate (\S+): loss (\S+)", said)}
        (taken,) = map(float, re.findall(r"takes ([\d.e-]+)", said))
        assert len(tried) == 3
        assert tried[taken] == min(tried.values()) < max(tried.values())
        assert yaml.safe_load((tmp_path / "run/resolved.yaml").read_text())["learning_rate"] == taken
        assert len(losses(tmp_path / "run")) == 2

    def test_the_loss_is_that_of_trl(self, settings, task):
        """TRL's loss of one batch that holds all that was held out."""
        run = resolve(settings(task, batch_size=14, beta=0.3))
        prepared = TASKS[task].prepare(run.data.evaluation, run.processor, run.settings)
        trainer = make_trainer(run, Path(run.settings.output_dir), prepared)
        randomise(run.model)
        (batch,) = trainer.get_eval_dataloader()
        found = trainer.evaluate()
        with torch.no_grad():
            assert found["eval_loss"] == pytest.approx(float(trainer.compute_loss(trainer.model, batch)), abs=1e-5)


def randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def one_by_one(model, row, answer):
    """Logarithms of the probabilities of an answer's tokens; and those of the prompt's before."""
    ids = row["prompt_ids"] + row[answer]
    with torch.no_grad():
        shares = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
    all_of_them = [float(shares[place - 1, ids[place]]) for place in range(1, len(ids))]
    start = len(row["prompt_ids"]) - 1
    return all_of_them[start:], all_of_them[:start]


def gain(tuned, base, row, answer, beta):
    return beta * (sum(one_by_one(tuned, row, answer)[0]) - sum(one_by_one(base, row, answer)[0]))


def dpo(tuned, base, rows, beta):
    pairs = [tuple(gain(tuned, base, row, f"{name}_ids", beta) for name in ("chosen", "rejected")) for row in rows]
    return {
        "loss": np.mean([math.log(1 + math.exp(bad - good)) for good, bad in pairs]),
        "rewards/margins": np.mean([good - bad for good, bad in pairs]),
        "rewards/accuracies": np.mean([good > bad for good, bad in pairs]),
    }


def kto(tuned, base, rows, beta):
    rewards = [gain(tuned, base, row, "completion_ids", beta) for row in rows]
    zero = max(0, np.mean([gain(tuned, base, row, "KL_completion_ids", beta) for row in rows]))
    signs = [1 if row["label"] else -1 for row in rows]
    good, bad = ([reward for reward, one in zip(rewards, signs, strict=True) if one == sign] for sign in (1, -1))
    couples = [(a, b) for a in good for b in bad]
    return {
        "loss": np.mean([1 / (1 + math.exp(s * (r - zero))) for r, s in zip(rewards, signs, strict=True)]),
        "rewards/margins": np.mean(good) - np.mean(bad),
        "rewards/accuracies": np.mean([a > b for a, b in couples]),
    }


def orpo(tuned, base, rows, beta):
    odds, likelihood, margins = [], [], []
    for row in rows:
        (good, before), (bad, _) = (one_by_one(tuned, row, f"{name}_ids") for name in ("chosen", "rejected"))
        likelihood += [*good, *before]
        shares = [math.exp(np.mean(answer)) for answer in (good, bad)]
        first, second = (share / (1 - share) for share in shares)
        odds.append(math.log(1 + second / first))
        margins.append(beta * (np.mean(good) - np.mean(bad)))
    return {
        "loss": beta * np.mean(odds) - np.mean(likelihood),
        "rewards/margins": np.mean(margins),
        "rewards/accuracies": np.mean(np.array(margins) > 0),
    }


FORMULAS = {"dpo": dpo, "kto": kto, "orpo": orpo}


class TestReference:
    @pytest.mark.parametrize("task", ["dpo", "kto"])
    @pytest.mark.parametrize("method", [{}, {"structured": True}, {"method": "lora"}], ids=str)
    def test_it_is_the_base_model_exactly_and_no_copy_of_it(self, settings, tiny_llama, task, method):
        run = resolve(settings(task, **method))
        prepared = TASKS[task].prepare(run.data.evaluation, run.processor, run.settings)
        trainer = make_trainer(run, Path(run.settings.output_dir), prepared)
        randomise(run.model)
        batch = next(iter(trainer.get_eval_dataloader()))
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32")
        ids, attention = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            expected = log_probs(base, ids, attention)
            assert torch.equal(Rewards._reference(trainer, run.model, ids, attention), expected)
            assert (log_probs(run.model, ids, attention) - expected).abs().max() > 1e-2
            theirs = trainer.compute_ref_log_probs(run.model, batch)
        expected = (expected * batch["completion_mask"][:, 1:]).sum(-1)
        for one, other in zip(theirs, expected.chunk(2) if task == "dpo" else (expected,), strict=False):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
        assert trainer.ref_model is None
        assert list(run.model.peft_config) == ["default"]
        trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
        held = sum(p.numel() for name, p in run.model.named_parameters() if name not in trained)
        assert held == sum(p.numel() for p in base.parameters())

    @pytest.mark.parametrize(
        "method", [{}, {"structured": True}, {"very_sparse": True}, {"method": "lora"}, {"method": "vera"}], ids=str
    )
    def test_every_method_begins_at_it(self, settings, method):
        result = train(settings("dpo", **method))
        first, second = losses(folder_of(result))
        assert first == pytest.approx(math.log(2), abs=1e-6)
        assert second != first

    @pytest.mark.parametrize("task", ["dpo", "kto"])
    def test_full_fine_tuning_has_a_copy_and_eval_loads_it(self, settings, task):
        result = train(settings(task, method="full", learning_rate=1e-3))
        folder = folder_of(result)
        assert losses(folder)[0] == pytest.approx({"dpo": math.log(2), "kto": 0.5}[task], abs=1e-6)
        found = score(load_trained(folder)).outcome.metrics
        assert found["rewards/margins"] == pytest.approx(result.metrics["eval_rewards/margins"], abs=1e-5)
        assert found["rewards/margins"] != 0

    def test_a_model_alone_has_none(self, runs, tiny_llama, files):
        with pytest.raises(ConfigError, match=r"beside a reference.*name a run, or an adapter"):
            score(load_trained(tiny_llama, task="dpo"), str(files / "held_out.jsonl"))
        with pytest.raises(ConfigError, match="beside a reference"):
            score(load_trained(folder_of(runs["dpo"]), adapter=False))


class TestSteps:
    def test_accumulated_batches_are_one(self, settings):
        values = {"batch_size": 8, "max_steps": 2}
        whole = losses(folder_of(train(settings("dpo", **values))))
        parts = losses(folder_of(train(settings("dpo", **{**values, "batch_size": 4, "gradient_accumulation": 2}))))
        assert parts == pytest.approx(whole, abs=1e-4)

    @pytest.mark.parametrize("task", ALL)
    def test_bf16_and_checkpointing(self, settings, task):
        result = train(settings(task, bf16=True, gradient_checkpointing=True))
        assert all(map(math.isfinite, losses(folder_of(result))))
        assert result.metrics["eval_loss"] > 0

    def test_what_trains_stays_in_float32_above_codes(self, settings):
        pytest.importorskip("bitsandbytes")
        run = resolve(settings("dpo", quantization="4bit"))
        before = {name: p.clone() for name, p in run.model.named_parameters() if p.requires_grad}
        held_out = TASKS["dpo"].prepare(run.data.evaluation, run.processor, run.settings)
        make_trainer(run, Path(run.settings.output_dir), held_out)
        after = dict(run.model.named_parameters())
        assert before
        assert all(torch.equal(after[name], value) and value.dtype is torch.float32 for name, value in before.items())

    def test_kto_meets_its_examples_in_an_order_that_is_drawn(self, settings):
        run = resolve(settings("kto"))
        prepared = TASKS["kto"].prepare(run.data.train, run.processor, run.settings)
        ordered, weights = TASKS["kto"].training(prepared, run.settings)
        assert not weights
        assert prepared["label"][:23] == [True] * 23
        assert 0 < sum(ordered["label"][:8]) < 8
        answers = ordered["completion_ids"][:]
        assert ordered["KL_completion_ids"][:9] == [answers[7], *answers[:7], answers[15]]

    def test_kto_of_few_good_answers(self, settings):
        run = resolve(settings("kto"))
        prepared = TASKS["kto"].prepare(run.data.train, run.processor, run.settings).select(range(15, 46))
        with pytest.warns(UserWarning, match="8 answers are good and 23 bad.*class_weights=balanced"):
            TASKS["kto"].training(prepared, run.settings)
        balanced = run.settings.model_copy(update={"class_weights": "balanced"})
        _, weights = TASKS["kto"].training(prepared, balanced)
        assert weights == pytest.approx({"desirable_weight": 31 / 16, "undesirable_weight": 31 / 46})
        with pytest.raises(ConfigError, match="all 23 are bad"):
            TASKS["kto"].training(prepared.select(range(8, 31)), run.settings)

    def test_answers_are_cut_off_and_left_out_beyond_max_length(self, settings):
        run = resolve(settings("dpo"))
        short = run.settings.model_copy(update={"max_length": 14})
        prepared = TASKS["dpo"].prepare(run.data.train, run.processor, short)
        assert {len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in prepared} <= {13, 14}
        with pytest.raises(ConfigError, match="none of the 23 examples has an answer within max_length=8"):
            TASKS["dpo"].prepare(run.data.train, run.processor, run.settings.model_copy(update={"max_length": 8}))

    def test_no_prompt_is_on_both_sides(self, settings):
        data = resolve(settings("kto", eval_data=None, eval_fraction=0.25)).data
        trained, held_out = ({json.dumps(one) for one in rows["prompt"]} for rows in data[:2])
        assert len(held_out) == 6
        assert not trained & held_out


class TestRefusals:
    def test_without_trl(self, settings, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"task='orpo' trains by TRL.*pip install 'randlora\[preferences\]'"):
            require_trl("orpo")

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"dropout": 0.1}, "dropout=0.1: dpo trains without any"),
            ({"task": "kto", "batch_size": 1}, "batch_size=1: kto compares answers of one batch"),
            ({"task": "chat", "beta": 0.1}, "beta=0.1 is for dpo, kto and orpo, not 'chat'"),
            ({"beta": 0}, "beta=0: input should be greater than 0"),
            ({"packing": True}, "packing=True is for causal-lm and chat, not 'dpo'"),
        ],
    )
    def test_settings(self, settings, values, message):
        with pytest.raises(ConfigError, match=message):
            settings(values.pop("task", "dpo"), **values)

    def test_an_adapted_output_layer(self, settings):
        with pytest.raises(ConfigError, match=r"task='dpo': .*lm_head"):
            train(settings("dpo", target_modules="q_proj,lm_head"))

    def test_messages_without_a_template(self, settings):
        with pytest.raises(ConfigError, match="has no chat template: name a file with one by chat_template"):
            train(settings("dpo", chat_template=None))


def test_the_rate_is_a_twentieth_and_beta_a_tenth(settings):
    resolved = settings("dpo", learning_rate=None).resolved()
    assert (resolved["learning_rate"], resolved["beta"]) == (3e-4 / 20, 0.1)
    assert settings("chat", learning_rate=None).resolved()["beta"] is None


def test_text_is_closed_by_the_end_of_text_token(tiny_llama, tmp_path):
    rows = [{"prompt": f"film {n}", "chosen": "good", "rejected": "bad film"} for n in range(10)]
    (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    values = {"model": tiny_llama, "data": str(tmp_path / "texts.jsonl"), "task": "dpo", "output_dir": str(tmp_path)}
    run = resolve(load_settings(None, values))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, eos_token="[SEP]", pad_token="[PAD]")
    (row,) = TASKS["dpo"].prepare(run.data.train.select([0]), tokenizer, run.settings)
    assert [tokenizer.decode(row[f"{name}_ids"]) for name in ("chosen", "rejected")] == ["good [SEP]", "bad film [SEP]"]


class TestAfterFineTuning:
    """A run or an adapter as the model, where the reference would be the model before it."""

    @pytest.fixture(scope="class")
    def tuned(self, settings, files, tmp_path_factory):
        """Runs by `chat` in a folder whose name has a blank."""
        folder = tmp_path_factory.mktemp("by chat") / "a run"
        rows = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
        chats = files / "chats.jsonl"
        chats.write_text("".join(json.dumps({"messages": row["prompt"] + row["chosen"]}) + "\n" for row in rows))
        values = {"data": str(chats), "eval_data": None, "max_steps": 4}
        train(settings("chat", folder, save_steps=2, **values))
        train(settings("chat", folder.with_name("in full"), method="full", **values))
        return folder

    @pytest.mark.parametrize("inner", [".", "adapter", "checkpoints/checkpoint-4"])
    def test_the_way_out_that_is_named_leads_there(self, settings, tuned, tmp_path, monkeypatch, inner):
        monkeypatch.chdir(tmp_path)
        given = settings("dpo", tmp_path / "dpo", model=str(tuned / inner), chat_template=None)
        with pytest.raises(ConfigError, match="is an adapter: merge it first") as refused:
            train(given)
        merge, then = map(shlex.split, re.findall("`(.*?)`", str(refused.value)))
        assert merge[0] == "randlora"
        invoke(*merge[1:])
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(given.model_dump(exclude_unset=True, by_alias=True)))
        invoke("train", "--config", "run.yaml", *then)
        assert losses(tmp_path / "dpo")[0] == pytest.approx(math.log(2), abs=1e-6)
        prompt = torch.arange(10, 20)[None]
        before = AutoModelForCausalLM.from_pretrained("merged")(prompt).logits
        expected = load_trained(tuned / inner).model(prompt).logits
        torch.testing.assert_close(before, expected, atol=1e-4, rtol=1e-4)

    def test_a_run_in_full_is_told_where_its_model_is(self, settings, tuned, tmp_path):
        given = settings("dpo", tmp_path / "dpo", model=str(tuned.with_name("in full")), chat_template=None)
        with pytest.raises(ConfigError, match=r"is a run: train on its model, `--model .*in full/model'`") as refused:
            train(given)
        (then,) = map(shlex.split, re.findall("`(.*?)`", str(refused.value)))
        train(given.model_copy(update={"model": then[1]}))
        assert losses(tmp_path / "dpo")[0] == pytest.approx(math.log(2), abs=1e-6)


class TestCommands:
    def test_eval_says_how_sure_it_is(self, runs, files):
        said = invoke("eval", folder_of(runs["dpo"]), "--data", files / "train.jsonl").stdout
        assert re.search(
            r"adapter: rewards/accuracies \d+\.\d% \(.* with 95% confidence\), loss .*, on 23 examples", said
        )
        found = answer("eval", folder_of(runs["kto"]))["adapter"]
        assert found["examples"] == 14
        assert found["rewards/margins"] == pytest.approx(runs["kto"].metrics["eval_rewards/margins"], abs=1e-5)

    def test_the_report_shows_accuracy_and_margins(self, runs, tmp_path):
        page = write_report([folder_of(runs["dpo"])], tmp_path / "report.html").read_text()
        assert "Reward of the chosen answer over the other" in page
        assert "Evaluation: rewards/margins" in page
        assert f"{runs['dpo'].metrics['eval_rewards/accuracies']:.1%} (" in page

    def test_the_card_has_both(self, runs):
        card = publish(folder_of(runs["dpo"]), "user/name", upload=False).card
        assert f"| eval rewards/margins | {runs['dpo'].metrics['eval_rewards/margins']:.4f} |" in card
        assert "pipeline_tag: text-generation" in card

    def test_merged_it_is_a_model_that_answers(self, runs, tmp_path):
        invoke("merge", folder_of(runs["dpo"]), tmp_path / "merged")
        folders = (folder_of(runs["dpo"]), tmp_path / "merged")
        asked = ("--prompt", "how was film 3", "--temperature", 0, "--max-new-tokens", 3)
        tuned, merged = (answer("generate", folder, *asked) for folder in folders)
        assert tuned["prompt"] == merged["prompt"] == "how was film 3"
