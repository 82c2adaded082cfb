"""The search of a learning rate."""

import math

import pytest
from transformers import Trainer

from randlora.errors import ConfigError, RandLoraError
from randlora.train.search import MOST, Search, next_rate, steps_of, with_found_rate
from randlora.train.settings import LEARNING_RATES, load_settings


def settings(model, data, **values):
    common = {"model": model, "data": data, "r": 8, "max_length": 16, "batch_size": 16, "report_to": ["none"]}
    return load_settings(None, {**common, **values})


def rates_tried(loss, start=3e-4):
    tried = {}
    while (rate := next_rate(tried, start)) is not None:
        assert rate not in tried
        tried[rate] = loss(rate)
    return list(tried)


@pytest.mark.parametrize("best", [1e-5, 1e-4, 3e-4, 1e-3, 3e-3])
def test_the_best_rate_is_found_between_two_worse_ones(best):
    tried = rates_tried(lambda rate: abs(math.log(rate / best)))
    assert best in tried
    assert min(tried) < best < max(tried)
    assert len(tried) <= MOST


def test_a_default_that_is_best_takes_three():
    assert rates_tried(lambda rate: abs(math.log(rate / 3e-4))) == [3e-4, 1e-3, 1e-4]


def test_a_search_without_end_ends():
    assert len(rates_tried(lambda rate: -rate)) == MOST


def test_where_nothing_is_finite_it_goes_down():
    assert rates_tried(lambda rate: math.inf if rate > 2e-5 else rate, 3e-4)[:4] == [3e-4, 1e-4, 3e-5, 1e-5]


def test_steps_of_a_run():
    given = load_settings(None, {"model": "m", "data": "d", "batch_size": 8, "gradient_accumulation": 2, "epochs": 1.5})
    assert steps_of(given, 100) == math.ceil(1.5 * 7)  # 13 batches, two a step
    assert steps_of(given.model_copy(update={"max_steps": 5}), 100) == 5


@pytest.fixture
def losses(monkeypatch):
    """The losses that runs are to have, by rate, in place of training; what was tried is kept."""
    tried = []

    def training(wanted):
        """One list for all calls."""

        def train(trainer):
            rate = trainer.args.learning_rate
            tried.append(rate)
            loss = wanted(rate)
            if isinstance(loss, BaseException):
                raise loss
            for step in (1, 2):
                trainer.state.global_step, trainer.state.max_steps = step, 2
                trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, {"eval_loss": loss})

        monkeypatch.setattr(Trainer, "train", train)
        return tried

    return training


def through(one: Search) -> Search:
    while one.next is not None:
        one.go_on()
    return one


def test_what_was_tried_is_not_tried_again(losses, tmp_path, tiny_bert, reviews):
    given = settings(tiny_bert, reviews)
    tried = losses(lambda rate: KeyboardInterrupt() if rate == 1e-3 else 2.0)
    with pytest.raises(KeyboardInterrupt):
        through(Search(given, tmp_path, "a", 2))
    assert tried == [3e-4, 1e-3]
    losses(lambda rate: abs(math.log(rate / 1e-3)) + 1)
    found = through(Search(given, tmp_path, "a", 2)).found
    assert tried == [3e-4, 1e-3, 1e-3, 3e-3]
    assert (found.rate, found.enclosed) == (1e-3, True)
    assert list(found.losses) == [3e-4, 1e-3, 3e-3]


def test_searches_of_one_folder_do_not_mix(losses, tmp_path, tiny_bert, reviews):
    losses(lambda rate: 1.0)
    Search(settings(tiny_bert, reviews), tmp_path, "a", 2).go_on()
    other = Search(settings(tiny_bert, reviews, method="lora"), tmp_path, "b", 2)
    assert other.next == LEARNING_RATES["lora"]
    with pytest.raises(ConfigError, match=r"other settings \(batch_size\)"):
        Search(settings(tiny_bert, reviews, batch_size=4), tmp_path, "a", 2)


def test_a_rate_that_diverges_is_worse_than_all(losses, tmp_path, tiny_bert, reviews):
    losses(lambda rate: FloatingPointError("nan") if rate > 2e-4 else 1.0)
    found = through(Search(settings(tiny_bert, reviews), tmp_path, "a", 2)).found
    assert found.rate == 1e-4
    assert found.losses[3e-4] == math.inf


def test_no_finite_loss_is_an_error(losses, tmp_path, tiny_bert, reviews):
    losses(lambda rate: math.nan)
    with pytest.raises(RandLoraError, match=r"no learning rate of 3e-07, 1e-06, .*0\.0003 gave"):
        through(Search(settings(tiny_bert, reviews), tmp_path, "a", 2)).found  # noqa: B018


def test_short_runs_learn_and_leave_the_evaluation_data_alone(monkeypatch, tmp_path, tiny_bert, reviews):
    given = settings(tiny_bert, reviews, method="full", eval_data="nowhere.csv", output_dir=str(tmp_path / "run"))
    one = Search(given, tmp_path / "search", "a", 12)
    monkeypatch.setitem(LEARNING_RATES, "full", 1e-3)
    said = [one.go_on() for _ in range(2)]
    assert [text.partition(":")[0] for text in said] == ["learning rate 0.001", "learning rate 0.003"]
    found = one.found.losses
    assert found[3e-3] < found[1e-3]
    assert not (tmp_path / "run").exists()


def test_auto_is_a_number_before_the_run(losses, tmp_path, tiny_bert, reviews):
    tried = losses(lambda rate: abs(math.log(rate / 1e-3)) + 1)
    given = settings(tiny_bert, reviews, learning_rate="auto", output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="with_found_rate"):
        given.peak_learning_rate  # noqa: B018
    said = []
    assert with_found_rate(given, said.append).learning_rate == 1e-3
    assert said[-1] == "takes 0.001"
    count = len(tried)
    assert with_found_rate(given).learning_rate == 1e-3
    assert len(tried) == count
    assert with_found_rate(settings(tiny_bert, reviews)).learning_rate is None


def test_auto_is_for_one_process(monkeypatch, tiny_bert, reviews):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        with_found_rate(settings(tiny_bert, reviews, learning_rate="auto"))
