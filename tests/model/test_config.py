import json
from dataclasses import replace

import pytest

from model.config import ClsConfig, SafetyConfig
from model.errors import CheckpointError
from model.policy import Mode, Policy
from model.schedule import Annealed, Every
from model.testing import byte_tokenizer, tiny_config, tiny_lm


@pytest.fixture(scope="module")
def config() -> SafetyConfig:
    return tiny_config(tiny_lm(), byte_tokenizer(), calibration={"num_rows": 12, "sources": ["own"]})


def changed(config: SafetyConfig, path: str, value) -> str:
    """Return the configuration as JSON with the key at the dotted `path` set to `value`, or dropped if None."""
    raw = json.loads(config.to_json())
    *parents, key = path.split(".")
    place = raw
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[key]
    else:
        place[key] = value
    return json.dumps(raw)


def test_what_is_written_is_read_back(config):
    assert SafetyConfig.from_json(config.to_json()) == config


def test_every_field_survives_the_round_trip(config):
    other = replace(config, patience=5, lookback=2, smoothing=0.3, licence="CC-BY-4.0", onset=0.25)
    assert SafetyConfig.from_json(other.to_json()) == other


@pytest.mark.parametrize("changes", [{}, {"token_head": None}])
def test_a_cls_signal_travels_beside_a_token_head_or_alone(config, changes):
    other = replace(config, cls=ClsConfig((5, 15, 10), moves=False, schedule="periodic-4"), **changes)
    assert SafetyConfig.from_json(other.to_json()) == other


def test_without_any_signal_a_configuration_is_refused(config):
    with pytest.raises(CheckpointError, match="token_head and cls are both missing"):
        SafetyConfig.from_json(changed(config, "token_head", None))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("windows", [10, 10], r"cls.windows must be r1, r2 and r3, got \[10, 10\]"),
        ("windows", [10, 0, 10], "r1, r2 and r3 must be at least 1, got 10, 0 and 10"),
        ("schedule", "often", "unknown schedule 'often'; there are every, first, annealed and periodic-N"),
        ("request_share", 1.5, r"cls.request_share must be in \[0, 1\], got 1.5"),
        ("response_share", -0.1, r"cls.response_share must be in \[0, 1\], got -0.1"),
        ("moves", 1, "moves must be of type bool, got 1"),
        ("window", 1, "unknown keys"),
    ],
)
def test_a_wrong_value_of_the_cls_signal_is_named(config, key: str, value, named: str):
    with pytest.raises(CheckpointError, match=named):
        SafetyConfig.from_json(changed(replace(config, cls=ClsConfig()), f"cls.{key}", value))


def test_a_schedule_is_the_checkpoints_own_unless_one_is_asked_for(config):
    beside, alone = replace(config, cls=ClsConfig()), replace(config, cls=ClsConfig(), token_head=None)
    assert config.schedule() == Every()
    assert beside.schedule() == Annealed()
    assert alone.schedule().interval(1000) == 8
    assert alone.schedule("annealed") == Annealed()


def test_the_same_configuration_is_the_same_text(config):
    assert SafetyConfig.from_json(config.to_json()).to_json() == config.to_json()


@pytest.mark.parametrize("key", ["patience", "lookback", "refusal", "licence", "calibration", "refusal.prefix"])
def test_a_key_with_a_default_may_be_missing(config, key: str):
    SafetyConfig.from_json(changed(config, key, None))


@pytest.mark.parametrize("key", ["base", "token_head", "request", "response", "onset", "smoothing", "request.block"])
def test_a_missing_key_is_named(config, key: str):
    with pytest.raises(CheckpointError, match=key.split(".")[0]):
        SafetyConfig.from_json(changed(config, key, None))


@pytest.mark.parametrize(
    ("key", "known"),
    [("patients", "patience"), ("response.blok", "block"), ("refusal.prefx", "prefix"), ("token_head.layer", "layers")],
)
def test_an_unknown_key_is_named_beside_the_known_ones(config, key: str, known: str):
    with pytest.raises(CheckpointError, match="unknown keys") as raised:
        SafetyConfig.from_json(changed(config, key, 1))
    assert repr(key.split(".")[-1]) in str(raised.value)
    assert repr(known) in str(raised.value)


