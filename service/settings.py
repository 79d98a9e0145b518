"""The settings: one frozen object, read once from `FOVEA_*` environment variables."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from fovea.service.environment import (
    MODELS_SETTING,
    EnvironmentSource,
    is_kubernetes_variable,
    name_variable,
    read_platform_settings,
)
from fovea.service.errors import SettingsError
from fovea.service.packaged_models import DEFAULT_FOLDER, find_packaged_models
from fovea.service.providers import ProviderSetting
from fovea.service.remote.store_uri import (
    StoreError,
    check_store_uri,
    find_copy_folder,
    has_scheme,
    require_private,
)
from fovea.service.setting_values import (
    check_model_name,
    check_path,
    check_route,
    describe_values,
    parse_hosts,
    parse_networks,
)

ENVIRONMENT_PREFIX: Final = "FOVEA_"

PROTOCOLS: Final = ("native", "oip", "torchserve", "tensorflow", "huggingface")

MAX_REQUEST_IMAGES: Final = 4096
"""Maximum number of images in one request, independent of the setting."""

_PILLOW_MAX_PIXELS: Final = 178_956_970
"""Number of pixels above which Pillow itself refuses an image: twice its `Image.MAX_IMAGE_PIXELS`."""


def _parse_protocols(value: Any) -> Any:
    """Split a comma-separated list of protocols.

    Raises `ValueError` for an unknown protocol, and if the native protocol is missing.
    """
    if not isinstance(value, str):
        return value
    names = tuple(name.strip() for name in value.split(","))
    for name in names:
        if name not in PROTOCOLS:
            raise ValueError(f"there is no protocol {name!r}; the protocols are {', '.join(PROTOCOLS)}")
    if PROTOCOLS[0] not in names:
        raise ValueError(
            f"{PROTOCOLS[0]!r} is missing; add it, because health probes and the web page need it"
        )
    return names


def _parse_url_hosts(value: Any) -> Any:
    """Split a comma-separated list of hosts whose images may be fetched.

    Raises `ValueError` for anything that is no host, with a port or without.
    """
    if not isinstance(value, str):
        return value
    hosts = tuple(filter(None, (one.strip() for one in value.split(","))))
    if hosts:
        from fovea.service.remote.guarded_https import UrlRefused, check_allowed_host  # 20 ms

        for one in hosts:
            try:
                check_allowed_host(one)
            except UrlRefused as error:
                raise ValueError(str(error)) from None
    return hosts


class Settings(BaseSettings):
    """Every setting, with its unit, bounds and default. Durations are in seconds."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, env_ignore_empty=True, frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(
        8000,
        ge=0,
        le=65535,
        description="TCP port to listen on; 0 takes a free port. By default `AIP_HTTP_PORT` or `PORT`.",
    )
    grpc_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="TCP port for gRPC (extra `grpc`); 0 takes a free port; by default gRPC is off.",
    )
    grpc_connections: int = Field(
        256,
        ge=1,
        le=1_000_000,
        description="Largest number of open gRPC connections of each worker; further ones are closed.",
    )
    models: Annotated[Path, AfterValidator(check_path)] = Field(
        DEFAULT_FOLDER,
        validate_default=True,
        description="Model repository `<name>/<version>/model.onnx`, the versions of one model "
        "(`<version>/model.onnx`), or one model file; or the URI of a store "
        "with one of these, such as `s3://bucket/zoo`.",
    )
    model_name: Annotated[str | None, AfterValidator(check_model_name)] = Field(
        None,
        description="Name of the model if `FOVEA_MODELS` is one file or has the versions of one model; by "
        "default the name in its contract.",
    )
    default_model: str | None = Field(
        None,
        description="Model of `/v1/classify`; by default the model in the file `default`, or the only one.",
    )
    models_loaded: int = Field(
        0,
        ge=0,
        le=10_000,
        description="Largest number of models in memory; others load on their next request, and the least "
        "recently used model is unloaded; 0: all models stay loaded.",
    )
    state: Path | None = Field(
        None,
        description="Folder for the verdicts on versions; by default each lies beside its model file.",
    )
    strict: bool = Field(
        False, description="End the start if a model cannot be served, instead of serving the others."
    )
    model_cache: Path | None = Field(
        None,
        description="Folder for the copy of a store; by default `fovea/models` in the user's cache, or a "
        "folder for temporary files.",
    )
    store_poll: float = Field(
        60.0,
        ge=0,
        le=86_400,
        description="Seconds between two looks at a store for new versions; 0: at the start and on SIGHUP.",
    )
    watch: float = Field(
        2.0,
        ge=0,
        le=3600,
        description="Seconds between two looks at the repository for new versions; 0: never.",
    )
    management: bool = Field(
        False, description="Offer `/v2/repository` to load and unload models by request."
    )
    management_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(parse_hosts)] = Field(
        (),
        description="Host names under which browsers may manage models, separated by commas; private names "
        "and addresses always may.",
    )
    keys: Path | None = Field(
        None,
        description="File with the API keys, which `fovea keys` writes; without it nobody needs a key.",
    )
    protocols: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_parse_protocols)] = Field(
        PROTOCOLS, description="Protocols to serve, separated by commas; `native` must be among them."
    )
    health_route: Annotated[str | None, AfterValidator(check_route)] = Field(
        None, description="Further path of `/health/ready`; by default `AIP_HEALTH_ROUTE`."
    )
    predict_route: Annotated[str | None, AfterValidator(check_route)] = Field(
        None, description="Further path of `:predict` for the default model; by default `AIP_PREDICT_ROUTE`."
    )
    replay_images: int = Field(
        64,
        ge=0,
        le=64,
        description="Last images of each model to keep for the shadow test of its next version; 0: none.",
    )
    trial_seconds: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="Limit on the processor time of a shadow test, in seconds.",
    )
    trial_bytes: int = Field(
        4 << 30, ge=1 << 28, le=1 << 40, description="Memory limit of a shadow test, in bytes."
    )
    swap_flips: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Largest share of the last images that may get another label from a new version; 1: any.",
    )
    swap_slowdown: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="Largest ratio of a new version's time per image to the old version's; 0: any.",
    )
    workers: int = Field(
        1,
        ge=1,
        le=256,
        description="Processes that share the port and the processors, each with its own runners.",
    )
    provider: ProviderSetting = Field(
        "auto",
        description="Execution provider; if another than `auto` is set and does not load, the start ends.",
    )
    engine_cache: Path | None = Field(
        None,
        description="Folder for what `tensorrt` compiles; by default each process compiles at each start.",
    )
    runners: int = Field(
        0, ge=0, le=256, description="Processes that decode and classify images; 0: one per processor."
    )
    runner_threads: int = Field(
        0,
        ge=0,
        le=256,
        description="CPU threads inside one model call; 0: one, and all processors if no other call runs.",
    )
    decode_threads: int = Field(
        0,
        ge=0,
        le=256,
        description="Images that one runner decodes at the same time; 0: one on a CPU, more on a GPU.",
    )
    batch_max: int = Field(
        0,
        ge=0,
        le=1024,
        description="Largest number of images in one model call; 0: 4 on a CPU, 32 on a GPU.",
    )
    batch_wait_ms: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="Milliseconds that an image may wait for other images to join its batch.",
    )
    batch_timeout: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="Seconds that a runner may take for one batch before it is killed and replaced.",
    )
    runner_wait: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="Seconds that work waits for a runner while all runners are dead; then 503.",
    )
    runner_absence: float = Field(
        120.0,
        ge=0,
        le=86_400,
        description="Seconds without a runner after which `/health/live` fails; 0: it never fails.",
    )
    queue_images: int = Field(
        256,
        ge=1,
        le=100_000,
        description="Largest number of images accepted and not yet answered; beyond it 503.",
    )
    body_bytes: int = Field(64 << 20, ge=1 << 10, le=1 << 30, description="Largest request body, in bytes.")
    json_bytes: int = Field(
        4 << 20,
        ge=1 << 10,
        le=1 << 30,
        description="Largest JSON body in another protocol than `native`, in bytes; it blocks the worker.",
    )
    bodies_bytes: int = Field(
        256 << 20,
        ge=1 << 10,
        le=1 << 40,
        description="Memory limit of all bodies that are read or waited for, in bytes; beyond it 503.",
    )
    deadline_ms: float = Field(
        0.0,
        ge=0,
        le=3_600_000,
        description="Milliseconds after which an answer is of no use without `X-Deadline-Ms`; 0: never.",
    )
    body_timeout: float = Field(
        30.0, gt=0, le=3600, description="Seconds within which a request body must have arrived."
    )
    header_timeout: float = Field(
        10.0, gt=0, le=3600, description="Seconds within which a request's headers must have arrived."
    )
    keep_alive: float = Field(
        75.0, gt=0, le=3600, description="Seconds that a connection may wait for its next request."
    )
    tls_cert: Path | None = Field(
        None, description="PEM file with the certificate and its chain: the port speaks TLS, and only TLS."
    )
    tls_key: Path | None = Field(
        None, description="PEM file with the private key of `FOVEA_TLS_CERT`, without a pass phrase."
    )
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file with authorities: clients need a certificate of one of them except for health.",
    )
    connections: int = Field(
        4096,
        ge=1,
        le=1_000_000,
        description="Largest number of open connections; further connections wait to be accepted.",
    )
    drain_grace: float = Field(
        7.0, ge=0, le=3600, description="Seconds after SIGTERM during which new work is still accepted."
    )
    drain_limit: float = Field(
        20.0, ge=0, le=3600, description="Seconds after the grace time for accepted work to be finished."
    )
    image_pixels: int = Field(
        50_000_000,
        ge=1,
        le=_PILLOW_MAX_PIXELS,
        description="Largest number of pixels in one image, by its header.",
    )
    decode_bytes: int = Field(
        3 << 29,
        ge=1 << 20,
        le=1 << 40,
        description="Memory limit of all images that are being decoded, in bytes.",
    )
    request_images: int = Field(
        64, ge=1, le=MAX_REQUEST_IMAGES, description="Largest number of images in one request."
    )
    url_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_parse_url_hosts)] = Field(
        (),
        description="Hosts from which images may be fetched by https URL, such as `*.s3.amazonaws.com`, with "
        "commas; none by default.",
    )
    url_bytes: int = Field(
        16 << 20, ge=1 << 10, le=1 << 30, description="Largest image that is fetched by URL, in bytes."
    )
    url_seconds: float = Field(
        10.0, gt=0, le=600, description="Seconds within which an image must have been fetched by URL."
    )
    url_fetches: int = Field(
        8, ge=1, le=256, description="Images that one worker fetches by URL at the same time."
    )
    drift_images: int = Field(
        1000, ge=100, le=1_000_000, description="Last images of a model from which Fovea computes drift."
    )
    explain: bool = Field(True, description="Offer explanations, layers, maps and weights.")
    weights: bool = Field(
        False, description="Answer with whole weights, and not only with those of one output."
    )
    explain_seconds: float = Field(
        4.0,
        gt=0,
        le=600,
        description="Seconds for a heat map by occlusion, which works for any network.",
    )
    explain_idle: float = Field(
        60.0,
        gt=0,
        le=86_400,
        description="Seconds without use after which the process that explains ends.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log lines to write."
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="Format of the log; `auto`: text in a terminal, JSON elsewhere."
    )
    log_requests: int = Field(
        100,
        ge=0,
        le=1_000_000,
        description="Requests logged per second for each class of status; 0: none.",
    )
    log_stream: Literal["stderr", "stdout"] = Field(
        "stderr", description="Stream of the log; the greeting of a start goes to the other stream."
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode, BeforeValidator(parse_networks)] = Field(
        (),
        description="Proxies whose `X-Forwarded-*` headers count: addresses or CIDR networks, with commas.",
    )
    traces: bool = Field(
        False,
        description="Send OpenTelemetry traces (extra `traces`); the `OTEL_*` variables set the destination.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the environment, then the packaged models."""
        packaged = InitSettingsSource(settings_cls, find_packaged_models())
        return init_settings, EnvironmentSource(settings_cls), packaged

    _store_uri: str | None = PrivateAttr(None)

    @property
    def store_uri(self) -> str | None:
        """URI of the store of which `models` is the local copy; None if `models` is all there is."""
        return self._store_uri

    def require_folder(self) -> None:
        """Raise `SettingsError` if `models` is the copy of a store, which a change must not be written to."""
        if self._store_uri:
            raise SettingsError(
                f"FOVEA_MODELS is {self._store_uri!r}, and this command changes folders only; change the "
                "store with its own tools"
            )

    @model_validator(mode="wrap")
    @classmethod
    def _replace_uri(cls, data: Any, handler: ModelWrapValidatorHandler[Settings]) -> Settings:
        """Let `models` be the local copy of a store if it is a URI."""
        models = data.get("models") if isinstance(data, dict) else None
        if not (isinstance(models, str) and has_scheme(models)):
            return handler(data)
        try:
            uri = check_store_uri(models)
        except StoreError as error:
            raise ValueError(f"{name_variable(MODELS_SETTING, models)}: {error}") from None
        settings = handler({**data, "models": "/"})  # the copy need not exist yet
        settings._store_uri = uri
        folder = find_copy_folder(uri, settings.model_cache)
        if folder.is_dir():
            try:
                require_private(folder)
            except StoreError as error:
                raise ValueError(f"{name_variable(MODELS_SETTING, models)}: {error}") from None
            folder = check_path(folder)
        vars(settings)["models"] = folder
        return settings

    @model_validator(mode="after")
    def _check_limits(self) -> Settings:
        if self.request_images > self.queue_images:
            raise ValueError(
                f"FOVEA_REQUEST_IMAGES is more than FOVEA_QUEUE_IMAGES allows: {self.request_images} > "
                f"{self.queue_images}"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "FOVEA_TLS_KEY" if self.tls_cert else "FOVEA_TLS_CERT"
            raise ValueError(f"{missing} is missing: TLS needs both FOVEA_TLS_CERT and FOVEA_TLS_KEY")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("FOVEA_TLS_CLIENT_CA needs FOVEA_TLS_CERT and FOVEA_TLS_KEY")
        if self.body_bytes > self.bodies_bytes:
            raise ValueError(
                f"FOVEA_BODY_BYTES is more than FOVEA_BODIES_BYTES allows: {self.body_bytes} > "
                f"{self.bodies_bytes}"
            )
        return self


def load_service_settings(**overrides: Any) -> Settings:
    """Read the settings of the service, as `load_settings` does, with the variables of cloud platforms.

    A variable of a platform counts if a setting is set neither by `overrides` nor by its own name.
    Raises `SettingsError`.
    """
    prefix = len(ENVIRONMENT_PREFIX)
    platform = {name[prefix:].lower(): value for name, value in read_platform_settings().items()}
    return load_settings(**{**platform, **overrides})


def load_settings(**overrides: Any) -> Settings:
    """Read the settings from the environment; `overrides` are fields that take precedence.

    Raises `SettingsError`, a single line, for an unknown name or a bad value.
    """
    known_names = {ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields}
    for name, value in sorted(os.environ.items()):
        if (
            name.upper().startswith(ENVIRONMENT_PREFIX)
            and name.upper() not in known_names
            and not is_kubernetes_variable(name, value)
        ):
            if new_name := _RENAMED.get(name.upper()):
                raise SettingsError(f"the setting {name} was renamed; use {new_name}")
            raise SettingsError(
                f"unknown setting {name}; did you mean {_suggest_name(name.upper(), known_names)}?"
            )
    try:
        return Settings(**overrides)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # the error concerns several fields
            raise SettingsError(first["msg"].removeprefix("Value error, ")) from None
        field = str(first["loc"][0])
        if first["type"] == "value_error":
            reason = first["msg"].removeprefix("Value error, ")
        else:
            reason = f"it must be {describe_values(Settings.model_fields[field])}"
            reason += _RANGE_HINTS.get(first["type"].removesuffix("_equal"), "")
        name = name_variable(ENVIRONMENT_PREFIX + field.upper(), first["input"])
        raise SettingsError(f"{name} is {str(first['input'])!r}: {reason}") from None


_RENAMED: Final = {"FOVEA_DIALECTS": "FOVEA_PROTOCOLS"}
"""New names of settings by their old names."""

_RANGE_HINTS: Final = {"greater_than": "; give a greater value", "less_than": "; give a smaller value"}


def _suggest_name(name: str, known_names: Collection[str]) -> str:
    """Return the setting whose words end the name, or the setting with the most similar spelling."""
    ends = [one for one in known_names if name.endswith("_" + one.removeprefix(ENVIRONMENT_PREFIX))]
    return max(ends, key=len) if ends else difflib.get_close_matches(name, known_names, n=1, cutoff=0.0)[0]
