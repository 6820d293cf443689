import struct
from collections.abc import Mapping

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmsup.core import gguf_reader
from llmsup.core.ggml import TYPES, size_bytes
from llmsup.core.gguf import Header, Model, Tensor, Unread, Value
from llmsup.core.gguf_header import parse
from llmsup.core.gguf_reader import Reader
from llmsup.errors import Flaw, ModelFileError
from tests.gguf_files import KINDS, SMALL, Entry, Item, entry, gguf, header, string


def read(data: bytes, file_bytes: int | None = None) -> Header:
    found = parse(data, len(data) if file_bytes is None else file_bytes)
    assert found is not None
    return found


def flaw(data: bytes, file_bytes: int | None = None) -> tuple[Flaw, str]:
    with pytest.raises(ModelFileError) as raised:
        parse(data, len(data) if file_bytes is None else file_bytes)
    assert len(raised.value.message.splitlines()) == 1
    return raised.value.flaw, raised.value.detail


def with_metadata(**changed: Item) -> bytes:
    return gguf({**SMALL, **changed})


def raw(kind: int, *packed: bytes) -> Item:
    return "raw", struct.pack("<I", kind) + b"".join(packed)


def with_entries(*entries: bytes, data_bytes: int = 4096) -> bytes:
    """A file with just one key and these lines in its table of tensors."""
    start = struct.pack("<4sIQQ", b"GGUF", 3, len(entries), 1) + string("general.architecture")
    written = start + struct.pack("<I", 8) + string("llama") + b"".join(entries)
    return written + bytes(-len(written) % 32 + data_bytes)


# --- what is read


def test_a_header_is_read_without_its_vocabulary() -> None:
    data = gguf()

    found = read(data)

    assert (found.version, found.alignment, found.file_bytes) == (3, 32, len(data))
    assert found.metadata == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.head_count_kv": (2, 2),
        "general.tags": ("chat", "small"),
        "tokenizer.ggml.tokens": Unread("string", 100),
        "tokenizer.ggml.scores": tuple(-float(number) for number in range(100)),
        "tokenizer.ggml.add_bos_token": True,
        "general.quantization_version": 2,
    }
    assert found.tensors == (
        Tensor("token_embd.weight", (256, 100), 12, 0, 14400),
        Tensor("blk.0.attn_norm.weight", (256,), 0, 14400, 1024),
        Tensor("blk.0.ffn_up.weight", (256, 3), 14, 15424, 630),
        Tensor("output_norm.weight", (256,), 0, 16064, 1024),
    )
    assert [tensor.type_name for tensor in found.tensors] == ["Q4_K", "F32", "Q6_K", "F32"]
    assert found.data_offset + 16064 + 1024 == len(data)
    model = Model((found,))
    assert (model.architecture, model.vocabulary_size) == ("llama", 100)


def test_version_2_is_read_alike() -> None:
    assert read(gguf(version=2)).tensors == read(gguf()).tensors


def test_the_beginning_of_a_file_is_enough_once_the_header_is_in_it() -> None:
    written, data_bytes = header()
    size = len(written) + data_bytes
    whole = read(gguf())

    first = next(end for end in range(len(written) + 1) if parse(written[:end], size) is not None)
    assert first > len(written) - 32, "up to the padding before the tensors"
    assert read(written, size) == whole


def test_long_values_are_told_by_their_length() -> None:
    found = read(
        with_metadata(
            **{
                "tokenizer.chat_template": ("string", "x" * 65_537),
                "a": ("string[]", ["x" * 65_537]),
                "b": ("f32[]", [0.0] * 1025),
                "c": ("u8[][]", [[1, 2], [3]]),
                "d": ("string", "x" * 65_536),
            }
        )
    )
    assert found.metadata["tokenizer.chat_template"] == Unread("string", 65_537)
    assert found.metadata["a"] == Unread("string", 1)
    assert found.metadata["b"] == Unread("f32", 1025)
    assert found.metadata["c"] == Unread("array", 2)
    assert found.metadata["d"] == "x" * 65_536


