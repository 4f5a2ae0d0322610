"""What the launching step hands to the pods of its job."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass

from dpo.config.stages import Stage
from dpo.errors import ConfigError
from dpo.storage.store import is_store_url

VARIABLE = "DPO_NODE_JOB"
"""Environment variable of a training pod with its ``Request`` as JSON."""


@dataclass(frozen=True)
class Request:
    """One training, described so that a pod elsewhere can do it."""

    stage: Stage
    """sft or preference."""
    settings: str
    """JSON of the settings that the stage reads."""
    code: str
    """Fingerprint of the code that the step runs: the pods must run the same."""
    inputs: dict[str, str]
    """URL of each input artifact: pairs, base, reference."""
    output: str
    """URL of the artifact to write."""
    checkpoints: str
    """URL of periodic checkpoints; empty keeps none."""
    lease_seconds: int
    """How long the pods go on without a sign of the launcher."""

    @property
    def job_name(self) -> str:
        """Name of the job: the same for every attempt of a step, so that one adopts another's."""
        digest = hashlib.sha256(self.output.encode()).hexdigest()[:12]
        return f"dpo-{self.stage}-{digest}"

    def to_json(self) -> str:
        """As the pods read it."""
        return json.dumps(asdict(self), sort_keys=True)

    def check(self) -> None:
        """Make sure that pods elsewhere can reach every place.

        Raises:
            ConfigError: a path of this machine.
        """
        for name, url in {**self.inputs, "output": self.output}.items():
            if url and not is_store_url(url):
                raise ConfigError(
                    f"several nodes cannot share {name}: {url} is a path of one machine",
                    where="nodes.count",
                    fix="run on a cluster whose pipeline root is in a store, or set nodes.count=1",
                )


def given() -> Request:
    """The request of this pod.

    Raises:
        ConfigError: there is none: this is no pod of a training job.
    """
    try:
        return Request(**json.loads(os.environ[VARIABLE]))
    except (KeyError, ValueError, TypeError):
        raise ConfigError(
            f"{VARIABLE} describes no training",
            fix="this command is for the pods of a training job; use `dpo train`",
        ) from None
