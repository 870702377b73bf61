"""What types of an output are unified, and that no value changes by it."""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_resume.core.common_types import limits_of
from ray_resume.core.output_schema import (
    OutputSchema,
    SchemaMismatchError,
    asked,
    conform,
    unifiable,
)
from ray_resume.core.retyped import retype
from ray_resume.core.variants import MAX_NAMED

UNIFIED = [
    (pa.null(), pa.string(), pa.string()),
    (pa.null(), pa.struct([("a", pa.int8())]), pa.struct([("a", pa.int8())])),
    (pa.int8(), pa.int64(), pa.int64()),
    (pa.uint8(), pa.uint32(), pa.uint32()),
    (pa.int8(), pa.uint8(), pa.int16()),
    (pa.uint32(), pa.int16(), pa.int64()),
    (pa.int64(), pa.float32(), pa.float64()),
    (pa.float16(), pa.float32(), pa.float32()),
    (pa.decimal128(5, 2), pa.decimal128(5, 0), pa.decimal128(7, 2)),
    (pa.string(), pa.large_string(), pa.large_string()),
    (pa.string(), pa.string_view(), pa.string()),
    (pa.binary(), pa.large_binary(), pa.large_binary()),
    (pa.string(), pa.dictionary(pa.int32(), pa.string()), pa.string()),
    (pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.string()), pa.string()),
    (pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("us")),
    (pa.duration("ms"), pa.duration("s"), pa.duration("ms")),
    (pa.time32("s"), pa.time64("us"), pa.time64("us")),
    (pa.list_(pa.null()), pa.list_(pa.string()), pa.list_(pa.string())),
    (pa.list_(pa.int8()), pa.large_list(pa.int16()), pa.large_list(pa.int16())),
    (pa.list_(pa.int8(), 2), pa.list_(pa.int8(), 3), pa.list_(pa.int8())),
    (
        pa.struct([("a", pa.null()), ("b", pa.int8())]),
        pa.struct([("b", pa.int64()), ("c", pa.string()), ("a", pa.bool_())]),
        pa.struct([("a", pa.bool_()), ("b", pa.int64()), ("c", pa.string())]),
    ),
    (pa.map_(pa.string(), pa.int8()), pa.map_(pa.string(), pa.null()), None),
]
REFUSED = [
    (pa.int64(), pa.string()),
    (pa.int64(), pa.uint64()),
    (pa.bool_(), pa.int8()),
    (pa.string(), pa.binary()),
    (pa.timestamp("s"), pa.timestamp("s", "UTC")),
    (pa.timestamp("s"), pa.date32()),
    (pa.struct([("a", pa.int8())]), pa.struct([("a", pa.string())])),
    (pa.list_(pa.int8()), pa.int8()),
    (pa.decimal256(76, 0), pa.decimal256(76, 70)),
]


def agreed(*kinds: pa.DataType) -> OutputSchema:
    found = OutputSchema(pa.schema([]))
    for number, kind in enumerate(kinds):
        found = found.widened(pa.schema([("x", kind)]), f"source {number}")
    return found


@pytest.mark.parametrize(("one", "other", "both"), UNIFIED)
def test_types_that_are_unified(one: pa.DataType, other: pa.DataType, both: Any) -> None:
    both = both or pa.map_(pa.string(), pa.int8())
    for kinds in ((one, other), (other, one), (one, other, one)):
        found = agreed(*kinds).schema.field("x").type
        assert found.num_fields == both.num_fields
        if not pa.types.is_struct(both):  # whose fields are in the order in which they came
            assert found == both
        else:
            assert {(f.name, f.type) for f in found} == {(f.name, f.type) for f in both}
    assert not agreed(one).stale
    assert agreed(one, other).stale == (one != both)


@pytest.mark.parametrize(("one", "other"), REFUSED)
def test_types_that_are_refused(one: pa.DataType, other: pa.DataType) -> None:
    for kinds in ((one, other), (other, one)):
        with pytest.raises(SchemaMismatchError, match=r"'x' .*source 0, .*source 1, ") as caught:
            agreed(*kinds)
        assert caught.value.column == "x"
        # A null says nothing of which source gave the type.
        with pytest.raises(SchemaMismatchError, match=r"source 1, .*source 2, "):
            agreed(pa.null(), *kinds)