def test_text_that_is_not_utf_8_is_read_and_names_stay_different() -> None:
    one, two = (entry(name, (1,), 0, offset) for name, offset in ((b"\xff", 0), (b"\xfe", 32)))

    assert [tensor.name for tensor in read(with_entries(one, two)).tensors] == ["\\xff", "\\xfe"]


def test_a_model_without_vocabulary_or_architecture_is_read() -> None:
    model = Model((read(gguf({}, ())),))

    assert (model.architecture, model.vocabulary_size, model.tensors) == ("", None, ())


# --- types that are not known, or known otherwise


def test_a_type_that_is_not_known_is_sized_by_what_follows() -> None:
    data = with_entries(
        entry("a", (32,), 77, 0), entry("b", (32,), 0, 96), entry("c", (8,), 78, 224),
        data_bytes=300,
    )  # fmt: skip
    found = read(data)

    assert [tensor.size_bytes for tensor in found.tensors] == [96, 128, 76]
    assert found.tensors[0].type_name == "type 77"


def test_a_type_whose_tensors_would_overlap_is_another_than_ours() -> None:
    """Forks of llama.cpp use the same ids for blocks of other sizes."""
    fork_bytes = 34
    data = with_entries(
        entry("a", (128, 10), 42, 0), entry("b", (128, 10), 42, 352), data_bytes=352 + 340
    )
    assert size_bytes(42, (128, 10)) == 36 * 10
    assert [tensor.size_bytes for tensor in read(data).tensors] == [352, 10 * fork_bytes]


def test_rows_that_are_not_whole_blocks_are_sized_by_what_follows() -> None:
    data = with_entries(entry("a", (33,), 2, 0), entry("b", (8,), 0, 64))

    assert [tensor.size_bytes for tensor in read(data).tensors] == [64, 32]


def test_the_sizes_of_all_types_are_whole_blocks() -> None:
    for type_id, (name, block, block_bytes) in TYPES.items():
        assert size_bytes(type_id, (block * 3, 5)) == 15 * block_bytes, name
        assert size_bytes(type_id, (block * 3, 0)) == 0
        assert (size_bytes(type_id, ()) is None) == (block > 1), name
    assert size_bytes(77, (1,)) is None


# --- damage


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (b"", Flaw.TRUNCATED, "it is empty"),
        (b"GGU", Flaw.TRUNCATED, "the file ends within its header, after 3 bytes"),
        (b"<!DOCTYPE html>", Flaw.FORMAT, "it starts with b'<!DO', not with b'GGUF'"),
        (b"FUGG" + bytes(50), Flaw.FORMAT, "it starts with b'FUGG', not with b'GGUF'"),
        (gguf(version=0), Flaw.FORMAT, "it is GGUF of version 0, which no engine loads any more"),
        (gguf(version=1), Flaw.FORMAT, "it is GGUF of version 1, which no engine loads any more"),
        (gguf(version=4), Flaw.UNKNOWN, "it is GGUF of version 4"),
        (struct.pack(">4sI", b"GGUF", 3), Flaw.FORMAT, "it is for big-endian machines"),
    ],
)
def test_what_is_no_file_of_ours_is_told_apart(data: bytes, kind: Flaw, words: str) -> None:
    assert flaw(data) == (kind, words)


def test_a_cut_off_file_is_truncated_wherever_it_is_cut() -> None:
    data = gguf()
    whole = read(data)
    cuts = {*range(whole.data_offset + 1), *range(whole.data_offset, len(data), 97), len(data) - 1}
    for end in cuts:
        kind, words = flaw(data[:end])
        assert kind is Flaw.TRUNCATED, (end, words)
        if end > whole.data_offset:
            assert "the header says 17.1 kB of tensors" in words or "are missing" in words
    assert read(data + b"trailing") == Header(**{**vars(whole), "file_bytes": len(data) + 8})


