"""The argument of keys and values, by its old and its new name."""

from typing import Any

from peft import LoraConfig, get_peft_model

from model.cache_keyword import with_cache
from model.testing import tiny_lm


class Old:
    def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...


class New:
    def forward(self, input_ids: Any, cache: Any = None) -> None: ...


def test_each_release_of_transformers_is_told_by_its_own_name() -> None:
    assert with_cache(Old(), "kept") == {"past_key_values": "kept", "use_cache": True}
    assert with_cache(New(), "kept") == {"cache": "kept", "use_cache": True}


def test_an_adapter_is_looked_through() -> None:
    plain = with_cache(tiny_lm(), "kept")
    assert with_cache(get_peft_model(tiny_lm(), LoraConfig(r=2, target_modules="all-linear")), "kept") == plain