VALUES = [
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-100, 100),
    st.floats(allow_nan=False, width=32),
    st.text(st.characters(codec="utf-8"), max_size=3),
    st.booleans(),
    st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-999, max_value=999),
    st.dates(),
    st.dictionaries(st.sampled_from("abc"), st.integers(-5, 5), min_size=1),
    st.lists(st.integers(-5, 5), max_size=2),
]
COLUMNS = st.one_of([st.lists(st.none() | values, min_size=1, max_size=5) for values in VALUES])
TYPES: list[Any] = [None, pa.int8(), pa.int32(), pa.uint16(), pa.float32(), pa.large_string()]


def arrays_of(columns: list[Any]) -> list[pa.Array]:
    arrays = []
    for values, kind in columns:
        with contextlib.suppress(pa.ArrowException, TypeError, OverflowError, UnicodeError):
            arrays.append(pa.array(values, kind))
    return arrays


def asked_for(array: pa.Array) -> pa.Schema:
    """Return the schema that a sink asks for."""
    return asked(pa.schema([("x", array.type)]), {"x": limits_of(pa.chunked_array([array]))})


@given(st.lists(st.tuples(COLUMNS, st.sampled_from(TYPES)), max_size=5))
def test_no_value_changes(columns: list[Any]) -> None:
    schema = OutputSchema(pa.schema([]))
    included = []
    for number, array in enumerate(arrays_of(columns)):
        try:
            schema = schema.widened(asked_for(array), str(number))
        except SchemaMismatchError:
            continue
        included.append((str(number), array))
    for source_id, array in included:
        # What is in it does not widen it again.
        assert schema.widened(asked_for(array), source_id) is schema
        assert schema.widened(asked_for(array), "another").schema == schema.schema
        table = pa.table({"x": array})
        made = conform(table, schema.schema)
        assert made.schema.equals(schema.schema)
        for before, after in zip(array.to_pylist(), made.column("x").to_pylist(), strict=True):
            if isinstance(before, dict):
                assert {**dict.fromkeys(after), **before} == after
            else:
                assert before == after
        # Rows can be given the types back that they had.
        assert retype(made, table.schema).equals(table)
    assert OutputSchema.from_bytes(schema.to_bytes()) == schema


@given(st.lists(st.tuples(COLUMNS, st.sampled_from(TYPES)), min_size=2, max_size=4))
def test_the_order_of_sources_does_not_matter(columns: list[Any]) -> None:
    arrays = arrays_of(columns)
    found: list[Any] = []
    for order in (arrays, arrays[::-1], arrays[1:] + arrays[:1]):
        schema = OutputSchema(pa.schema([]))
        try:
            for number, array in enumerate(order):
                schema = schema.widened(asked_for(array), str(number))
        except SchemaMismatchError:
            found.append(None)
            continue
        kinds = [one.type for one in schema.schema]
        found.append(
            [sorted(map(str, kind)) if pa.types.is_struct(kind) else kind for kind in kinds]
        )
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("one", "other", "fits"),
    [
        (pa.array([2**53 + 1]), pa.array([0.5]), False),
        (pa.array([2**53]), pa.array([0.5]), True),
        (pa.array([2**64 - 1], pa.uint64()), pa.array([0.5], pa.float32()), False),
        (pa.array([[1], [-(2**60)]]), pa.array([[0.5]]), False),
        (pa.array([{"a": [2**60]}]), pa.array([{"a": [0.5]}]), False),
        (pa.array([{"a": 2**60, "b": 1}]), pa.array([{"a": 1, "b": 0.5}]), True),
        (
            pa.array([[("k", 2**60)]], pa.map_(pa.string(), pa.int64())),
            pa.array([[("k", 0.5)]], pa.map_(pa.string(), pa.float64())),
            False,
        ),
        (pa.array([2**60]), pa.array([None, 1], pa.int8()), True),
        (pa.array([2**60]).dictionary_encode(), pa.array([0.5]), False),
        (pa.array([2**40], pa.timestamp("s")), pa.array([1], pa.timestamp("ns")), False),
        (pa.array([2**40], pa.timestamp("s")), pa.array([1], pa.timestamp("us")), True),
        (pa.array([-(2**50)], pa.duration("s")), pa.array([1], pa.duration("us")), False),
    ],
)
def test_values_that_fit_into_no_type_with_those_of_another_source(
    one: pa.Array, other: pa.Array, fits: bool
) -> None:
    for first, second in ((one, other), (other, one)):
        schema = OutputSchema(pa.schema([])).widened(asked_for(first), "source 0")
        if not fits:
            with pytest.raises(SchemaMismatchError, match=r"'x' .*source 0, .*source 1, "):
                schema.widened(asked_for(second), "source 1")
            continue
        both = schema.widened(asked_for(second), "source 1").schema
        for array in (one, other):
            conform(pa.table({"x": array}), both)


