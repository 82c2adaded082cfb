"""What is imported, what is run, and what is installed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cli.conftest import save_adapter
from cli.helpers import invoke
from randlora import ConfigError, PeftModel
from randlora.tuner.base_model import empty_base, load_base

ROOT = Path(__file__).parents[2]

COUNT = """
import sys
import peft
before = set(sys.modules)
import randlora
print(len(before), *sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""

CODE = """
import os
os.environ["RANDLORA_RAN"] = "yes"
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Strange(LlamaForCausalLM): pass
class StrangeConfig(LlamaConfig): model_type = "strange"
class StrangeTokenizer(PreTrainedTokenizerFast): pass
"""


def test_beyond_peft_an_import_brings_nothing_but_this_package():
    run = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    of_peft, *packages = run.stdout.split()
    assert int(of_peft) > 1000
    assert set(packages) <= {"randlora", "peft"} | set(sys.stdlib_module_names)


@pytest.fixture
def strange(tiny_llama, tmp_path) -> tuple[Path, Path]:
    """A model that comes with code, and an adapter for it whose tokenizer does."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    adapter = save_adapter(tiny_llama, tmp_path / "adapter", target_modules=["q_proj"])
    for folder, file, changes in [
        (model, "config.json", {"model_type": "strange", "auto_map": {"AutoConfig": "code.StrangeConfig"}}),
        (model, "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.StrangeTokenizer", None]}}),
        (adapter, "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.StrangeTokenizer", None]}}),
        (adapter, "adapter_config.json", {"auto_mapping": {"base_model_class": "X", "parent_library": "code"}}),
    ]:
        content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps(content | changes))
        (folder / "code.py").write_text(CODE)
    return model, adapter


@pytest.mark.parametrize("command", ["inspect A --model M", "merge A OUT --model M"])
def test_code_in_a_model_folder_is_not_run(strange, tmp_path, command):
    model, adapter = strange
    places = {"A": adapter, "M": model, "OUT": tmp_path / "out"}
    result = invoke(*[places.get(word, word) for word in command.split()], code=2, stdin="y\n")
    assert "custom code" in result.output
    for load in (load_base, empty_base):
        with pytest.raises(ConfigError, match="custom code"):
            load(model, "CAUSAL_LM")
    assert "RANDLORA_RAN" not in os.environ


def test_code_beside_an_adapter_is_not_run(strange, tiny_llama, tmp_path, monkeypatch):
    _, adapter = strange
    monkeypatch.chdir(adapter)  # where `import code` would find it
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), adapter)
    invoke("merge", adapter, tmp_path / "out", "--model", tiny_llama, stdin="y\n")
    assert torch.is_tensor(next(AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters()))
    assert "RANDLORA_RAN" not in os.environ


@pytest.mark.parametrize("file", sorted(ROOT.glob("constraints*.txt")), ids=lambda file: file.name)
def test_every_dependency_is_pinned(file):
    lines = [line.strip() for line in file.read_text().splitlines()]
    kept = [line for line in lines if line and not line.startswith("#")]
    assert len(kept) >= 8
    assert not [line for line in kept if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!-]*", line)]