@pytest.mark.parametrize("version", [1, 3, "2", 0])
def test_another_version_is_named_with_the_one_that_is_read(config, version):
    with pytest.raises(CheckpointError, match=f"has version {version!r}; this release reads version 2"):
        SafetyConfig.from_json(changed(config, "version", version))


def test_a_missing_version_is_refused(config):
    with pytest.raises(CheckpointError, match="version None"):
        SafetyConfig.from_json(changed(config, "version", None))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"text"'])
def test_what_is_not_a_json_object_is_refused(text: str):
    with pytest.raises(CheckpointError, match=r"safety_config\.json"):
        SafetyConfig.from_json(text)


@pytest.mark.parametrize("key", ["request.block", "request.flag", "response.block", "response.flag", "onset"])
@pytest.mark.parametrize("value", [0.0, 1.0, 1.5, -0.1, float("nan")])
def test_a_threshold_must_lie_between_0_and_1(config, key: str, value: float):
    with pytest.raises(CheckpointError, match=rf"{key} must be in \(0, 1\), got {value}"):
        SafetyConfig.from_json(changed(config, key, value))


@pytest.mark.parametrize("value", [0.0, 1.5, float("nan")])
def test_smoothing_must_be_over_0_and_at_most_1(config, value: float):
    with pytest.raises(CheckpointError, match=rf"smoothing must be in \(0, 1\], got {value}"):
        SafetyConfig.from_json(changed(config, "smoothing", value))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("onset", 0.95, "onset 0.95 must not exceed the block threshold 0.9"),
        ("patience", 0, "got 0 and 8"),
        ("lookback", -1, "got 3 and -1"),
        ("token_head.layers", [], "at least one layer"),
    ],
)
def test_values_that_make_no_policy_are_refused(config, key: str, value, named: str):
    with pytest.raises(CheckpointError, match=named):
        SafetyConfig.from_json(changed(config, key, value))


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("patience", 2.5, "patience must be of type int, got 2.5"),
        ("patience", True, "patience must be of type int, got True"),
        ("onset", "0.5", "onset must be of type float, got '0.5'"),
        ("request.block", [0.9], r"block must be of type float, got \[0.9\]"),
        ("token_head.layers", ["last"], r"layers must be a list of int, got \['last'\]"),
        ("token_head.layers", -1, "layers must be a list of int, got -1"),
        ("token_head.width", "32", "width must be of type int, got '32'"),
        ("refusal.prefix", 5, "prefix must be of type str, got 5"),
        ("base.weights", 5, "weights must be of type str, got 5"),
        ("calibration", [], r"calibration must be of type dict, got \[\]"),
        ("request", 0.9, "request: expected an object, got 0.9"),
    ],
)
def test_a_mistyped_value_is_named_with_the_type_allowed(config, key: str, value, allowed: str):
    with pytest.raises(CheckpointError, match=allowed):
        SafetyConfig.from_json(changed(config, key, value))


def test_a_whole_number_is_a_smoothing_too(config):
    assert SafetyConfig.from_json(changed(config, "smoothing", 1)).smoothing == 1.0


def test_the_policy_acts_on_the_block_thresholds(config):
    policy = replace(config, patience=4, lookback=6).policy(Mode.SCORE, Mode.BLOCK)
    assert policy == Policy(
        Mode.SCORE, Mode.BLOCK, request_block=0.9, response_block=0.9, onset=0.5, patience=4, lookback=6
    )


@pytest.mark.parametrize(("key", "value"), [("refusal.prefix", ""), ("refusal.max_tokens", -1)])
def test_a_refusal_that_cannot_be_written_is_refused(config, key: str, value):
    with pytest.raises(CheckpointError, match=key):
        SafetyConfig.from_json(changed(config, key, value))