def test_what_a_source_alone_needed_goes_with_it() -> None:
    def having(**kinds: pa.DataType) -> pa.Schema:
        return pa.schema(list(kinds.items()))

    schema = OutputSchema(pa.schema([])).widened(having(x=pa.int64(), y=pa.null()), "a")
    both = schema.widened(having(x=pa.float64(), y=pa.string(), z=pa.int8()), "b")
    assert both.schema == having(x=pa.float64(), y=pa.string(), z=pa.int8())
    assert both.sources == {"a", "b"}
    left = OutputSchema.from_bytes(both.to_bytes()).without({"b", "c"})
    assert left.schema == schema.schema
    assert left.stale
    assert both.without({"c"}) is both
    assert both.without({"a", "b"}).schema == pa.schema([])
    # The new type of a source cannot be unified with its old one.
    assert left.widened(having(x=pa.float32()), "b").schema.field("x").type == pa.float64()
    # If many sources have a type, the schema does not know whether all of them are gone.
    many = both
    for number in range(MAX_NAMED + 1):
        many = many.widened(having(x=pa.float64()), f"s{number}")
    gone = {"b", *(f"s{number}" for number in range(MAX_NAMED + 1))}
    assert many.without(gone).schema == having(x=pa.float64(), y=pa.null())
    assert many.widened(having(x=pa.float64()), "one more") is many
    # Nor where the source is not known, or what was agreed did not say it.
    assert schema.widened(having(x=pa.float64()), None).without({"a"}).schema == having(
        x=pa.float64()
    )
    old = OutputSchema(having(x=pa.float64())).widened(having(x=pa.int8()), "a")
    assert old.without({"a"}).schema == having(x=pa.float64())


def test_columns_that_are_missing_or_more() -> None:
    table = pa.table({"b": [1, 2], "a": pa.array([1, 2], pa.int8())}, metadata={"k": "v"})
    schema = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("c", pa.string())])
    made = conform(table, schema)
    assert made.to_pydict() == {"a": [1, 2], "b": [1, 2], "c": [None, None]}
    assert made.schema.metadata == {b"k": b"v"}
    for columns, column in ((["a", "b", "c"], "c"), (["a"], "b")):
        with pytest.raises(SchemaMismatchError, match="is in the") as caught:
            conform(table, pa.schema([schema.field(name) for name in columns]), exactly=True)
        assert caught.value.column == column
    with pytest.raises(SchemaMismatchError, match="without loss"):
        conform(pa.table({"a": [1.5]}), pa.schema([("a", pa.int64())]))


def test_extension_types_stay_as_they_are() -> None:
    kind = pa.fixed_shape_tensor(pa.int64(), [2])
    storage = pa.array([[1, 2]], pa.list_(pa.int64(), 2))
    tensor = pa.ExtensionArray.from_storage(kind, storage)
    table = pa.table({"image": tensor, "n": pa.array([1], pa.int8())})
    found = OutputSchema(pa.schema([])).widened(table.schema, "a")
    assert found.schema.names == ["n"]
    made = conform(table, pa.schema([("n", pa.int64())]))
    assert made.column_names == ["image", "n"]
    assert made.schema.field("image").type == kind


