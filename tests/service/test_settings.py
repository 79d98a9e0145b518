"""Settings from the environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from fovea.service import packaged_models
from fovea.service.errors import SettingsError
from fovea.service.settings import Settings, load_service_settings, load_settings
from tests.commands import Command
from tests.servers import DEFAULT_MODEL

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("FOVEA_", "AIP_")) or name == "PORT":
            monkeypatch.delenv(name)
    (tmp_path / "zoo").mkdir()
    monkeypatch.chdir(tmp_path)


def load_from_variables(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def load_service_from_variables(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return load_service_settings()


def test_defaults_need_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_from_variables(monkeypatch)
    assert (settings.host, settings.port, settings.models) == ("127.0.0.1", 8000, Path("zoo"))


def test_overrides_take_precedence_over_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variables = {"FOVEA_PORT": "8001", "FOVEA_HOST": "0.0.0.0", "FOVEA_BODY_TIMEOUT": "2.5"}  # noqa: S104
    settings = load_from_variables(monkeypatch, **variables)
    assert (settings.port, settings.host, settings.body_timeout) == (8001, "0.0.0.0", 2.5)  # noqa: S104
    assert load_settings(port=9000).port == 9000


def test_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_from_variables(monkeypatch, FOVEA_DEFAULT_MODEL="", FOVEA_PORT="")
    assert (settings.default_model, settings.port) == (None, 8000)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("FOVEA_PROT", "FOVEA_PORT"), ("FOVEA_MODLES", "FOVEA_MODELS"), ("FOVEA_BODY_BYTE", "FOVEA_BODY_BYTES")],
)  # fmt: skip
def test_unknown_setting_error_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, name: str, nearest: str
) -> None:
    with pytest.raises(SettingsError, match=rf"unknown setting {name}; did you mean FOVEA_") as error_info:
        load_from_variables(monkeypatch, **{name: "1"})
    assert str(error_info.value).endswith(f"{nearest}?")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("FOVEA_PORT", "65536", "65535"),
        ("FOVEA_PORT", "http", "integer"),
        ("FOVEA_PROVIDER", "gpu", "'cpu'"),
        ("FOVEA_BODY_BYTES", "12", "1024"),
        ("FOVEA_QUEUE_IMAGES", "0", "greater"),
        ("FOVEA_BODY_TIMEOUT", "nan", "3600"),
        ("FOVEA_MODELS", "nowhere", "No such file"),
        ("FOVEA_MODELS", "file/below", "Not a directory|No such file"),
        ("FOVEA_IMAGE_PIXELS", "178956971", "178956970"),
    ],
)
def test_bad_value_error_has_name_value_and_reason(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    with pytest.raises(SettingsError, match=rf"^{name} is .*{value}.*: .*({reason})") as error_info:
        load_from_variables(monkeypatch, **{name: value})
    assert "\n" not in str(error_info.value)


def test_variable_names_are_case_insensitive(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_from_variables(monkeypatch, fovea_port="8002").port == 8002
    with pytest.raises(SettingsError, match="unknown setting fovea_prot; did you mean FOVEA_PORT"):
        load_from_variables(monkeypatch, fovea_prot="1")


def test_request_limit_above_queue_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="FOVEA_REQUEST_IMAGES is more than FOVEA_QUEUE_IMAGES"):
        load_from_variables(monkeypatch, FOVEA_QUEUE_IMAGES="10")


def test_pixel_limit_accepts_twice_the_limit_of_pillow() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    Settings(models=Path("zoo"), image_pixels=2 * Image.MAX_IMAGE_PIXELS)


def test_missing_default_repository_error_names_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "zoo").rmdir()
    monkeypatch.setattr(packaged_models, "PACKAGED_MODELS", tmp_path / "none")
    with pytest.raises(SettingsError, match="FOVEA_MODELS"):
        load_from_variables(monkeypatch)


def test_packaged_models_are_the_last_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder `zoo` takes precedence, then the variable, then the argument."""
    packaged, other = packaged_models.PACKAGED_MODELS, tmp_path / "other"
    assert load_from_variables(monkeypatch).models == Path("zoo")
    (tmp_path / "zoo").rename(other)
    assert load_from_variables(monkeypatch).models == packaged
    assert load_from_variables(monkeypatch, FOVEA_MODELS=str(other)).models == other
    with pytest.raises(SettingsError, match="FOVEA_MODELS is 'zoo'"):
        load_from_variables(monkeypatch, FOVEA_MODELS="zoo")


