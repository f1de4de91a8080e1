import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from model.detokenizer import REPLACEMENT, Detokenizer
from model.testing import byte_tokenizer

texts = st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT), max_size=30)
TOKENIZER = byte_tokenizer()


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@given(text=texts)
def test_the_pieces_joined_are_the_decoded_text(text: str):
    detokenizer = Detokenizer(TOKENIZER)
    assert "".join(map(detokenizer.push, ids_of(text))) + detokenizer.flush() == text


@given(text=texts)
def test_no_piece_holds_part_of_a_character(text: str):
    detokenizer = Detokenizer(TOKENIZER)
    assert not any(REPLACEMENT in detokenizer.push(token) for token in ids_of(text))


@given(context=texts, text=texts)
def test_the_context_is_never_returned(context: str, text: str):
    detokenizer = Detokenizer(TOKENIZER, ids_of(context))
    assert "".join(map(detokenizer.push, ids_of(text))) + detokenizer.flush() == text


def test_a_character_of_four_bytes_comes_with_its_last_byte():
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.push(token) for token in ids_of("🙂")] == ["", "", "", "🙂"]


def test_flush_returns_what_an_incomplete_character_decodes_to():
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.push(token) for token in ids_of("aé")[:-1]]
    assert pieces == ["a", ""]
    assert detokenizer.flush() == REPLACEMENT


def test_flush_after_a_complete_character_is_empty():
    detokenizer = Detokenizer(TOKENIZER)
    detokenizer.push(*ids_of("a"))
    assert detokenizer.flush() == ""


def test_special_tokens_become_no_text():
    detokenizer = Detokenizer(TOKENIZER)
    tokens = [*ids_of("a"), TOKENIZER.eos_token_id, *ids_of("b")]
    assert [detokenizer.push(token) for token in tokens] == ["a", "", "b"]


def test_a_replacement_character_of_the_model_itself_comes_with_the_next_token():
    detokenizer = Detokenizer(TOKENIZER)
    assert "".join(map(detokenizer.push, ids_of(f"a{REPLACEMENT}b"))) == f"a{REPLACEMENT}b"


@pytest.mark.parametrize("length", [1, 2, 3])
def test_bytes_that_never_become_a_character_do_not_stall_what_follows(length: int):
    # The first bytes of a four-byte character, then a letter.
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.push(token) for token in [*ids_of("🙂")[:length], *ids_of("ok")]]
    assert "".join(pieces).endswith("ok")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer as Llama 2, Mistral and Gemma have it: words with a space mark, bytes for the rest."""
    pieces = ["<unk>", "▁", "a", "▁a", "b", "▁b", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("▁", "a"), ("▁", "b")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@given(text=st.text(st.sampled_from("ab é🙂漢"), max_size=20))
def test_words_with_space_marks_and_characters_of_several_byte_tokens_come_out_whole(text: str):
    tokenizer = sentencepiece_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == text