def test_what_several_runs_agreed_on() -> None:
    one, other = agreed(pa.int8()), agreed(pa.int64())
    assert one.merged(one) == one
    both = one.merged(other)
    assert both.schema.field("x").type == pa.int64()
    assert both.stale
    with pytest.raises(SchemaMismatchError):
        one.merged(agreed(pa.string()))
    with pytest.raises(ValueError, match="no output schema"):
        OutputSchema.from_bytes(b"{}")
    with pytest.raises(ValueError, match="Expecting value"):
        OutputSchema.from_bytes(b"no JSON")


@pytest.mark.parametrize(
    "inside", [pa.list_, pa.large_list, lambda kind: pa.map_(pa.string(), kind)]
)
def test_no_field_inside_of_a_list_or_map_gets_lost(inside: Any) -> None:
    whole = inside(pa.struct([("a", pa.int8()), ("b", pa.struct([("c", pa.int8())]))]))
    one = {"a": 1, "b": {"c": 2}}
    value = [("k", one)] if pa.types.is_map(whole) else [one]
    table = pa.table({"x": pa.array([value, None], whole)})
    for fields in ([("a", pa.int64())], [("a", pa.int64()), ("b", pa.struct([("d", pa.int8())]))]):
        schema = pa.schema([("x", inside(pa.struct(fields)))])
        with pytest.raises(SchemaMismatchError, match=r"'[bc]' would be lost"):
            conform(table, schema)
    wide = inside(
        pa.struct([("b", pa.struct([("c", pa.int64()), ("e", pa.int8())])), ("a", pa.int64())])
    )
    made = conform(table, pa.schema([("x", wide)])).column("x").to_pylist()
    assert made[1] is None
    assert (
        dict(made[0])["k"]["b"]["c"] == 2 if pa.types.is_map(whole) else made[0][0]["b"]["c"] == 2
    )


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([0.9, -1.5], pa.list_(pa.int64())),
        ([dt.datetime(2026, 1, 1, 0, 0, 0, 5)], pa.list_(pa.timestamp("s"))),
        ([decimal.Decimal("1.50")], pa.list_(pa.int64())),
        ([("k", 0.5)], pa.map_(pa.string(), pa.int32())),
        ([{"a": 1.5}], pa.list_(pa.struct([("a", pa.int8())]))),
        (1.9, pa.timestamp("s")),
        (1.9, pa.date32()),
    ],
)
def test_no_value_is_cut_off(value: Any, kind: pa.DataType) -> None:
    given = None
    if pa.types.is_map(kind):
        given = pa.map_(pa.string(), pa.float64())
    table = pa.table({"x": pa.array([None, value], given)})
    with pytest.raises(SchemaMismatchError, match="column 'x'"):
        conform(table, pa.schema([("x", kind)]))


@pytest.mark.parametrize("values", [{"x": [1, None]}, {"y": [1, 2]}])
def test_a_null_where_none_may_be_is_a_mismatch(values: dict[str, Any]) -> None:
    schema = pa.schema([pa.field("x", pa.int64(), nullable=False), ("y", pa.int64())])
    with pytest.raises(SchemaMismatchError, match=r"column 'x'.* not nullable"):
        conform(pa.table(values), schema)
    assert conform(pa.table({"x": [1], "y": [None]}), schema).schema == schema


def test_values_inside_of_lists_get_wider_types() -> None:
    values = [[1, None, float("nan")], None, []]
    table = pa.table({"x": pa.array(values, pa.list_(pa.float32()))})
    made = conform(table, pa.schema([("x", pa.large_list(pa.float64()))]))
    assert str(made["x"].to_pylist()) == str(values).replace("[1,", "[1.0,")


class Meters(pa.ExtensionType):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(pa.int64(), "ray_resume.tests.meters")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Meters:
        return cls()


