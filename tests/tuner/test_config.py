"""The config: PEFT's fields and defaults, its files, and every fault named."""

import dataclasses
import json
import math

import pytest
import torch
from peft import PeftConfig, PeftType
from peft.tuners.randlora import RandLoraConfig as TheirConfig

from randlora import ConfigError, RandLoraConfig, get_peft_model
from randlora.ops.bases import CHOICES, KINDS, Dense, kind_in_words

from .helpers import STACK_TARGETS, layers_of, ours, output, peft_itself, randomise, stack, theirs

OWN = {
    "exclude_modules",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "sparsity",
    "structured",
    "groups",
    "randlora_scaling",
    "basis_fingerprint",
    "trainable_token_indices",  # as PEFT's LoRA
    "ensure_weight_tying",
}


class TestFields:
    def test_every_field_and_default_of_peft(self):
        theirs, ours = ({f.name: f for f in dataclasses.fields(cls)} for cls in (TheirConfig, RandLoraConfig))
        assert set(ours) - set(theirs) == OWN
        assert set(theirs) <= set(ours)
        for name, field in theirs.items():
            assert ours[name].default == field.default, name
            assert ours[name].default_factory == field.default_factory, name
            assert ours[name].init == field.init, name
        their_values, our_values = vars(TheirConfig()), vars(RandLoraConfig())
        assert {name: our_values[name] for name in their_values} == their_values

    def test_the_defaults_as_the_project_states_them(self):
        config = RandLoraConfig()
        stated = {
            "r": 32,
            "target_modules": None,
            "projection_prng_key": 0,
            "save_projection": True,
            "sparse": False,
            "very_sparse": False,
            "randlora_dropout": 0.0,
            "randlora_alpha": 640,
            "fan_in_fan_out": False,
            "bias": "none",
            "modules_to_save": None,
            "init_weights": True,
            "layers_to_transform": None,
            "layers_pattern": None,
            "exclude_modules": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "sparsity": None,
            "randlora_scaling": "peft",
            "basis_fingerprint": None,
        }
        assert {name: getattr(config, name) for name in stated} == stated
        assert config.peft_type == PeftType.RANDLORA

    def test_two_configs_share_no_dictionary(self):
        RandLoraConfig().rank_pattern["x"] = 1
        assert RandLoraConfig().rank_pattern == {}

    def test_every_field_has_its_help(self):
        own = [
            f
            for f in dataclasses.fields(RandLoraConfig)
            if f.name not in {f.name for f in dataclasses.fields(PeftConfig)}
        ]
        assert all(field.metadata.get("help") for field in own)


FAULTS = [
    ({"r": 0}, "r=0"),
    ({"r": -3}, "r=-3"),
    ({"r": 2.5}, "r=2.5"),
    ({"r": True}, "r=True"),
    ({"r": "8"}, "r='8'"),
    ({"r": None}, "r=None"),
    ({"randlora_alpha": 0}, "randlora_alpha=0"),
    ({"randlora_alpha": -1.5}, "randlora_alpha=-1.5"),
    ({"randlora_alpha": math.nan}, "randlora_alpha=nan"),
    ({"randlora_alpha": math.inf}, "randlora_alpha=inf"),
    ({"randlora_alpha": "640"}, "randlora_alpha='640'"),
    ({"randlora_dropout": 1.0}, "randlora_dropout=1.0"),
    ({"randlora_dropout": -0.1}, "randlora_dropout=-0.1"),
    ({"randlora_dropout": math.nan}, "randlora_dropout=nan"),
    ({"randlora_dropout": None}, "randlora_dropout=None"),
    ({"bias": "lora_only"}, "bias='lora_only'"),
    ({"bias": True}, "bias=True"),
    ({"randlora_scaling": "rslora"}, "randlora_scaling='rslora'"),
    ({"sparsity": 0.5}, "sparsity=0.5"),
    ({"sparsity": 0}, "sparsity=0"),
    ({"sparsity": -3}, "sparsity=-3"),
    ({"sparsity": math.nan}, "sparsity=nan"),
    ({"sparsity": math.inf}, "sparsity=inf"),
    ({"sparse": True, "very_sparse": True}, "sparse and very_sparse"),
    ({"sparse": True, "sparsity": 3.0}, "sparse and sparsity"),
    ({"very_sparse": True, "sparsity": 3.0}, "very_sparse and sparsity"),
    ({"projection_prng_key": 1.5}, "projection_prng_key=1.5"),
    ({"projection_prng_key": None}, "projection_prng_key=None"),
    ({"projection_prng_key": True}, "projection_prng_key=True"),
    ({"rank_pattern": {"tall": 0}}, "rank_pattern['tall']=0"),
    ({"rank_pattern": {"tall": 1.5}}, "rank_pattern={'tall': 1.5}"),
    ({"rank_pattern": ["tall"]}, "rank_pattern=['tall']"),
    ({"rank_pattern": {"(": 1}}, "'(' is no regular expression"),
    ({"alpha_pattern": {"tall": 0}}, "alpha_pattern['tall']=0"),
    ({"alpha_pattern": {"tall": "x"}}, "alpha_pattern={'tall': 'x'}"),
    ({"r": 10**9}, "r=1000000000"),
    ({"randlora_alpha": 10**400}, "randlora_alpha=1000"),
    ({"target_modules": 5}, "target_modules=5"),
    ({"target_modules": [["tall"]]}, "target_modules=[['tall']]"),
    ({"target_modules": "*"}, "'*' is no regular expression"),
    ({"modules_to_save": "head"}, "modules_to_save='head'"),
    ({"save_projection": "yes"}, "save_projection='yes'"),
    ({"base_model_name_or_path": 5}, "base_model_name_or_path=5"),
    ({"layers_to_transform": [1], "target_modules": ".*tall"}, "layers_to_transform=[1]"),
    ({"layers_pattern": "layers", "target_modules": ["tall"]}, "layers_pattern='layers'"),
]