def test_a_truncated_download_is_told_in_sizes() -> None:
    written, data_bytes = header(tensors=[("a", (4096, 262144, 2), 12)])

    assert data_bytes == 1_207_959_552
    assert flaw(written, len(written) + 604_000_000) == (
        Flaw.TRUNCATED,
        "the header says 1.21 GB of tensors, the file has 604 MB",
    )
    assert flaw(written, len(written) + data_bytes - 7) == (
        Flaw.TRUNCATED,
        "the last 7 bytes of its tensors are missing",
    )


def counts(tensors: int, keys: int) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys)


HUGE = struct.pack("<Q", 2**62)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (counts(2**64 - 1, 0) + bytes(99), "its header has a length that leads to byte"),
        (counts(0, 2**63) + bytes(99), "its header has a length that leads to byte"),
        (counts(0, 1) + HUGE + bytes(99), "its header has a length that leads to byte"),
        (with_metadata(a=raw(8, HUGE)), "its header has a length that leads to byte"),
        (with_metadata(a=raw(9, b"\x04\0\0\0", HUGE)), "its header has a length"),
        (with_metadata(a=raw(9, b"\x08\0\0\0", HUGE)), "its header has a length"),
        (with_metadata(a=raw(9, b"\x09\0\0\0", HUGE)), "its header has a length"),
        (with_metadata(a=("string[]", ["x"] * 80)).replace(string("x"), HUGE, 1), "a length"),
        (gguf({**SMALL, "general.alignment": ("u32", 48)}), "its alignment is not a power of two"),
        (gguf({**SMALL, "general.alignment": ("u32", 0)}), "its alignment is not a power of two"),
        (gguf({**SMALL, "general.alignment": ("string", "32")}), "its alignment is not a power"),
        (with_entries(entry("a", (8,), 0, 8)), 'tensor "a" begins at 8, no multiple of 32'),
        (with_entries(entry("a", (2**63,), 0, 0)), "has the shape [9223372036854775808]"),
        (with_entries(entry("a", (2**63, 0), 0, 0)), 'tensor "a" has the shape'),
        (with_entries(entry("a", (2**40, 2**40), 0, 0)), 'tensor "a" has the shape'),
        (with_entries(entry("a", (2**60,), 0, 0)), "its header tells of 4.61 EB of tensors"),
        (with_entries(entry("a", (8,), 0, 2**62)), "its header tells of 4.61 EB of tensors"),
        (with_entries(entry("a", (1,), 0, 0), entry("a", (1,), 0, 32)), '"a" is there twice'),
    ],
)  # fmt: skip
def test_a_corrupt_header_is_told_in_a_sentence(data: bytes, words: str) -> None:
    kind, said = flaw(data)
    assert kind is Flaw.CORRUPT
    assert words in said


def test_a_key_that_is_there_twice_is_corrupt() -> None:
    one = string("x\ny") + struct.pack("<II", 4, 7)

    assert flaw(counts(0, 2) + one + one) == (Flaw.CORRUPT, 'key "x\\ny" is there twice')


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (counts(0, 1025) + bytes(1025 * 13), "it tells of 1025 keys"),
        (counts(65_537, 0) + bytes(65_537 * 24), "it tells of 65537 tensors"),
        (with_metadata(**{"x" * 65_536: ("u8", 1)}), "it has a name of 65.5 kB"),
        (with_entries(entry("x" * 65_536, (1,), 0, 0)), "it has a name of 65.5 kB"),
        (with_metadata(a=raw(13, bytes(8))), "it has a value of kind 13"),
        (with_metadata(a=raw(9, struct.pack("<IQ", 13, 0))), "it has an array of kind 13"),
        (with_metadata(a=("u8[][][][][]", [[[[[1]]]]])), "arrays in arrays, more than 4 deep"),
        (with_metadata(a=("u8[][]", [[]] * 65_537)), "it has 65537 arrays in arrays"),
        (with_entries(entry("a", (1,) * 5, 0, 0)), 'tensor "a" has 5 dimensions'),
        (with_entries(entry("a", (), 0, 0)[:9] + b"\xff" * 4 + bytes(99)), "4294967295 dimensions"),
    ],
)
def test_what_is_beyond_our_bounds_is_left_to_the_engine(data: bytes, words: str) -> None:
    kind, said = flaw(data)
    assert kind is Flaw.UNKNOWN
    assert words in said


