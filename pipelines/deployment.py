"""How the steps run on a cluster: images, resources, nodes, secrets, retries; one YAML file.

None of it is a pipeline parameter. A parameter becomes an input of its task and so a part of
Kubeflow's cache key: more memory would train again. What is set here, when a package is compiled or
submitted, leaves finished steps finished (but the image: other code is another result).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from dpo.config.base import Recorded, Section
from dpo.config.describe import suggestion, validation_error
from dpo.config.nodes import Name, NodesOptions
from dpo.config.places import config_dir
from dpo.errors import ConfigError
from dpo.storage.store import open_store
from pipelines.resources import LabelKey, LabelValue, Resources
from pipelines.steps import Step

SecretKey = Annotated[str, Field(pattern=r"^\.?[-_a-zA-Z0-9][-._a-zA-Z0-9]*$", max_length=253)]
"""Key of a Secret."""
Variable = Annotated[str, Field(pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*$")]
"""Name of an environment variable, as every Kubernetes takes it."""

_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?:{_HOST}/)?{_PART}(?:/{_PART})*(?::\w[\w.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?",
    re.ASCII,
)
_FIX = "config/schemas/deployment.json describes every key"
_BY_NAME = {"environment", "labels", "node_selector", "keys"}
"""Settings whose keys are names of somebody else, which may have dots in them."""

DATA_STEPS = ("fingerprint", "ingest", "gate", "select", "publish", "finish")
TRAIN_STEPS = ("sft", "reference", "preference", "evaluate")
CHECKPOINTED_STEPS = ("sft", "preference")
"""Steps that train: they keep checkpoints, and can spread over several nodes."""
CHECKPOINTS_VARIABLE = "DPO_CHECKPOINTS"
"""Read by dpo.train.place."""


class Images(Section):
    """The images of the steps, each by digest or by a tag that never moves."""

    data: str = ""
    """Image without torch; empty keeps the placeholder."""
    train: str = ""
    """Image with torch; empty keeps the placeholder."""

    @field_validator("data", "train")
    @classmethod
    def _fixed(cls, image: str) -> str:
        if not image or re.search(r"@sha256:[0-9a-f]{64}$", image):
            return image
        tag = image.rpartition("/")[2].partition(":")[2]
        if tag in ("", "latest") or "@" in image:
            raise ValueError(
                f"image {image} names no fixed version: results would be cached although the image "
                "behind the name changed. Use name@sha256:... or a tag that never moves"
            )
        return image

    @field_validator("data", "train")
    @classmethod
    def _readable(cls, image: str) -> str:
        if image and not _IMAGE.fullmatch(image):
            raise ValueError(
                f"image {image!r} is no name that a node could ask a registry for: write "
                "host/path/name:tag with the path in small letters"
            )
        return image


class SecretEnv(Section):
    """A Secret of the run's namespace whose keys become environment variables."""

    name: Name
    """Name of the Secret."""
    keys: dict[SecretKey, Variable] = {
        "AWS_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY",  # nosec B105
    }
    """Key of the Secret to name of the variable."""


class Notification(Section):
    """Who is told when a run has ended; never a parameter, so no user's text becomes an address."""

    url: str = Field(pattern=r"^https?://[^\s@]+$")
    """Takes a POST with a JSON object; redirects are not followed."""
    secret: Name | None = None
    """Secret with the key that the message is signed with; none leaves it unsigned."""
    secret_key: SecretKey = "secret"
    """Key in that Secret."""


class Signing(Section):
    """The key that published models are signed with; given to the step ``publish`` alone."""

    secret: Name
    """Secret with the private key (Ed25519, PEM)."""
    secret_key: SecretKey = "key.pem"
    """Key in that Secret."""


class ModelCache(Section):
    """A volume that keeps base models between runs."""

    claim: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
    """PersistentVolumeClaim; ReadWriteMany where steps of several nodes use it at once. No dots:
    Kubeflow names the pod's volume after it."""
    mount_path: str = Field("/cache", pattern=r"^/[^\s:]+$")
    """Where it is mounted; DPO_CACHE_DIR and HF_HOME point into it."""


