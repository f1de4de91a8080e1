import pytest

from model.pretrained import DEFAULT_MODEL
from server import __main__ as command
from server import flags, settings
from server.settings import ConfigurationError, Settings, load


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "ballast.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def loaded(*arguments):
    return settings.load(*flags.parse(arguments))


def test_the_defaults_serve_the_default_model_on_loopback_with_both_sides_blocking():
    chosen = loaded()
    assert (chosen.model, chosen.name, chosen.host, chosen.port) == (DEFAULT_MODEL, DEFAULT_MODEL, "127.0.0.1", 8000)
    assert (chosen.input_mode.value, chosen.output_mode.value) == ("block", "block")


def test_flags_win_over_variables_and_variables_over_the_file(write, monkeypatch):
    file = write("port: 1\nmax_running: 1\nmax_n: 1\n")
    monkeypatch.setenv("BALLAST_PORT", "2")
    monkeypatch.setenv("BALLAST_MAX_RUNNING", "2")
    chosen = loaded("--config", file, "--port", "3")
    assert (chosen.port, chosen.max_running, chosen.max_n) == (3, 2, 1)


def test_the_file_can_be_named_by_a_variable(write, monkeypatch):
    monkeypatch.setenv("BALLAST_CONFIG", write("port: 1234"))
    assert loaded().port == 1234


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--prot", "1"], "--port"),
        (["--prot=1"], "--port"),
        (["--input_mode", "off"], "--input-mode"),
    ],
)
def test_an_unknown_flag_is_an_error_that_names_the_nearest_one(arguments, hint):
    with pytest.raises(ConfigurationError, match=f"unknown argument {arguments[0].split('=')[0]}.*{hint}"):
        loaded(*arguments)


@pytest.mark.parametrize("arguments", [["--api-keys", "x"], ["--api-keys=x"], ["--api_keys", "x"]])
def test_keys_as_a_flag_are_an_error_that_says_where_they_go(arguments):
    with pytest.raises(ConfigurationError, match=r"settings file \(--config\), or BALLAST_API_KEYS='\[\{"):
        loaded(*arguments)


def test_keys_can_be_a_variable_as_the_errors_spell_it(monkeypatch):
    monkeypatch.setenv("BALLAST_API_KEYS", settings.KEYS_VARIABLE.partition("=")[2].strip("'"))
    assert [key.name for key in loaded().api_keys] == ["app"]


def test_keys_that_are_no_json_are_an_error_that_shows_how_they_are_written(monkeypatch):
    monkeypatch.setenv("BALLAST_API_KEYS", "very-secret")
    with pytest.raises(ConfigurationError, match="not valid JSON; write BALLAST_API_KEYS='") as raised:
        loaded()
    assert "very-secret" not in str(raised.value)


def test_an_unknown_variable_is_an_error_that_names_the_nearest_one(monkeypatch):
    monkeypatch.setenv("BALLAST_PROT", "1")
    with pytest.raises(ConfigurationError, match="unknown variable BALLAST_PROT; did you mean BALLAST_PORT"):
        loaded()


def test_the_variable_for_the_cache_is_known(monkeypatch):
    monkeypatch.setenv("BALLAST_CACHE", "/tmp")
    assert loaded().port == 8000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown setting 'prot'.*did you mean port"),
        ("port: [", "not valid YAML"),
        ("- port", "must hold settings"),
        ("port: many", "^port: must be an integer$"),
        ("port: 70000", "^port: must be at most 65535$"),
        ("metrics_open: perhaps", "^metrics_open: must be true or false$"),
        ("input_mode: on", "^input_mode: must be 'off', 'score' or 'block'$"),
        ("api_keys: app", "^api_keys: must be a list$"),
        ("api_keys: [app]", r"^api_keys\.0: must be an object$"),
        ("api_keys: [{name: a}]", r"^api_keys\.0\.key: is required$"),
        ("api_keys: [{name: a, key: ''}]", r"^api_keys\.0\.key: must have at least 1 character, got 0$"),
        ("api_keys: [{name: a, kee: b}]", r"^api_keys\.0\.kee: unknown; did you mean key\?$"),
        (
            "api_keys: [{name: a, key: b, may_losen: true}]",
            r"^api_keys\.0\.may_losen: unknown; did you mean may_loosen\?$",
        ),
        ("api_keys: [{name: a, key: b}, {name: a, key: c}]", "names must differ"),
        ("api_keys: [{name: a, key: b}, {name: c, key: b}]", "keys must differ"),
        ("checkpoint: none", "input_mode and output_mode must both be off"),
    ],
)
def test_a_wrong_file_is_an_error_in_one_line(write, text, message):
    with pytest.raises(ConfigurationError, match=message) as raised:
        loaded("--config", write(text))
    assert "\n" not in str(raised.value)