def test_extension_types_do_not_travel_to_processes_that_do_not_know_them() -> None:
    plain = pa.field("id", pa.int64(), nullable=False)
    schema = pa.schema([plain, ("far", Meters()), ("deep", pa.list_(Meters()))], {"x": "y"})
    travels = unifiable(schema)
    assert list(travels) == [plain]
    assert travels.metadata is None


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["7", None], pa.int64()),
        ([dt.datetime(2026, 1, 2), None], pa.string()),
        ([[1, None], None, []], pa.list_(pa.string())),
        ([["7"], None], pa.list_(pa.int8())),
        ([[dt.datetime(2026, 1, 2)]], pa.large_list(pa.string())),
        ([{"a": 1, "b": ["7"]}, None], pa.struct([("a", pa.string()), ("b", pa.list_(pa.int8()))])),
        ([[{"a": "1"}]], pa.list_(pa.struct([("a", pa.int8())]))),
    ],
)
def test_what_arrow_casts_is_cast_inside_of_lists_as_well(values: Any, kind: Any) -> None:
    table, schema = pa.table({"x": values}), pa.schema([("x", kind)])
    # Plain Ray Data casts a table before it writes it.
    assert conform(table, schema, exactly=True).equals(table.cast(schema))
    one = pa.table({"x": ["no number"]})
    with pytest.raises(SchemaMismatchError, match=r"column 'x'.*no number"):
        conform(one, pa.schema([("x", pa.int64())]), exactly=True)


def test_metadata_are_those_of_the_users_schema() -> None:
    field = pa.field("x", pa.int64(), nullable=False, metadata={"unit": "m"})
    schema = pa.schema([field, ("y", pa.string())], metadata={"owner": "me"})
    for kind in (pa.int8(), pa.int64()):
        x = pa.array([1], kind)
        table = pa.table({"x": x, "y": ["a"]}, metadata={"pandas": "{}"})
        for wanted in (schema, schema.remove_metadata()):
            made = conform(table, wanted, exactly=True)
            assert made.schema.equals(table.cast(wanted).schema, check_metadata=True)
        # A schema that a run has agreed on by itself has no metadata.
        kept = conform(table, pa.schema([("x", pa.int64()), ("y", pa.string())])).schema.metadata
        assert kept == {b"pandas": b"{}"}


def test_types_become_narrower_where_no_value_changes() -> None:
    narrow = pa.schema([("s", pa.struct([("a", pa.int8())])), ("f", pa.float32())])
    struct = pa.array([{"a": 1, "b": None}, None], pa.struct([("a", pa.int64()), ("b", pa.null())]))
    table = pa.table({"s": struct, "gone": pa.nulls(2), "f": [0.5, float("nan")]})
    made = retype(table, narrow)
    assert made.schema == narrow
    assert str(made.to_pydict()) == "{'s': [{'a': 1}, None], 'f': [0.5, nan]}"
    for name, column in {
        "s": pa.array([{"a": 1, "b": "text"}, None]),
        "gone": pa.array([1, None]),
        "f": pa.array([0.1, None]),
    }.items():
        other = table.set_column(table.column_names.index(name), name, column)
        with pytest.raises(SchemaMismatchError) as caught:
            retype(other, narrow)
        assert caught.value.column == name
    # A field that one chunk has is not lost, nor is a column of a type that is not loaded here.
    struct = struct.cast(pa.struct([("a", pa.int64()), ("b", pa.string())]))
    later = pa.array([{"a": 1, "b": "x"}], struct.type)
    with pytest.raises(SchemaMismatchError, match="'b' would be lost"):
        retype(pa.table({"s": pa.chunked_array([struct, later])}), narrow)
    far = pa.field("far", pa.binary(), metadata={"ARROW:extension:name": "x"})
    stored = pa.table([struct, pa.nulls(2, pa.binary())], pa.schema([("s", struct.type), far]))
    assert retype(stored, narrow).schema.field("far") == far
    # Arrow itself would cut this off.
    cut = pa.table({"d": pa.array([decimal.Decimal("1.25")])})
    with pytest.raises(SchemaMismatchError, match="without loss"):
        retype(cut, pa.schema([("d", pa.decimal128(5, 1))]))