@pytest.mark.parametrize("words", [["publish", str(DEFAULT_MODEL)], ["remove", "cifar10/4", "--yes"]])
def test_commands_leave_packaged_models_alone(
    command: Command, capfd: pytest.CaptureFixture[str], tmp_path: Path, words: list[str]
) -> None:
    (tmp_path / "zoo").rmdir()
    assert command(*words) == 2
    assert "the models of the installation are not changed" in capfd.readouterr().err
    assert DEFAULT_MODEL.exists()


@pytest.mark.parametrize("service", ["FOVEA", "FOVEA_CANARY", "FOVEA_GRPC", "FOVEA_HTTP_PORT", "FOVEA_V2"])
@pytest.mark.parametrize("address", ["10.0.0.1", "fd00::1"])
def test_kubernetes_service_variables_are_ignored(
    monkeypatch: pytest.MonkeyPatch, service: str, address: str
) -> None:
    """The names are those of the Kubernetes documentation, "Discovering services", with a named port."""
    url = f"tcp://{address}:8000" if "." in address else f"tcp://[{address}]:8000"
    settings = load_from_variables(
        monkeypatch,
        **{
            f"{service}_SERVICE_HOST": address,
            f"{service}_SERVICE_PORT": "8000",
            f"{service}_SERVICE_PORT_HTTP": "8000",
            f"{service}_PORT": url,
            f"{service}_PORT_8000_TCP": url,
            f"{service}_PORT_8000_TCP_PROTO": "tcp",
            f"{service}_PORT_8000_TCP_PORT": "8000",
            f"{service}_PORT_8000_TCP_ADDR": address,
            f"{service}_PORT_53_UDP": f"udp://{address}:53",
        },
    )
    assert settings.port == 8000


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("FOVEA_HTTP_PORT", "9000", "FOVEA_PORT"),
        ("FOVEA_PORT_8000", "9000", "FOVEA_PORT"),
        ("FOVEA_SERVICE_HOST", "localhost", "FOVEA_HOST"),
        ("FOVEA_SERVICE_PORT", "tcp", "FOVEA_PORT"),
        ("FOVEA_PROT", "tcp://10.0.0.1:8000", "FOVEA_PORT"),
    ],
)
def test_variable_similar_to_kubernetes_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, nearest: str
) -> None:
    with pytest.raises(SettingsError, match=rf"unknown setting {name}; did you mean {nearest}\?"):
        load_from_variables(monkeypatch, **{name: value})


def test_port_variable_is_used_without_fovea_port(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_service_from_variables(monkeypatch, PORT="8080").port == 8080
    assert load_service_from_variables(monkeypatch, FOVEA_PORT="").port == 8080
    assert load_service_from_variables(monkeypatch, FOVEA_PORT="tcp://10.0.0.1:8000").port == 8080
    assert load_service_from_variables(monkeypatch, FOVEA_PORT="9000").port == 9000
    assert load_service_settings(port=9001).port == 9001


def test_bad_port_error_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"^PORT is 'high': "):
        load_service_from_variables(monkeypatch, PORT="high")
    with pytest.raises(SettingsError, match=r"^FOVEA_PORT is 'low': "):
        load_service_from_variables(monkeypatch, FOVEA_PORT="low")
    monkeypatch.delenv("FOVEA_PORT")
    with pytest.raises(SettingsError, match=r"^FOVEA_PORT is '70000': "):
        load_service_settings(port=70000)


def test_settings_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_from_variables(monkeypatch).port = 1  # type: ignore[misc]


