"""Incremental detokenisation never shows half a character and adds up to the whole decoding."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.models.packaged import digits_path
from workers.models.transformers_adapter import TransformersPromptTokenizer

TOKENIZER = TransformersPromptTokenizer.load(digits_path())


def ids_of(text: str) -> list[int]:
    """The tokens of a text, without the frame of the chat (3 before, 2 after: <s>, role; end, role)."""
    ids = TOKENIZER.tokenize([{"role": "user", "content": text}], []).input_ids
    return ids[2:-2]


@given(st.text(max_size=60), st.integers(1, 4))
def test_pieces_are_whole_characters_and_join_to_the_text(text: str, num_at_once: int) -> None:
    stream = TOKENIZER.text_stream()
    ids = ids_of(text)
    pieces = [stream.push(ids[start : start + num_at_once]) for start in range(0, len(ids), num_at_once)]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([*pieces, stream.finish()]) == text


@given(st.lists(st.integers(0, 511), max_size=60))
def test_pieces_of_arbitrary_tokens_join_to_the_decoding_of_all(ids: list[int]) -> None:
    stream = TOKENIZER.text_stream()
    pieces = [stream.push([token_id]) for token_id in ids]
    assert "".join([*pieces, stream.finish()]) == TOKENIZER.decode(ids)


def test_a_character_of_several_tokens_comes_with_its_last_one() -> None:
    ids = ids_of("🙂")
    assert len(ids) == 4
    stream = TOKENIZER.text_stream()
    assert [stream.push([token_id]) for token_id in ids] == ["", "", "", "🙂"]
    assert stream.finish() == ""


def test_text_comes_as_soon_as_it_is_whole() -> None:
    stream = TOKENIZER.text_stream()
    pieces = [stream.push([token_id]) for token_id in ids_of("This is the digit 7.")]
    assert pieces == ["This", " is", " the", " digit", " 7", "."]


def test_a_character_that_never_ends_shows_at_the_finish() -> None:
    stream = TOKENIZER.text_stream()
    assert stream.push(ids_of("a🙂")[:3]) == ""
    assert stream.finish() == "a\ufffd"


def test_special_tokens_have_no_text() -> None:
    stream = TOKENIZER.text_stream()
    assert stream.push([*ids_of("Hello"), 2]) == "Hello"
    assert stream.finish() == ""
