"""Settings of the service: ``DPO_SERVICE_<NAME>`` in the environment, or options of its command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from dpo.config.base import refuse_passwords
from dpo.config.describe import suggestion, validation_error
from dpo.config.parameters import stage_configs
from dpo.config.schema import RunConfig
from dpo.errors import ConfigError
from pipelines import package
from pipelines.deployment import load_deployment
from pipelines.request import parameters

PREFIX = "DPO_SERVICE_"
SOURCE = "novalto"
"""The configuration's name for a community's data."""
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


class Settings(BaseModel):
    """All settings; lists are written with commas between their items."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    """Address to listen on; another than loopback needs a token or OIDC."""
    port: int = Field(8000, ge=0, le=65535)
    """0 takes a free one."""
    data_dir: Path = Path("runs/service")
    """Folder of the embedded database, the default store and work in progress. Relative paths, here
    and in ``settings``, mean the folder that the service is started in."""
    database: str | None = None
    """``postgresql://`` URL; an embedded SQLite database in ``data_dir`` when left out."""
    store: str | None = None
    """Where data sets, reports and models go; ``store`` in ``data_dir`` when left out."""

    preset: str | None = "quick"
    """Pipeline parameters to start from."""
    settings: dict[str, Any] = {}
    """Further pipeline parameters or configuration keys, as a JSON object."""
    deployment: str = ""
    """On a cluster: name or file of the deployment with images and resources."""
    max_runs: int = Field(1, ge=1)
    """So many runs at a time; the others wait in their order."""

    token: SecretStr | None = None
    """Bearer token that may do everything."""
    tokens_file: Path | None = None
    """JSON object: sha256 (hex) of a token to the list of its communities, or to ``"*"``."""
    oidc_issuer: str | None = None
    """Issuer whose tokens are accepted; its keys are found through its discovery document."""
    oidc_audience: str | None = None
    """Audience that such a token must name."""
    oidc_claim: str = "communities"
    """Claim that lists the communities of such a token."""

    max_body_bytes: int = Field(64 * 2**20, ge=1024)
    max_rows: int = Field(100_000, ge=1)
    max_row_bytes: int = Field(2**20, ge=64)
    """Longest row, as JSON in UTF-8."""
    max_uploads: int = Field(64, ge=1)
    """Bodies that are received or checked at a time; more are answered 503."""
    requests_a_minute: int = Field(600, ge=1)
    """Of one client; /health, /ready and /metrics are not counted."""
    header_seconds: float = Field(10.0, gt=0)
    """Time for a request's header to arrive."""
    body_seconds: float = Field(30.0, gt=0)
    """Longest pause while a body arrives; the whole of it may take ten times as long."""

    cors_origins: tuple[str, ...] = ()
    """Pages that may call the service from a browser; none by default."""
    callback_hosts: tuple[str, ...] = ()
    """Hosts that may be called back (``host`` or ``host:port``); none by default."""
    callback_private: bool = False
    """Allow callback hosts with private, loopback and link-local addresses."""
    callback_secret: SecretStr | None = None
    """Key of the signature of callbacks."""

    @field_validator("cors_origins", "callback_hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(item.strip() for item in value.split(",") if item.strip())
        return value

    @field_validator("settings", mode="before")
    @classmethod
    def _object(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], **given: Any) -> Settings:
        """Settings of the environment, with those of the command line over them.

        Raises:
            ConfigError: an unknown name, or a value that cannot work.
        """
        values: dict[str, Any] = {}
        for variable, text in environment.items():
            if not variable.startswith(PREFIX) or not text:
                continue
            name = variable.removeprefix(PREFIX).lower()
            if name not in cls.model_fields:
                raise ConfigError(f"unknown variable {variable}{_nearest(name, cls)}")
            values[name] = text
        values |= {name: value for name, value in given.items() if value is not None}
        try:
            found = cls(**values)
        except ValidationError as error:
            raise validation_error(
                error,
                cls,
                where=f"{PREFIX}* or the command line",
                fix="`python -m pipelines.service --help` and SECURITY.md explain them",
            ) from None
        found.check()
        return found

    def check(self) -> None:
        """Refuse combinations that cannot work.

        Raises:
            ConfigError: the first of them.
        """
        if not self.protected and self.host not in LOOPBACK:
            raise ConfigError(
                f"without a token or OIDC the service listens on loopback only, not on {self.host}",
                fix=f"set {PREFIX}TOKEN, {PREFIX}TOKENS_FILE or {PREFIX}OIDC_ISSUER",
            )
        if self.oidc_issuer and not self.oidc_audience:
            raise ConfigError(f"{PREFIX}OIDC_ISSUER needs {PREFIX}OIDC_AUDIENCE as well")
        if self.callback_hosts and not self.callback_secret:
            raise ConfigError(
                "callbacks are signed, and no key is set", fix=f"set {PREFIX}CALLBACK_SECRET"
            )
        if self.database and not _is_postgres(self.database):
            raise ConfigError(
                "the database is not a postgresql:// URL", fix=f"mend or remove {PREFIX}DATABASE"
            )
        for name in ("store", "oidc_issuer", "settings"):
            try:
                refuse_passwords(getattr(self, name), name)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        if self.deployment:
            # else it is each run that fails
            load_deployment(self.deployment)
        _ = self.ingest_config

    @property
    def protected(self) -> bool:
        """Whether callers must show who they are."""
        return any((self.token, self.tokens_file, self.oidc_issuer))

    @property
    def store_url(self) -> str:
        """The store of all communities."""
        return self.store or (self.data_dir.resolve() / "store").as_uri()

    def community_store(self, community: str) -> str:
        """The part of the store that belongs to one community."""
        return f"{self.store_url.rstrip('/')}/communities/{community}"

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        return package.defaults(package.load_package())

    @cached_property
    def ingest_config(self) -> RunConfig:
        """What the data step of every run reads; the place of the data is still open.

        Composing it takes longer than checking a data set does, so it is done once.

        Raises:
            ConfigError: a setting that cannot work.
        """
        return stage_configs(self.run_parameters("file:///data.jsonl", "community"))["ingest"]

    def run_parameters(self, data: str, community: str) -> dict[str, Any]:
        """Pipeline parameters of a run on ``data``, published to its community's store.

        Raises:
            ConfigError: a setting that cannot work.
        """
        assigned = {
            **self.settings,
            # with its format said, for it would else be guessed from the first row
            "datasets": [SOURCE],
            f"sources.{SOURCE}.path": data,
            "publish_store": self.community_store(community),
        }
        return parameters(
            self._defaults,
            preset_name=self.preset,
            assignments=[f"{name}={json.dumps(value)}" for name, value in assigned.items()],
        )


def _is_postgres(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # asking for it reads it
        return parts.scheme in ("postgresql", "postgres") and (parts.port or 1) > 0
    except ValueError:
        return False


def _nearest(name: str, schema: type[BaseModel]) -> str:
    return suggestion(name, schema.model_fields)