def test_a_file_that_does_not_exist_is_an_error():
    with pytest.raises(ConfigurationError, match="cannot read the settings file"):
        loaded("--config", "/nothing.yaml")


def test_a_wrong_key_is_not_repeated_in_the_error(monkeypatch):
    monkeypatch.setenv("BALLAST_API_KEYS", '[{"name": "a", "key": "very-secret", "may_loosen": "perhaps"}]')
    with pytest.raises(ConfigurationError, match=r"api_keys\.0\.may_loosen") as raised:
        loaded()
    assert "very-secret" not in str(raised.value)


def test_keys_can_be_variables_one_by_one(monkeypatch):
    monkeypatch.setenv("BALLAST_API_KEYS__0__NAME", "app")
    monkeypatch.setenv("BALLAST_API_KEYS__0__KEY", "secret")
    (key,) = loaded().api_keys
    assert (key.name, key.key.get_secret_value()) == ("app", "secret")


def test_a_variable_without_the_prefix_is_not_ours(write, monkeypatch):
    monkeypatch.setenv("PORT", "9")
    assert loaded("--config", write("port: 7")).port == 7


def test_an_empty_variable_counts_as_not_set(write, monkeypatch):
    monkeypatch.setenv("BALLAST_PORT", "")
    assert loaded("--config", write("port: 7")).port == 7


def test_lists_are_separated_by_commas(monkeypatch):
    monkeypatch.setenv("BALLAST_CORS_ORIGINS", "https://a.example, https://b.example")
    chosen = loaded("--moderation-aliases", "guard,omni-moderation-latest")
    assert chosen.cors_origins == ("https://a.example", "https://b.example")
    assert chosen.moderation_aliases == ("guard", "omni-moderation-latest")


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        loaded().port = 1


@pytest.mark.parametrize(
    ("changes", "most"),
    [({}, 16), ({"max_running": 8, "max_waiting": 0}, 8), ({"max_running": 1, "max_waiting": 3}, 4), ({"max_n": 5}, 5)],
)
def test_no_more_choices_are_asked_for_than_may_run_and_wait(changes, most):
    assert Settings(**changes).most_choices == most


@pytest.mark.parametrize("service", ["", "CANARY_"])
def test_what_kubernetes_says_of_a_service_called_like_us_is_no_setting(monkeypatch, service: str):
    links = {"SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": "80", "SERVICE_PORT_HTTP": "80", "PORT": "tcp://10.0.0.1:80"}
    links |= {"PORT_80_TCP": "tcp://10.0.0.1:80", "PORT_80_TCP_ADDR": "10.0.0.1"}
    for name, value in links.items():
        monkeypatch.setenv(f"BALLAST_{service}{name}", value)
    assert load({}).port == 8000
    monkeypatch.setenv("BALLAST_PORT", "8001")
    assert load({}).port == 8001
    monkeypatch.setenv("BALLAST_SERVICE_PROT", "80")
    with pytest.raises(ConfigurationError, match="unknown variable BALLAST_SERVICE_PROT"):
        load({})


def test_wrong_settings_end_the_command_with_one_line_and_code_2(capsys):
    assert command.main(["--prot", "9"]) == 2
    output = capsys.readouterr()
    assert output.err == "ballast-serve: unknown argument --prot; did you mean --port?\n"
    assert output.out == ""


def test_help_shows_every_flag_with_a_line_and_a_default(capsys):
    with pytest.raises(SystemExit) as raised:
        command.main(["--help"])
    text = capsys.readouterr().out
    assert raised.value.code == 0
    for name in set(Settings.model_fields) - {"api_keys"}:
        assert f"--{name.replace('_', '-')}" in text
    assert text.count("(default: ") == len(Settings.model_fields) - 1
    assert "examples:" in text


def test_version_shows_the_release(capsys):
    with pytest.raises(SystemExit):
        command.main(["--version"])
    assert capsys.readouterr().out.startswith("ballast 0.")