class Deployment(Recorded):
    """Everything about a run that is the cluster's and not the experiment's."""

    images: Images = Images()
    """Images of the steps."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the node asks the registry."""
    image_pull_secrets: list[Name] = []
    """Secrets with credentials of the registry."""
    run_as_non_root: bool = True
    """Refuse to start an image as root; its numeric user or the namespace's range is used."""
    store: str = ""
    """Where runs publish to unless they say otherwise: the default of publish_store in the form."""
    notification: Notification | None = None
    """Who is told when a run has ended."""
    store_secret: SecretEnv | None = None
    """Credentials of the store, for every step."""
    signing: Signing | None = None
    """Signs what is published. Steps that read it check that with DPO_TRUSTED_KEYS in
    ``environment``, the public keys."""
    checkpoint_uri: str = ""
    """Where training keeps checkpoints, so that a new pod goes on from the last one: a store
    (``s3://bucket/prefix``) or a mounted folder. Empty takes ``checkpoints`` in the run's store."""
    environment: dict[Variable, str] = {}
    """Variables of every step, such as AWS_ENDPOINT_URL; never a secret."""
    model_cache: ModelCache | None = None
    """Volume for base models, mounted where they are read."""
    labels: dict[LabelKey, LabelValue] = {}
    """Labels of every pod."""
    data: Resources = Resources()
    """fingerprint, ingest, gate and publish."""
    train: Resources = Resources(cpu="2", memory="8Gi")
    """sft, reference, preference and evaluate."""
    nodes: NodesOptions = NodesOptions()
    """Training over several nodes: sft and preference then start a job on the cluster, and their
    resources are those of each of its nodes."""
    steps: dict[Step, dict[str, Any]] = {}
    """Settings of single steps, over those of ``data`` or ``train``."""

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, variables: dict[str, str]) -> dict[str, str]:
        for name in variables:
            if re.search(r"SECRET|PASSWORD|TOKEN|ACCESS_KEY|KEY$", name, re.IGNORECASE):
                raise ValueError(
                    f"environment.{name} looks like a credential, and a package is readable by "
                    "all users of the pipeline: put it into a Secret and name that in store_secret"
                )
        return variables

    @field_validator("store", "checkpoint_uri")
    @classmethod
    def _store_urls(cls, url: str, told: ValidationInfo) -> str:
        is_folder = told.field_name == "checkpoint_uri" and url.startswith("/")
        try:
            if url and not is_folder:
                open_store(url)
        except ConfigError as error:
            raise ConfigError(error.found, where=told.field_name, fix=error.fix) from None
        return url

    @model_validator(mode="after")
    def _each_variable_once(self) -> Deployment:
        # Argo puts both into one entry, which no API server takes
        of_secret = list(self.store_secret.keys.values()) if self.store_secret else []
        for name in of_secret:
            if name in self.environment:
                raise ValueError(
                    f"the variable {name} is set by environment and by store_secret.keys: leave it "
                    "out of one of them"
                )
            if of_secret.count(name) > 1:
                raise ValueError(
                    f"two keys of the Secret in store_secret.keys set the variable {name}: name "
                    "another one, or leave one of them out"
                )
        return self

    @property
    def checkpoint_root(self) -> str:
        """URL under which the training steps keep their checkpoints; empty for none."""
        if self.checkpoint_uri or not self.store.startswith(("s3://", "minio://")):
            # a folder of one pod is not seen by the next
            return self.checkpoint_uri
        return f"{self.store.rstrip('/')}/checkpoints"

    @model_validator(mode="after")
    def _steps_fit(self) -> Deployment:
        cache = self.model_cache.mount_path.rstrip("/") if self.model_cache else ""
        for step in (*DATA_STEPS, *TRAIN_STEPS):
            if self.resources(step).shared_memory and cache == "/dev/shm":  # nosec B108
                raise ValueError(
                    f"model_cache.mount_path={cache} is where the shared_memory of step {step} is "
                    "mounted: choose another folder"
                )
        return self

    def resources(self, step: str) -> Resources:
        """The settings of one step.

        Raises:
            ConfigError: an unknown key or an impossible value for this step.
        """
        group = self.train if step in TRAIN_STEPS else self.data
        own = self.steps.get(step, {})  # type: ignore[call-overload]
        try:
            return Resources.model_validate({**group.model_dump(), **own})
        except ValidationError as error:
            raise validation_error(error, Resources, where=f"steps.{step}", fix=_FIX) from None


def names() -> list[str]:
    """The shipped deployments."""
    return sorted(path.stem for path in (config_dir() / "deployment").glob("*.yaml"))