def test_all_of_the_bounds_themselves_are_good() -> None:
    assert len(read(gguf({f"k{n}": ("u8", 1) for n in range(1024)}, ())).metadata) == 1024
    assert read(gguf({"x" * 65_535: ("u8", 1)})).metadata
    assert read(with_metadata(a=("u8[][][][]", [[[[1]]]]))).metadata["a"] == Unread("array", 1)
    assert read(with_entries(entry("a", (1, 1, 1, 1), 0, 0))).tensors[0].size_bytes == 4
    assert read(with_entries(entry("a", (0, 2**62), 0, 0))).tensors[0].size_bytes == 0


def test_a_header_that_is_too_large_is_not_read_on() -> None:
    start = counts(0, 1) + string("a") + struct.pack("<I", 8)

    assert parse(start + struct.pack("<Q", 50_000_000), 2**40) is None, "more is needed"
    assert flaw(start + struct.pack("<Q", 100_000_000), 2**40) == (
        Flaw.UNKNOWN,
        "its header is larger than 67.1 MB",
    )


# --- what was written is what is read

NUMBERS: Mapping[str, st.SearchStrategy[int | float]] = {
    "u8": st.integers(0, 2**8 - 1), "i8": st.integers(-(2**7), 2**7 - 1),
    "u16": st.integers(0, 2**16 - 1), "i16": st.integers(-(2**15), 2**15 - 1),
    "u32": st.integers(0, 2**32 - 1), "i32": st.integers(-(2**31), 2**31 - 1),
    "u64": st.integers(0, 2**64 - 1), "i64": st.integers(-(2**63), 2**63 - 1),
    "f32": st.floats(width=32, allow_nan=False), "f64": st.floats(allow_nan=False),
    "bool": st.booleans(),
}  # fmt: skip


def array_of(kind: str) -> st.SearchStrategy[Item]:
    return st.tuples(st.just(f"{kind}[]"), st.lists(NUMBERS[kind], max_size=20))


TEXTS = st.text(max_size=20)
ITEMS: st.SearchStrategy[Item] = st.one_of(
    *(st.tuples(st.just(kind), numbers) for kind, numbers in NUMBERS.items()),
    st.sampled_from(sorted(KINDS)).flatmap(array_of),
    st.tuples(st.just("string"), TEXTS),
    st.tuples(st.just("string[]"), st.lists(TEXTS, max_size=90)),
    st.tuples(st.just("u16[][]"), st.lists(st.lists(NUMBERS["u16"], max_size=3), max_size=3)),
)
KEYS = st.one_of(
    st.sampled_from(["tokenizer.ggml.tokens", "general.name", "llama.x"]), st.text(max_size=30)
)
METADATA = st.dictionaries(KEYS.filter(lambda key: key != "general.alignment"), ITEMS, max_size=8)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    type_id = draw(st.sampled_from(sorted(TYPES)))
    rows = draw(st.lists(st.integers(0, 4), max_size=3))
    row = draw(st.integers(0, 3)) * TYPES[type_id].block
    return draw(st.text(max_size=20)), (row, *rows), type_id


TABLES = st.lists(entries(), max_size=6, unique_by=lambda each: each[0])


def expected(item: Item) -> Value:
    kind, content = item
    if kind.endswith("[][]"):
        return Unread("array", len(content))
    if kind == "string[]" and len(content) > 64:
        return Unread("string", len(content))
    return tuple(content) if kind.endswith("[]") else content