def test_every_setting_has_a_description() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description and field.description.endswith("."), name


@pytest.mark.parametrize(
    ("variables", "port"),
    [
        ({"PORT": "1"}, 1),
        ({"PORT": "1", "AIP_HTTP_PORT": "2"}, 2),
        ({"PORT": "1", "AIP_HTTP_PORT": "2", "FOVEA_PORT": "3"}, 3),
        ({"PORT": "1", "AIP_HTTP_PORT": "2", "FOVEA_PORT": "tcp://10.0.0.1:8000"}, 2),
        ({"PORT": "1", "AIP_HTTP_PORT": ""}, 1),
    ],
)
def test_port_of_the_platform(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], port: int) -> None:
    assert load_service_from_variables(monkeypatch, **variables).port == port
    assert load_service_settings(port=9000).port == 9000


def test_routes_of_vertex(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "AIP_HEALTH_ROUTE": "/healthy",
        "AIP_PREDICT_ROUTE": "/v1/endpoints/1/deployedModels/2:predict",
    }
    settings = load_service_from_variables(monkeypatch, **variables)
    assert (settings.health_route, settings.predict_route) == tuple(variables.values())
    assert load_service_from_variables(monkeypatch, FOVEA_HEALTH_ROUTE="/own").health_route == "/own"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AIP_STORAGE_URI", "gs://"),
        ("AIP_STORAGE_URI", "https://bucket/zoo"),
        ("AIP_PREDICT_ROUTE", "predict"),
        ("AIP_HEALTH_ROUTE", "/models/{name}"),
        ("FOVEA_HEALTH_ROUTE", "https://host/health"),
        ("AIP_HTTP_PORT", "http"),
        ("PORT", "80 80"),
    ],
)
def test_bad_value_of_a_platform_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    with pytest.raises(SettingsError, match=f"^{name}( is |: )"):
        load_service_from_variables(monkeypatch, **{name: value})


def test_sagemaker_is_known_by_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "opt" / "ml" / "model"
    monkeypatch.setattr("fovea.service.environment.SAGEMAKER_FOLDER", folder)
    assert load_service_settings().port == 8000
    folder.mkdir(parents=True)
    settings = load_service_settings()
    assert (settings.port, settings.models) == (8080, Path("zoo"))  # the image has its model
    (folder / "pets").mkdir()
    assert load_service_settings().models == folder
    settings = load_service_from_variables(monkeypatch, FOVEA_PORT="9000", FOVEA_MODELS=str(tmp_path))
    assert (settings.port, settings.models) == (9000, tmp_path)


def test_models_of_vertex(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_service_from_variables(monkeypatch, AIP_STORAGE_URI="gs://caip-tenant-1/artifacts/model/")
    assert settings.store_uri == "gs://caip-tenant-1/artifacts/model"
    assert load_service_settings(models="zoo").store_uri is None
    assert load_service_from_variables(monkeypatch, FOVEA_MODELS="zoo").store_uri is None
    monkeypatch.delenv("FOVEA_MODELS")
    settings = load_service_from_variables(monkeypatch, AIP_STORAGE_URI="")  # no artifacts were uploaded
    assert (settings.store_uri, settings.models) == (None, Path("zoo"))


def test_platforms_change_the_service_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A training job of SageMaker has its folder too, and a bad PORT is no concern of `fovea classify`."""
    folder = tmp_path / "model"
    (folder / "pets").mkdir(parents=True)
    monkeypatch.setattr("fovea.service.environment.SAGEMAKER_FOLDER", folder)
    variables = {"PORT": "high", "AIP_HEALTH_ROUTE": "healthy", "AIP_STORAGE_URI": "gs://bucket/zoo"}
    settings = load_from_variables(monkeypatch, **variables)
    assert (settings.port, settings.models, settings.health_route) == (8000, Path("zoo"), None)
    assert settings.store_uri is None
    for name in variables:
        monkeypatch.delenv(name)
    assert load_service_settings().models == folder