def load_deployment(name_or_file: str, assignments: Iterable[str] = ()) -> Deployment:
    """A deployment by shipped name or file, with ``KEY=VALUE`` assignments over it.

    Args:
        name_or_file: ``cpu``, or the path of a YAML file; empty starts from the defaults.
        assignments: Dotted key and YAML value, such as ``train.gpus=2``; later ones win.

    Raises:
        ConfigError: no such deployment, not YAML, an unknown key or an impossible value.
    """
    values = _read(name_or_file) if name_or_file else {}
    for assignment in assignments:
        _assign(values, assignment)
    try:
        return Deployment.model_validate(values)
    except ValidationError as error:
        where = name_or_file or "deployment"
        raise validation_error(error, Deployment, where=where, fix=_FIX) from None


def _read(name_or_file: str) -> dict[str, Any]:
    path = Path(name_or_file)
    if name_or_file in names():
        path = config_dir() / "deployment" / f"{name_or_file}.yaml"
    elif not path.is_file():
        raise ConfigError(
            f"there is no deployment {name_or_file}{suggestion(name_or_file, names())}",
            fix="give a shipped name or the path of a YAML file",
        )
    try:
        # of two keys alike YAML's usual reader drops the first without a word
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_KeysOnce) or {}  # nosec B506
    except UnicodeDecodeError:
        raise ConfigError("not a text in UTF-8", where=str(path), fix="name a YAML file") from None
    except yaml.YAMLError as error:
        where = f"{path}:{mark.line + 1}" if (mark := _mark(error)) else str(path)
        found = getattr(error, "problem", None) or str(error).splitlines()[-1].strip()
        raise ConfigError(f"not YAML: {found}", where=where, fix="correct the file") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"a deployment is a mapping, this is a {type(values).__name__}",
            where=str(path),
            fix=f"see {config_dir().name}/deployment for examples",
        )
    return values


class _KeysOnce(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, and a part that holds itself."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        # built with all that is in it, a part that holds itself (`&a [*a]`) is an error of YAML's
        self.deep_construct = True

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As every loader does, and then the check: later ``<<`` has become the keys it adds."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value} stands there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node


def _mark(error: yaml.YAMLError) -> yaml.Mark | None:
    """Where in the file, if the reader knows."""
    return getattr(error, "problem_mark", None)


def _assign(values: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    *parents, last = _parts(key)
    if not equals or not all([*parents, last]):
        raise ConfigError(f"{assignment!r} is not KEY=VALUE", fix="write for example train.gpus=2")
    place = values
    for parent in parents:
        inner = place.get(parent)
        place[parent] = inner = dict(inner) if isinstance(inner, Mapping) else {}
        place = inner
    try:
        place[last] = yaml.load(text, Loader=_KeysOnce)  # nosec B506
    except yaml.YAMLError:
        raise ConfigError(f"the value of {key} is not YAML: {text}", fix="quote it") from None


def _parts(key: str) -> list[str]:
    """Of a dotted key: ``train``, ``node_selector`` and ``kubernetes.io/arch``, for example."""
    parts = key.split(".")
    for place, part in enumerate(parts[:-1]):
        if part in _BY_NAME:
            return [*parts[: place + 1], ".".join(parts[place + 1 :])]
    return parts


def image_assignments(images: Iterable[str]) -> list[str]:
    """``data=NAME`` as a setting of the deployment.

    Raises:
        ConfigError: not a kind of image and a name.
    """
    found = []
    for image in images:
        kind, equals, name = image.partition("=")
        if kind not in Images.model_fields or not equals or not name:
            raise ConfigError(
                f"--image {image} is not KIND=NAME",
                fix=f"the kinds are {' and '.join(Images.model_fields)}: "
                "--image data=registry/dpo-data:1.2",
            )
        # quoted, because a tag such as x:1.2 must stay a text
        found.append(f"images.{kind}={json.dumps(name)}")
    return found


def with_store(deployment: Deployment, store: str) -> Deployment:
    """The deployment with another store.

    Raises:
        ConfigError: not the URL of a store.
    """
    open_store(store)
    return deployment.model_copy(update={"store": store})


def with_images(deployment: Deployment, names_file: Path) -> Deployment:
    """The deployment with the images of a JSON file, where it names none itself.

    Raises:
        ConfigError: the file is not there or names no images.
    """
    try:
        found = json.loads(names_file.read_text(encoding="utf-8"))
        images = Images(data=found["data"], train=found["train"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            "the names of the images cannot be read",
            where=str(names_file),
            fix="run `make images-push REGISTRY=...`, which writes them",
        ) from None
    chosen = {
        kind: getattr(deployment.images, kind) or getattr(images, kind)
        for kind in ("data", "train")
    }
    return deployment.model_copy(update={"images": Images(**chosen)})
