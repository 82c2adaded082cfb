import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import randlora
from cli.helpers import answer, invoke
from randlora.train.settings import TrainSettings
from randlora_cli import COMMANDS, app


def test_version():
    assert invoke("--version").stdout.strip() == f"randlora {randlora.__version__}"


def test_help_names_every_setting_and_shows_examples():
    text = invoke("train", "--help").stdout
    for name in TrainSettings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
    assert "Examples" in text
    assert "randlora train --config run.yaml" in text
    assert "\x1b[" not in text


@pytest.mark.parametrize("name", COMMANDS)
def test_a_narrow_terminal_shows_every_flag_whole(name):
    text = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"}).invoke(app, [name, "--help"]).stdout
    assert "--help" in text
    assert "…" not in "".join(line[:40] for line in text.splitlines())


def test_a_flag_turns_off_what_the_file_turns_on(tmp_path, tiny_bert, reviews):
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {tiny_bert}\ndata: {reviews}\nr: 8\nbf16: true\nsparse: true\n")
    settings = answer("train", "--config", config, "--no-bf16", "--dry-run")["settings"]
    assert (settings["bf16"], settings["sparse"]) == (False, True)


def test_training_prints_one_json_object(tmp_path, tiny_bert, reviews):
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {tiny_bert}\ndata: {reviews}\nr: 8\nmax_steps: 5\noutput_dir: {tmp_path}/run\n")
    flags = ["--max-steps", "2", "--bf16", "--target-modules", "query,value", "--json"]
    process = subprocess.run(
        [sys.executable, "-m", "randlora", "train", "-c", str(config), *flags],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(process.stdout)
    assert result["steps"] == 2
    assert "\nstep 2 of 2: loss " in process.stderr
    assert "\r" not in process.stderr  # a bar
    assert "LOAD REPORT" not in process.stderr  # advice of libraries
    assert "Failed to load" not in process.stderr
    assert "FutureWarning" not in process.stderr
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    adapter = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert adapter["target_modules"] == ["query", "value"]
    assert "max_steps: 2" in (tmp_path / "run/resolved.yaml").read_text()


def test_a_full_disk_is_one_line(tmp_path, tiny_bert, reviews, monkeypatch):
    def full(*_args, **_kwargs):
        raise Exception("No space left on device (os error 28)")  # as tokenizers raises it

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    flags = ["--max-steps", "1", "--max-length", "16", "--r", "8", "--output-dir", tmp_path / "run"]
    text = invoke("train", "--model", tiny_bert, "--data", reviews, *flags, code=1).output
    assert "No space left on device" in text
    assert str(tmp_path / "run") in "".join(text.split())


def test_a_dry_run_trains_nothing(tmp_path, tiny_bert, reviews):
    output = tmp_path / "run"
    process = invoke(
        "train", "--model", tiny_bert, "--data", reviews, "--output-dir", str(output), "--dry-run", "--json"
    )
    found = json.loads(process.stdout)
    assert found["labels"] == ["negative", "positive"]
    assert found["training_examples"] + found["evaluation_examples"] == 120
    assert 0 < found["trainable_parameters"] < found["total_parameters"]
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train"], "model: missing"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--model", "m", "--data", "nowhere.csv"], "nowhere.csv"),
        (["train", "--model", "m", "--data", "d.csv", "--r", "0"], "r=0"),
        (["train", "--model", "m", "--data", "d.csv", "--r", "many"], "--r"),
        (["train", "--no-such-flag"], "--no-such-flag"),
        (["no-such-command"], "no-such-command"),
        (["demo", "--seed", "-1"], "--seed"),
    ],
)
def test_mistakes_end_with_code_2_and_are_named(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in invoke(*arguments, code=2).output


def test_a_mistyped_command_is_told_the_near_one_and_lr_is_a_name():
    assert "Did you mean 'train'?" in invoke("trian", "--model", "m", code=2).output
    assert "Did you mean" not in invoke("frobnicate", code=2).output
    assert (
        "learning_rate='-1': input should be greater than 0"
        in invoke("train", "--model", "m", "--data", "d.csv", "--lr", "-1", code=2).output
    )


def test_help_lists_every_command_and_imports_none():
    program = (
        "import sys; from randlora_cli import main\nsys.argv = ['randlora', '--help']\ntry: main()\nfinally: "
        "print(*({'torch', 'peft', 'transformers', 'randlora'} & sys.modules.keys()), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not process.stderr.strip()
    assert all(f"│ {name} " in process.stdout for name in COMMANDS)


def test_the_help_of_a_command_and_a_mistaken_flag_import_no_library():
    program = (
        "import sys; from typer.testing import CliRunner; from randlora_cli import COMMANDS, app\n"
        "run = lambda *words: CliRunner().invoke(app, words).exit_code\n"
        "codes = {run(name, flag) for name in COMMANDS for flag in ('--help', '--hlep')}\n"
        "print(codes, *({'torch', 'peft', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()))"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "{0, 2}"


@pytest.mark.parametrize(("line", "expected"), [("randlora tr", "train"), ("randlora eval --bas", "--base")])
def test_the_shell_completes_commands_and_flags(line, expected):
    asked = {"_RANDLORA_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    process = subprocess.run(
        [sys.executable, "-c", "from randlora_cli import main; main()"],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.split() == [expected]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_summary_an_example_and_json(name):
    text = invoke(name, "--help").stdout
    assert COMMANDS[name][1] in " ".join(text.split())
    assert f"\n   randlora {name}" in text
    assert "--json" in text


def test_a_missing_extra_is_named():
    program = "import sys; sys.modules['typer'] = None\nfrom randlora_cli import main\nsys.argv = ['randlora']\nmain()"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "pip install 'randlora[train]'" in process.stderr
