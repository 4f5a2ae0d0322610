"""Pipeline parameters: which key each sets, and how --set finds its way."""

import json

import pytest

from dpo.config.losses import DPOLoss
from dpo.config.parameters import route, stage_configs, typed
from dpo.config.schema import RunConfig
from dpo.config.stages import STAGE_KEYS, load_stage, overridden, stage_json
from dpo.errors import ConfigError
from pipelines import package, request

TINY = {"model": "tiny"}


def settings(parameters, stage):
    return json.loads(stage_json(stage_configs({**TINY, **parameters})[stage], stage))


def test_a_parameter_of_one_stage_leaves_the_other_alone():
    assert settings({"sft_lr": 1e-3}, "sft")["lr"] == 1e-3
    assert settings({"sft_lr": 1e-3}, "preference")["lr"] == 5e-7


def test_overrides_come_last():
    parameters = {"preference_lr": 1e-3, "preference_overrides": ["lr=2e-3", "max_grad_norm=1.0"]}
    assert settings(parameters, "preference")["lr"] == 2e-3
    assert settings(parameters, "preference")["max_grad_norm"] == 1.0


def test_zero_means_all_or_the_loss_default():
    assert settings({"sft_n_examples": 0}, "sft")["n_examples"] is None
    assert settings({"evaluate_n_pairs": 0}, "evaluate")["n_eval_examples"] is None
    assert settings({"preference_beta": 0.0}, "preference")["loss"]["beta"] == 0.1


@pytest.mark.parametrize("name", ["org/name", "/models/mine", "./mine"])
def test_a_model_that_is_none_of_ours_is_a_hub_id_or_a_folder(name):
    assert settings({"model": name}, "sft")["model"]["name_or_path"] == name


@pytest.mark.parametrize(
    "text", ["it's", "a=b", "[x]", "${seed}", "a,b", '"', "x\\", "a\\b", "\\'", "\\${x}\\"]
)
def test_text_of_a_form_is_no_syntax(text):
    config = stage_configs({**TINY, "model": f"/models/{text}"})["sft"]
    assert config.model.name_or_path == f"/models/{text}"


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("preference_beta=0.2", ("preference_beta", 0.2)),
        ("loss.beta=0.2", ("preference_beta", 0.2)),
        # 0 is the form's empty field: a key that is written out says 0
        ("loss.beta=0", ("preference_overrides", "loss.beta=0")),
        ("loss.label_smoothing=0.0", ("preference_overrides", "loss.label_smoothing=0.0")),
        ("preference.n_examples=0", ("preference_overrides", "n_examples=0")),
        ("sft.lr=1e-5", ("sft_lr", 1e-5)),
        ("preference.n_examples=64", ("preference_n_examples", 64)),
        ("sft.max_grad_norm=1.0", ("sft_overrides", "max_grad_norm=1.0")),
        ("loss.reference_free=true", ("preference_overrides", "loss.reference_free=true")),
        ("model.policy_dtype=bfloat16", ("both_overrides", "model.policy_dtype=bfloat16")),
        ("datasets=[hh,shp]", ("datasets", ["hh", "shp"])),
        # with quotes, as the reference code's commands have them
        ("datasets=['hh', \"shp\"]", ("datasets", ["hh", "shp"])),
        ("datasets=['a,b.jsonl', 'c.jsonl']", ("datasets", ["a,b.jsonl", "c.jsonl"])),
        # letters that no override has without quotes
        ("datasets=[données.jsonl,~/b.jsonl]", ("datasets", ["données.jsonl", "~/b.jsonl"])),
        ("publish_name='a' and 'b'", ("publish_name", "'a' and 'b'")),
        (r"publish_name='it\'s'", ("publish_name", "it's")),
        ("model='tiny'", ("model", "tiny")),
        ("sft_model_uri='s3://b/x'", ("sft_model_uri", "s3://b/x")),
        ("seed=3", ("seed", 3)),
        ("gate.min_reward_accuracy=0.6", ("gate_min_reward_accuracy", 0.6)),
        # as the form takes them, and one alone
        ('sft_overrides=["lr=2", "x=a b"]', ("sft_overrides", ["lr=2", "x=a b"])),
        ("preference_overrides=max_grad_norm=1", ("preference_overrides", ["max_grad_norm=1"])),
    ],
)
def test_every_key_finds_its_parameter(assignment, expected):
    assert route(assignment) == expected


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("loss.beta", ["KEY=VALUE"]),
        ("model = tiny", ["KEY=VALUE", "without blanks around"]),
        ("lr=1e-5", ["sft.lr=1e-5", "preference.lr=1e-5"]),
        ("preference_bta=1", ["preference_bta", "preference_beta"]),
        ("nonsense=1", ["nonsense"]),
    ],
)
def test_assignments_that_go_nowhere_say_so(assignment, words):
    with pytest.raises(ConfigError) as caught:
        route(assignment)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("loss.beta=abc", "loss.beta='abc': expected a number"),
        ("preference_beta=abc", "preference_beta='abc': expected a number"),
        ("max_length=ten", "max_length='ten': expected an integer"),
        ("gate.force=3", "gate.force=3: expected true or false"),
    ],
)
def test_a_value_of_another_type_is_named_by_the_key_that_was_written(assignment, expected):
    defaults = package.defaults(package.load_package())
    with pytest.raises(ConfigError) as caught:
        request.parameters(defaults, assignments=[assignment])
    assert str(caught.value) == expected


