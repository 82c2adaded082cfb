"""Templates as they are in the wild: a prompt that ends in a blank, an end of turn that is not the eos token."""

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from randlora.errors import ConfigError
from randlora.train.infer import generate_text
from randlora.train.settings import load_settings
from randlora.train.tasks import TASKS
from randlora.train.tasks.base import IGNORED
from randlora.train.tasks.chat import end_of_turn
from randlora.train.trained import Trained

BLANK = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
TALK = [{"role": "user", "content": "say good"}, {"role": "assistant", "content": "good film"}]


@pytest.fixture(scope="module")
def blanks():
    """A tokenizer of bytes in which a blank and the word behind it are one token, as in GPT-2 and Llama 3."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<eos>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    inner.train_from_iterator(["say good film again good film good film say say"] * 9, trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    found.add_special_tokens({"additional_special_tokens": special[:3]})
    found.chat_template = BLANK
    return found


def labelled(tokenizer, messages):
    rows = TASKS["chat"].prepare([{"messages": messages}], tokenizer, load_settings(None, {"model": "m", "data": "d"}))
    return tokenizer.decode([label for label in rows[0]["labels"] if label != IGNORED])


def test_a_prompt_that_ends_in_a_blank(blanks):
    both = blanks.apply_chat_template(TALK, tokenize=False)
    prompt = blanks.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    tokens, before = (blanks(text, add_special_tokens=False)["input_ids"] for text in (both, prompt))
    assert tokens[: len(before)] != before  # what was taken for a template that writes earlier turns anew
    assert labelled(blanks, TALK) == " good film<|end|>"
    assert labelled(blanks, TALK * 2) == " good film<|end|>" * 2


def test_a_template_that_writes_earlier_turns_anew_is_refused(blanks, monkeypatch):
    monkeypatch.setattr(blanks, "chat_template", "{{ messages | length }}" + BLANK)
    with pytest.raises(ConfigError, match="writes earlier turns anew"):
        labelled(blanks, TALK)


class TestEndOfTurn:
    def test_it_is_the_token_behind_an_answer(self, blanks, tokenizer):
        assert end_of_turn(blanks) == blanks.convert_tokens_to_ids("<|end|>") != blanks.eos_token_id

    def test_plain_text_is_none(self, blanks, monkeypatch):
        monkeypatch.setattr(blanks, "chat_template", BLANK.replace("<|end|>", "\n"))
        assert end_of_turn(blanks) is None

    def test_generation_asks_without_the_blank_and_ends_with_the_turn(self, blanks, monkeypatch):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(blanks), eos_token_id=blanks.eos_token_id, **sizes))
        asked = {}
        monkeypatch.setattr(model, "generate", lambda **arguments: asked.update(arguments))
        generate_text(Trained(None, "base", model, blanks, "chat", (), 64, None), TALK[:1], str)
        assert set(asked["eos_token_id"]) == {blanks.eos_token_id, end_of_turn(blanks)}
        assert blanks.decode(asked["input_ids"][0]).endswith("<|assistant|>")


class TestShapes:
    def read(self, rows, **values):
        settings = load_settings(None, {"model": "m", "data": "d", "task": "chat", **values})
        return TASKS["chat"].read(Dataset.from_list(rows), settings, "d")["messages"][:]

    def test_alpaca(self):
        rows = [
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            {"instruction": "Greet.", "input": "", "output": "Hello"},
        ]
        assert self.read(rows) == [
            [{"role": "user", "content": "Add.\n\n1 and 2"}, {"role": "assistant", "content": "3"}],
            [{"role": "user", "content": "Greet."}, {"role": "assistant", "content": "Hello"}],
        ]

    @pytest.mark.parametrize("column", ["conversations", "talks"])
    def test_sharegpt(self, column):
        talk = [{"from": who, "value": text} for who, text in (("system", "s"), ("human", "say"), ("gpt", "good"))]
        named = {} if column == "conversations" else {"input_column": column}
        (found,) = self.read([{column: talk}], **named)
        assert [(one["role"], one["content"]) for one in found] == [
            ("system", "s"),
            ("user", "say"),
            ("assistant", "good"),
        ]

    def test_a_turn_of_nobody_known(self):
        with pytest.raises(ConfigError, match="a turn of 'tool': 'x'; known are human"):
            self.read([{"conversations": [{"from": "tool", "value": "x"}]}])