class TestValidation:
    @pytest.mark.parametrize(("values", "named"), FAULTS, ids=[named for _, named in FAULTS])
    def test_a_fault_is_refused_with_its_value(self, values, named):
        with pytest.raises(ConfigError) as raised:
            RandLoraConfig(**values)
        assert named in str(raised.value)
        assert isinstance(raised.value, ValueError)

    def test_all_faults_stand_in_one_message(self):
        with pytest.raises(ConfigError) as raised:
            RandLoraConfig(r=0, randlora_alpha=-1, randlora_dropout=2, bias="x", sparse=True, very_sparse=True)
        for part in ("r=0", "randlora_alpha=-1", "randlora_dropout=2", "bias='x'", "sparse and very_sparse"):
            assert part in str(raised.value)

    @pytest.mark.parametrize(
        "values",
        [
            {"r": 1},
            {"randlora_dropout": 0.999},
            {"randlora_dropout": 0},
            {"randlora_alpha": 0.001},
            {"sparsity": 1},
            {"sparsity": 1000.5},
            {"projection_prng_key": -1},
            {"projection_prng_key": 2**80},
            {"bias": "randlora_only"},
            {"layers_to_transform": [0], "layers_pattern": "layers", "target_modules": ["tall"]},
            {"rank_pattern": None},
        ],
        ids=str,
    )
    def test_the_edges_of_what_is_right_pass(self, values):
        RandLoraConfig(**values)

    def test_a_faulty_file_is_refused(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "RANDLORA", "r": 0}')
        with pytest.raises(ConfigError, match="r=0"):
            RandLoraConfig.from_pretrained(tmp_path)