def test_values_take_the_type_of_the_form():
    assert typed("lr", 1, 0.5) == 1.0
    assert isinstance(typed("lr", 1, 0.5), float)
    assert typed("datasets", "hh", ["x"]) == ["hh"]
    with pytest.raises(ConfigError, match="seed"):
        typed("seed", "one", 0)
    with pytest.raises(ConfigError, match="seed"):
        typed("seed", True, 0)


@pytest.mark.parametrize("value", [2**53 + 1, -(2**60)])
def test_an_integer_that_a_floating_point_number_does_not_hold_is_refused(value):
    with pytest.raises(ConfigError, match=f"seed={value}: Kubeflow passes"):
        typed("seed", value, 0)
    assert typed("seed", 2**53, 0) == 2**53


@pytest.mark.parametrize(
    ("parameters", "where"),
    [
        ({"sft_overrides": [""]}, "sft_overrides"),
        ({"preference_overrides": ["max_grad_norm"]}, "preference_overrides"),
        ({"sft_overrides": ['"lr=1"']}, "sft_overrides"),
        ({"preference_lr": 1e-5, "preference_overrides": ["lr=-1"]}, "preference_overrides"),
        ({"preference_lr": -1.0, "preference_overrides": ["lora.rank=4"]}, "preference_lr"),
    ],
)
def test_a_message_names_the_field_of_the_form(parameters, where):
    with pytest.raises(ConfigError) as caught:
        stage_configs({**TINY, **parameters})
    assert caught.value.where == f"parameter {where}"


def test_sft_is_no_preference_loss():
    with pytest.raises(ConfigError, match="preference_loss=sft"):
        stage_configs({**TINY, "preference_loss": "sft"})


def test_an_undeclared_setting_cannot_be_read():
    config = stage_configs(TINY)["gate"]
    assert config.gate.min_reward_accuracy == 0.5
    with pytest.raises(AttributeError):
        _ = config.lr


def test_every_declared_key_exists():
    for stage, keys in STAGE_KEYS.items():
        assert keys <= set(RunConfig.model_fields), stage


@pytest.mark.parametrize("text", ["{", "[]", '{"lr": 1}', '{"gate": {"min_reward_accuracy": 2}}'])
def test_broken_settings_of_a_step_name_the_step(text):
    with pytest.raises(ConfigError, match="gate"):
        load_stage("gate", text)


def test_a_training_step_alone_has_a_loss_of_its_own():
    """The loss decides what is trained: sft with that of preference training trained on pairs."""
    assert load_stage("sft", "{}").loss.name == "sft"
    assert load_stage("preference", overridden("preference", "{}", ["loss.beta=0.3"])).loss == (
        DPOLoss(beta=0.3)
    )
    for stage, loss in (("sft", "dpo"), ("preference", "sft")):
        with pytest.raises(ConfigError, match=f"loss={loss} is not a loss of step {stage}"):
            load_stage(stage, json.dumps({"loss": {"name": loss}}))


def test_settings_survive_their_json():
    config = stage_configs({**TINY, "preference_loss": "ipo", "preference_beta": 0.3})["preference"]
    assert stage_json(load_stage("preference", stage_json(config, "preference")), "preference") == (
        stage_json(config, "preference")
    )


@pytest.mark.parametrize("lora", [[], ["lora.enabled=true"], ["lora.save=adapter"]])
def test_an_adapter_that_is_not_written_cannot_be_published_alone(lora):
    with pytest.raises(ConfigError, match="writes no adapter"):
        stage_configs({**TINY, "preference_overrides": ["publish.lora=adapter", *lora]})
    written = ["publish.lora=adapter", "lora.enabled=true", "lora.save=adapter"]
    with pytest.raises(ConfigError, match="does not have the model that the adapter belongs to"):
        stage_configs({**TINY, "preference_overrides": written[1:]})
    configs = stage_configs({**TINY, "preference_overrides": written})
    assert configs["publish"].publish.lora == "adapter"
