"""What people write, and what it means: choices, overrides, old commands, mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from dpo.config import schemas
from dpo.config.compose import choices, compose
from dpo.config.parameters import stage_configs
from dpo.config.places import config_dir
from dpo.errors import ConfigError

MODELS = [
    *("pythia28", "pythia69", "llama7b", "gptj", "gpt2-large", "gpt2-xl", "zephyr"),
    *("smollm2", "tiny"),
]
# the commands of the old documentation, without their first words
OLD_COMMANDS = [
    "model=pythia28 datasets=[hh] loss=sft exp_name=anthropic_dpo_pythia28 "
    "gradient_accumulation_steps=2 batch_size=64 eval_batch_size=32 trainer=FSDPTrainer "
    "sample_during_eval=false",
    "model=pythia28 datasets=[hh] loss=dpo loss.beta=0.1 exp_name=anthropic_dpo_pythia28 "
    "gradient_accumulation_steps=2 batch_size=64 eval_batch_size=32 trainer=FSDPTrainer "
    "sample_during_eval=false model.fsdp_policy_mp=bfloat16 "
    "model.archive=.cache/user/anthropic_dpo_pythia28/LATEST/policy.pt",
    "model=pythia69 datasets=[hh] loss=sft exp_name=anthropic_dpo_pythia69 "
    "gradient_accumulation_steps=2 batch_size=64 eval_batch_size=32 trainer=FSDPTrainer "
    "sample_during_eval=false model.fsdp_policy_mp=bfloat16",
    "model=pythia69 datasets=[hh] loss=dpo loss.beta=0.1 model.archive=LATEST/policy.pt "
    "exp_name=anthropic_dpo_pythia69 gradient_accumulation_steps=2 batch_size=32 "
    "eval_batch_size=32 trainer=FSDPTrainer sample_during_eval=false",
    "model=llama7b model.name_or_path=models/llama datasets=[hh,shp] loss=ipo loss.beta=0.5 "
    "lr=1e-6 exp_name=x n_epochs=2 trainer=TensorParallelTrainer",
    "loss=sft model=gpt2-large datasets=[shp,se] n_epochs=1 eval_every=20_000 max_length=256 "
    "max_prompt_length=128 activation_checkpointing=true debug=true fsdp_port=12345",
    "model=zephyr datasets=[novalto] loss=dpo loss.beta=0.1 exp_name=my_experiment "
    "n_examples=1000 debug=true trainer=BasicTrainer",
    "model=blank_model model.name_or_path=org/name model.block_name=GPTNeoXLayer datasets=[hh] "
    "loss=dpo loss.label_smoothing=0.1 loss.reference_free=true wandb.enabled=true "
    "wandb.entity=me wandb.project=p local_dirs=[/scratch] minimum_log_interval_secs=2",
]


@pytest.mark.parametrize("command", OLD_COMMANDS)
def test_old_commands_compose_unchanged(command):
    composed = compose(command.split())
    assert composed.warnings == ()


def test_old_command_means_what_it_says():
    config = compose(OLD_COMMANDS[1].split()).config
    assert (config.model.name_or_path, config.loss.beta) == ("EleutherAI/pythia-2.8b", 0.1)
    assert (config.batch_size, config.gradient_accumulation_steps) == (64, 2)
    assert config.trainer.name == "FSDPTrainer"
    assert config.model.fsdp_policy_mp == "bfloat16"


def test_defaults_are_those_of_the_reference_code():
    config = compose(["loss=dpo"]).config
    assert (config.lr, config.warmup_steps, config.optimizer) == (5e-7, 150, "RMSprop")
    assert (config.max_length, config.max_prompt_length, config.max_grad_norm) == (512, 256, 10.0)
    assert (config.batch_size, config.eval_batch_size, config.seed) == (4, 16, 0)


@pytest.mark.parametrize("model", [*MODELS])
@pytest.mark.parametrize("loss", choices("loss"))
@pytest.mark.parametrize("trainer", ["BasicTrainer", "FSDPTrainer", "TensorParallelTrainer"])
def test_every_choice_composes(model, loss, trainer):
    config = compose([f"model={model}", f"loss={loss}", f"trainer={trainer}"]).config
    assert (config.loss.name, config.trainer.name) == (loss, trainer)


def test_choices_are_the_names_that_people_know():
    assert set(choices("model")) == {*MODELS, "blank_model"}
    assert set(choices("loss")) == {"sft", "dpo", "ipo", "robust", "hinge", "simpo", "orpo"}
    assert {"hh", "shp", "se", "novalto", "hh_sample"} <= set(choices("dataset"))


@pytest.mark.parametrize(
    "path", sorted((config_dir() / "presets").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_preset_composes(path):
    assert len(stage_configs(yaml.safe_load(path.read_text(encoding="utf-8")))) == 7


def test_shipped_models_use_one_type_for_policy_and_reference():
    for name in MODELS:
        model = compose([f"model={name}"]).config.model
        assert model.policy_dtype == model.reference_dtype, name


def test_activation_checkpointing_true_means_full():
    assert compose(["activation_checkpointing=true"]).config.activation_checkpointing == "full"


def test_model_block_is_an_alias_with_a_warning():
    composed = compose(["model.block=GPTNeoXLayer"])
    assert composed.config.model.block_name == "GPTNeoXLayer"
    assert "model.block_name" in composed.warnings[0]


def test_a_file_among_the_datasets_is_a_source():
    config = compose(["datasets=[pairs.jsonl,hh]"]).config
    assert set(config.sources) == {"pairs", "hh"}
    assert config.sources["pairs"].path == "pairs.jsonl"


@pytest.mark.parametrize(
    "datasets", ["/data/hh_sample.jsonl,hh_sample", "hh_sample,/data/hh_sample.jsonl"]
)
def test_a_file_and_a_data_set_of_one_name_are_both_read(datasets):
    config = compose([f"datasets=[{datasets}]"]).config
    paths = {name: source.path for name, source in config.sources.items()}
    assert paths == {"hh_sample": "builtin:hh-harmless", "hh_sample_2": "/data/hh_sample.jsonl"}
    assert sorted(config.datasets) == ["hh_sample", "hh_sample_2"]


@pytest.mark.parametrize("name", ["org/name", "./folder", "/models/mine"])
def test_a_model_may_be_a_hub_id_or_a_folder(name):
    config = compose([f"model={name}", "model.policy_dtype=float32"]).config
    assert (config.model.name_or_path, config.model.policy_dtype) == (name, "float32")


def test_origins_tell_file_and_command_line():
    composed = compose(["model=pythia28", "lr=1e-6"])
    assert composed.origins["lr"] == "command line"
    assert "pythia28.yaml" in composed.origins["model.name_or_path"]
    assert composed.origins["max_grad_norm"] == "default"


def test_own_models_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("name_or_path: org/mine\n")
    monkeypatch.chdir("/")
    config = compose(["model=mine", "loss=ipo"], user_dir=tmp_path).config
    assert config.model.name_or_path == "org/mine"
    assert config.loss.name == "ipo"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dataset=[hh]", ["unknown key dataset", "did you mean datasets"]),
        ("loss.bta=0.1", ["unknown key loss.bta", "did you mean loss.beta"]),
        ("lora.enabled=maybe", ["lora.enabled='maybe'", "true or false"]),
        ("=3", ["'=3' is not key=value"]),
        ("batch_sise=3", ["batch_sise", "batch_size"]),
        ("model=pythia29", ["pythia29", "pythia28"]),
        ("loss=dpoo", ["dpoo", "dpo"]),
        ("trainer=FSDP", ["FSDP", "FSDPTrainer"]),
        ("datasets=[hhh]", ["hhh", "hh"]),
        ("batch_size=0", ["batch_size", "0"]),
        ("batch_size=many", ["batch_size", "many"]),
        ("optimizer=Adam", ["optimizer", "Adam", "AdamW", "RMSprop"]),
        ("lr=-1", ["lr", "-1"]),
        ("truncation_mode=middle", ["truncation_mode", "keep_start", "keep_end"]),
        ("loss.label_smoothing=0.5", ["loss.label_smoothing", "0.5"]),
        ("n_epochs=null", ["n_epochs", "n_examples"]),
        # of SFT it means: leave it out
        ("n_epochs=0", ["n_epochs=0", "leaves out SFT alone"]),
        ("max_prompt_length=512", ["max_prompt_length", "max_length"]),
        ("gradient_accumulation_steps=3", ["batch_size", "gradient_accumulation_steps"]),
        ("publish.name=runs", ["publish.name=runs", "choose another name"]),
        ("publish.name=publishing", ["publish.name=publishing", "choose another name"]),
        (f"publish.name={'a' * 64}", ["choose another name"]),
        ("lr", ["key=value"]),
        # 2^53 + 1 is no floating-point number, and Kubeflow's parameters are
        ("seed=9007199254740993", ["seed=9007199254740993: input should be less than "]),
        # one of several types
        ("checkpoint_seconds=soon", ["checkpoint_seconds='soon': input should be 'auto' or "]),
        ("lora.modules=q_proj", ["lora.modules='q_proj': input should be 'all' or "]),
    ],
)
def test_mistakes_name_key_value_and_choices(override, words):
    with pytest.raises(ConfigError) as caught:
        compose([override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss=ipo", "loss.label_smoothing=0.1"],
        ["loss=sft", "loss.beta=0.1"],
        ["loss=sft", "loss.reference_free=true"],
        ["loss=dpo", "loss.log_probs=mean"],
        ["loss=simpo", "loss.reference_free=true"],
        ["loss=orpo", "loss.sft_weight=1"],
        ["loss=hinge", "loss.label_smoothing=0.1"],
    ],
)
def test_options_that_the_loss_ignores_are_errors(overrides):
    key = overrides[1].partition("=")[0]
    with pytest.raises(ConfigError, match=key):
        compose(overrides)


def test_a_yaml_file_that_is_broken_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("name_or_path: [unclosed\n")
    with pytest.raises(ConfigError, match=r"mine"):
        compose(["model=mine"], user_dir=tmp_path)


def test_own_choices_replace_shipped_ones(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tiny.yaml").write_text("name_or_path: org/other\n")
    assert compose(["model=tiny"], user_dir=tmp_path).config.model.name_or_path == "org/other"
    assert compose(["model=tiny"]).config.model.name_or_path == "builtin:tiny"


def test_a_config_dir_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        compose([], user_dir=tmp_path / "nowhere")


def test_schemas_in_the_repository_are_current():
    assert schemas.main(["--check"]) == 0


def test_shipped_files_satisfy_their_schemas():
    folder = config_dir()
    checked = 0
    for group in ("model", "loss", "dataset", "trainer"):
        schema = json.loads((folder / "schemas" / f"{group}.json").read_text(encoding="utf-8"))
        for path in (folder / group).glob("*.yaml"):
            jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), schema)
            checked += 1
    assert checked > 15


def test_validation_imports_nothing_heavy():
    code = (
        "import sys; from dpo.config.compose import compose; compose(['model=pythia28']); "
        "print(sorted({'torch', 'transformers', 'kfp', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_configuration_is_found_beside_the_package():
    assert (config_dir() / "config.yaml").is_file()
    assert Path(config_dir()).is_absolute()


def test_an_override_cannot_read_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    with pytest.raises(ConfigError) as caught:
        compose(["exp_name='${oc.env:AWS_SECRET_ACCESS_KEY}'"])
    assert "planted" not in str(caught.value)