@given(metadata=METADATA, tensors=TABLES, alignment=st.sampled_from([1, 8, 32, 4096]))
def test_what_was_written_is_read_back(
    metadata: dict[str, Item], tensors: list[Entry], alignment: int
) -> None:
    keys = {**metadata, "general.alignment": ("u32", alignment)}
    found = read(gguf(keys, tensors, alignment=alignment))

    assert found.metadata == {key: expected(item) for key, item in keys.items()}
    assert [(each.name, each.shape, each.type_id) for each in found.tensors] == list(tensors)
    assert all(each.size_bytes == size_bytes(each.type_id, each.shape) for each in found.tensors)


# --- the jump over the vocabulary


def both(data: bytes) -> tuple[Header | None, Header | None]:
    """The header with jumps from the first string on, and without any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_reader, "STRINGS_READ_MAX", 0)
        patch.setattr(gguf_reader, "JUMP_MIN_STRINGS", 1)
        jumped = parse(data, len(data))
        patch.setattr(gguf_reader, "JUMP_MIN_STRINGS", 2**62)
        return jumped, parse(data, len(data))


def walked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many strings each exact walk went over, from now on."""
    counts: list[int] = []
    walk = Reader._skip_strings

    def note(reader: Reader, count: int) -> None:
        counts.append(count)
        walk(reader, count)

    monkeypatch.setattr(Reader, "_skip_strings", note)
    return counts


TOKENS = [f"<t{number}>" for number in range(2000)]


def test_the_vocabulary_is_jumped_over(monkeypatch: pytest.MonkeyPatch) -> None:
    data = with_metadata(**{"tokenizer.ggml.tokens": ("string[]", TOKENS)})
    counts = walked(monkeypatch)

    assert read(data).metadata["tokenizer.ggml.tokens"] == Unread("string", 2000)
    assert counts == []


@pytest.mark.parametrize(
    "tokens",
    [
        [*TOKENS, "tokenizer.ggml.scores"],
        [*TOKENS, "general.", "\x05\0\0\0"],
        [*TOKENS, "llama.\0", "x"],
        [*TOKENS, "\x01\0\0\0\0\0\0\0general.x\x00\x00\x00\x00"],
    ],
)
def test_a_token_that_looks_like_a_key_is_none(
    tokens: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = with_metadata(**{"tokenizer.ggml.tokens": ("string[]", tokens)})
    counts = walked(monkeypatch)

    found = read(data)

    assert found.metadata["tokenizer.ggml.tokens"] == Unread("string", len(tokens))
    assert found.metadata["general.quantization_version"] == 2
    assert counts == [len(tokens)], "in doubt it is walked"


def test_a_vocabulary_at_the_end_is_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    data = gguf({"general.architecture": ("string", "llama"), "x.tokens": ("string[]", TOKENS)})
    counts = walked(monkeypatch)

    assert read(data).metadata["x.tokens"] == Unread("string", 2000)
    assert counts == [2000]


def test_a_cut_within_the_vocabulary_asks_for_more_or_is_truncated() -> None:
    data = with_metadata(**{"tokenizer.ggml.tokens": ("string[]", TOKENS)})
    cut = data[: data.index(b"<t1000>")]

    assert parse(cut, len(data)) is None
    assert flaw(cut)[0] is Flaw.TRUNCATED


LOOKALIKES = st.one_of(
    TEXTS,
    st.sampled_from(["tokenizer.", "general.", "general.x", "llama.\0\0", "\0" * 7 + "general."]),
)


@given(metadata=METADATA, tokens=st.lists(LOOKALIKES, max_size=30), tensors=TABLES)
@example(metadata={}, tokens=["0" * 15, "tokenizer.", ""], tensors=[("", (0,), 0)])
def test_a_jump_leads_to_what_a_walk_would(
    metadata: dict[str, Item], tokens: list[str], tensors: list[Entry]
) -> None:
    first: dict[str, Item] = {
        "general.architecture": ("string", "llama"),
        "tokenizer.ggml.tokens": ("string[]", tokens),
    }
    jumped, exact = both(gguf({**first, **metadata}, tensors))

    assert jumped is not None
    assert jumped == exact