class TestFiles:
    def test_round_trip_of_every_field(self, tmp_path):
        config = RandLoraConfig(
            r=7,
            target_modules=["wide", "tall"],
            projection_prng_key=-5,
            save_projection=False,
            sparsity=4.5,
            randlora_dropout=0.25,
            randlora_alpha=3.5,
            bias="randlora_only",
            modules_to_save=["head"],
            layers_to_transform=[0, 2],
            layers_pattern="layers",
            exclude_modules=["b", "a"],
            rank_pattern={"tall": 3},
            alpha_pattern={"tall": 5},
            randlora_scaling="paper",
            basis_fingerprint="ab" * 32,
            task_type="SEQ_CLS",
            revision="main",
        )
        config.save_pretrained(tmp_path)
        for loaded in (RandLoraConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
            assert type(loaded) is RandLoraConfig
            assert loaded == config

    def test_the_file_is_json_that_does_not_depend_on_set_order(self, tmp_path):
        texts = set()
        for order in (["a", "b", "c"], ["c", "b", "a"]):
            RandLoraConfig(target_modules=order, exclude_modules=order).save_pretrained(tmp_path)
            texts.add((tmp_path / "adapter_config.json").read_text())
        assert len(texts) == 1
        assert json.loads(texts.pop())["target_modules"] == ["a", "b", "c"]

    def test_fields_of_our_own_stand_there_only_where_they_say_something(self, tmp_path):
        RandLoraConfig().save_pretrained(tmp_path)
        content = json.loads((tmp_path / "adapter_config.json").read_text())
        assert not OWN & content.keys()
        assert {f.name for f in dataclasses.fields(TheirConfig)} <= content.keys() | {"runtime_config"}

    def test_a_file_of_peft_loads(self, tmp_path):
        written = TheirConfig(
            r=6, target_modules=["tall"], projection_prng_key=3, very_sparse=True, randlora_alpha=9, bias="all"
        )
        written.save_pretrained(tmp_path)
        loaded = PeftConfig.from_pretrained(tmp_path)
        assert type(loaded) is RandLoraConfig
        for name, value in vars(written).items():
            assert getattr(loaded, name) == value, name

    def test_our_file_loads_in_peft(self, tmp_path):
        written = RandLoraConfig(r=6, target_modules=["tall"], projection_prng_key=3, sparse=True, randlora_alpha=9)
        written.save_pretrained(tmp_path)
        with peft_itself():
            loaded = PeftConfig.from_pretrained(tmp_path)
        assert type(loaded) is TheirConfig
        for name, value in vars(loaded).items():
            assert getattr(written, name) == value, name

    def test_fields_of_a_later_version_are_passed_over(self, tmp_path):
        content = {"peft_type": "RANDLORA", "r": 5, "a_field_of_the_future": 1}
        (tmp_path / "adapter_config.json").write_text(json.dumps(content))
        assert PeftConfig.from_pretrained(tmp_path).r == 5

    def test_the_folder_is_made(self, tmp_path):
        RandLoraConfig().save_pretrained(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b" / "adapter_config.json").exists()


class TestUse:
    def test_a_model_keeps_the_config_it_was_given(self):
        config = RandLoraConfig(r=4, target_modules=["0"])
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 8)), config)
        assert model.peft_config["default"] is config

    def test_one_config_serves_models_of_different_sizes(self, tmp_path):
        config = RandLoraConfig(r=4, target_modules=["0"], very_sparse=True, randlora_scaling="paper")
        saved = []
        for sizes in ((6, 8), (60, 80)):
            model = randomise(get_peft_model(torch.nn.Sequential(torch.nn.Linear(*sizes)), config))
            assert layers_of(model)["base_model.model.0"].randlora_A["default"].shape == (4, 1, sizes[0])
            model.save_pretrained(tmp_path / str(sizes))
            saved.append(RandLoraConfig.from_pretrained(tmp_path / str(sizes)).basis_fingerprint)
        assert None not in saved
        assert saved[0] != saved[1]

    def test_a_fingerprint_that_was_given_is_not_forgotten(self):
        config = RandLoraConfig(basis_fingerprint="cd" * 32)
        config.record("ef" * 32)
        assert RandLoraConfig.adopt(config).basis_fingerprint == "ef" * 32

    def test_adopting_pefts_own(self):
        theirs = TheirConfig(r=5, target_modules=["tall"], projection_prng_key=9, sparse=True, task_type="CAUSAL_LM")
        theirs.auto_mapping = {"base_model_class": "X"}
        adopted = RandLoraConfig.adopt(theirs)
        assert type(adopted) is RandLoraConfig
        for name, value in vars(theirs).items():
            assert getattr(adopted, name) == value, name

    @pytest.mark.parametrize(
        ("scaling", "expected"), [("peft", lambda n: 12 / 4), ("paper", lambda n: 12 / (4 * math.sqrt(n)))]
    )
    def test_scaling(self, scaling, expected):
        model = ours(stack(), r=4, randlora_alpha=12, randlora_scaling=scaling, target_modules=STACK_TARGETS)
        for layer in layers_of(model).values():
            n = layer.randlora_lambda["default"].shape[1]
            assert layer.scaling["default"] == pytest.approx(expected(n))

    def test_paper_scaling_changes_the_output_by_the_root_of_n(self):
        config = {"r": 3, "randlora_alpha": 6, "target_modules": ["tall"]}
        peft, paper = (randomise(ours(stack(), randlora_scaling=s, **config)) for s in ("peft", "paper"))
        n = 4
        torch.testing.assert_close(
            peft.model.tall.get_delta_weight("default"), paper.model.tall.get_delta_weight("default") * math.sqrt(n)
        )

    def test_sparsity_three_is_sparse(self):
        config = {"r": 4, "target_modules": STACK_TARGETS}
        first, second = (randomise(ours(stack(), **config, **kind)) for kind in ({"sparse": True}, {"sparsity": 3}))
        assert torch.equal(output(first), output(second))

    def test_very_sparse_takes_the_root_of_the_smaller_drawn_dimension(self):
        config = {"r": 4, "target_modules": STACK_TARGETS}
        very = ours(stack(), very_sparse=True, **config)
        same = ours(stack(), sparsity=math.sqrt(17), **config)  # largest output 17, largest input 17
        assert very.model.tall.bases["default"].fingerprint == same.model.tall.bases["default"].fingerprint
        peft = theirs(stack(), very_sparse=True, **config)
        assert very.model.tall.bases["default"].same_numbers(peft.randlora_A["default"], peft.randlora_B["default"])


class TestKindsOfBases:
    def test_every_field_of_a_kind_is_one_of_the_config(self):
        names = {field.name for field in dataclasses.fields(RandLoraConfig)}
        wanted = [name for kind in KINDS.values() for name in (*kind.flags, *kind.values, *kind.options)]
        assert sorted(set(wanted)) == sorted(wanted)
        assert names.issuperset(wanted)

    def test_dense_without_any(self):
        config = RandLoraConfig()
        assert config.basis_kind(16) == Dense()
        assert kind_in_words(config.to_dict()) == "dense"
        assert config.peft_draws_bases

    @pytest.mark.parametrize("name", CHOICES)
    def test_each_choice_makes_its_kind(self, name):
        config = RandLoraConfig(**{name: True if name in CHOICES[name].flags else 4.5})
        assert type(config.basis_kind(16)) is CHOICES[name]
        assert kind_in_words(config.to_dict()) == name.replace("_", " ")
        theirs = {field.name for field in dataclasses.fields(TheirConfig)}
        assert config.peft_draws_bases == (name in theirs)
        assert (config.to_dict()["peft_type"] == PeftType.RANDLORA) == (CHOICES[name].file_type is None)
