"""Saved slots as llama-server writes them, and files that only look like some."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsup.services.llama_slots import (
    HEAD_BYTES,
    WORDS_MAX,
    action_path,
    parse_cached,
    parse_held,
    parse_restored,
    parse_saved,
    parse_tokens,
    trial_body,
    words_bytes,
)

TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50)


def packed(tokens: list[int], *, count: int | None = None, images: int = 0) -> bytes:
    """The words of a build that knows of images."""
    size = len(tokens) if count is None else count
    return struct.pack(f"<iII{len(tokens)}iI", -1, 1, size, *tokens, images)


def head(words: int, magic: bytes = b"qsgg", version: int = 4) -> bytes:
    return struct.pack("<4sII", magic, version, words)


def read(data: bytes) -> tuple[int, ...]:
    """As a file is read."""
    size = words_bytes(data[:HEAD_BYTES], len(data))
    return parse_tokens(data[HEAD_BYTES : HEAD_BYTES + size])


@given(TOKENS, st.binary(max_size=40))
def test_the_tokens_are_those_that_were_written(tokens: list[int], state: bytes) -> None:
    plain = struct.pack(f"<{len(tokens)}i", *tokens)
    assert read(head(len(tokens)) + plain + state) == tuple(tokens)
    assert read(head(len(tokens) + 4) + packed(tokens) + state) == tuple(tokens)


@given(TOKENS, st.data())
def test_a_file_that_is_cut_off_within_its_tokens_is_none(
    tokens: list[int], data: st.DataObject
) -> None:
    whole = head(len(tokens) + 4) + packed(tokens)
    end = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ValueError, match=r"no saved slot|cannot have"):
        read(whole[:end])


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**40))
def test_no_more_is_read_than_there_can_be(words: int, file_bytes: int) -> None:
    try:
        size = words_bytes(head(words), file_bytes)
    except ValueError:
        assert words > WORDS_MAX or HEAD_BYTES + 4 * words > file_bytes
    else:
        assert size == 4 * words <= min(4 * WORDS_MAX, file_bytes - HEAD_BYTES)


@given(TOKENS, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_a_number_of_tokens_or_images_that_lies_is_refused(
    tokens: list[int], count: int, images: int
) -> None:
    if (count, images) == (len(tokens), 0):
        return
    with pytest.raises(ValueError, match="images"):
        parse_tokens(packed(tokens, count=count, images=images))


@given(st.binary(max_size=200))
def test_any_words_are_tokens_or_are_refused(data: bytes) -> None:
    try:
        tokens = parse_tokens(data)
    except ValueError:
        return
    assert 0 < len(tokens) <= len(data) // 4
    assert min(tokens) >= 0


@pytest.mark.parametrize("data", [b"", b"GGUF" + b"\x00" * 20, head(4)[:11], head(1, b"ggla")])
def test_another_file_is_no_saved_slot(data: bytes) -> None:
    with pytest.raises(ValueError, match="no saved slot"):
        read(data)


@pytest.mark.parametrize("words", [[], [-1], [-1, 1, 0, 0], [-1, 2, 1, 7, 0], [7, -1], [7, -2, 8]])
def test_no_tokens_a_new_way_to_write_them_and_images_are_refused(words: list[int]) -> None:
    with pytest.raises(ValueError, match=r"it has|its tokens"):
        parse_tokens(struct.pack(f"<{len(words)}i", *words))


def test_what_is_asked_goes_on_where_the_slot_ends() -> None:
    assert action_path(3, "save") == "/slots/3?action=save"
    assert trial_body(3, (5, 6, 7)) == (
        b'{"prompt":[5,6,7,7],"id_slot":3,"cache_prompt":true,"n_predict":1,'
        b'"response_fields":["timings"]}'
    )


def test_answers_are_read() -> None:
    used = b'{"id":0,"is_processing":false,"n_prompt_tokens":7,"params":{}}'
    slots = b'[%s,{"id":1,"is_processing":true}]' % used
    assert [(e.id, e.is_processing, e.n_prompt_tokens) for e in parse_held(200, slots)] == [
        (0, False, 7),
        (1, True, 0),
    ]
    assert parse_saved(200, b'{"id_slot":0,"n_saved":7,"n_written":99}') == (7, 99)
    assert parse_restored(200, b'{"n_restored":7}') == 7
    assert parse_cached(200, b'{"timings":{"cache_n":7}}') == 7
    assert parse_cached(200, b'{"timings":{}}') == 0, "an older build does not tell"


@pytest.mark.parametrize("parse", [parse_held, parse_saved, parse_restored, parse_cached])
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (501, b'{"error":{}}'),
        (500, b""),
        (404, b"{}"),
        (200, b"no JSON"),
        (200, b"[1]"),
        (200, b""),
    ],
)
def test_what_is_no_such_answer_is_refused(parse: object, status: int, body: bytes) -> None:
    assert callable(parse)
    with pytest.raises(ValueError, match=r".+"):
        parse(status, body)
