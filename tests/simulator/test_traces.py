"""Traces of real traffic, read from small samples of every format."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.workloads.tables import TraceFormat
from simulator.workloads.traces import FORMATS, Format, Row, TraceError, format_of, read_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
PLAIN = "arrives_s,prompt_tokens,output_tokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURST_2 = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
MOONCAKE = '{"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]}\n'
REAL = Path(__file__).parents[3] / "shared" / "traces"
S = 1_000_000_000
EPOCH_2024_NS = 1_704_067_200 * S


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace"


def rows(file: Path, text: str | bytes, name: str = "", *, sort: bool = False) -> list[Row]:
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return list(read_trace(file, name, sort=sort))


def brief(file: Path, text: str | bytes) -> list[tuple[int, int, int]]:
    return [(row.at_ns, row.prompt_tokens, row.output_tokens) for row in rows(file, text)]


# --- formats -------------------------------------------------------------------------------------------------------


def test_azure_has_seven_digits_of_a_second(file: Path) -> None:
    day = 1_700_092_800 * S  # 2023-11-16
    found = rows(file, AZURE + "2023-11-16 18:15:46.6805901,374,44\n2023-11-16 23:59:59,1,2\n2023-11-17 00:00:00.5,3,4")
    assert found == [Row(day + 65_746_680_590_100, 374, 44), Row(day + 86_399 * S, 1, 2),
                     Row(day + 86_400 * S + S // 2, 3, 4)]


def test_azure_of_2024_names_its_zone(file: Path) -> None:
    first, second = brief(file, AZURE + "2024-05-10 00:00:00.009930+00:00,1,2\n2024-05-10T00:00:01Z,3,4\n")
    assert second[0] - first[0] == S - 9_930_000


def test_mooncake_has_blocks(file: Path) -> None:
    more = '{"timestamp": 27.5, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47], "other": []}\n'
    none = '{"timestamp": 30, "input_length": 5, "output_length": 1}\n'
    assert rows(file, MOONCAKE + more + none) == [
        Row(0, 700, 5, blocks=(0, 1)), Row(27_500_000, 6955, 52, blocks=(46, 47)), Row(30_000_000, 5, 1)]


def test_burstgpt_has_models_and_later_sessions(file: Path) -> None:
    assert rows(file, BURST + "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1,2,3,API log\n") == [
        Row(5 * S, 472, 18, "ChatGPT"), Row(45 * S, 1, 2, "GPT-4")]
    assert rows(file, BURST_2 + "19440110.0,1722-b3f,43,GPT-4,906,446,1352,Conversation log\n"
                                "19440110.25,,2,ChatGPT,36,29,65,API log\n") == [
        Row(19_440_110 * S, 906, 446, "GPT-4", "1722-b3f"), Row(19_440_110 * S + S // 4, 36, 29, "ChatGPT")]


def test_ours_has_models_and_sessions_if_it_likes(file: Path) -> None:
    assert rows(file, PLAIN + "0,10,20\n1.5,30,40\n1e1,5,6\n") == [
        Row(0, 10, 20), Row(3 * S // 2, 30, 40), Row(10 * S, 5, 6)]
    assert rows(file, "session,model," + PLAIN + 's1,"llama, the 3rd",0.000000001,10,20\n') == [
        Row(1, 10, 20, "llama, the 3rd", "s1")]


@pytest.mark.parametrize(("text", "name"), [
    (AZURE, "azure"), (AZURE.upper(), "azure"), ("a, generatedtokens ,ContextTokens,timestamp\n", "azure"),
    (BURST, "burstgpt"), (BURST_2, "burstgpt"), (PLAIN, "plain"), ("\n\n" + PLAIN, "plain"), (MOONCAKE, "mooncake"),
])
def test_a_format_is_told_from_its_first_line(file: Path, text: str, name: str) -> None:
    file.write_text(text, encoding="utf-8")
    assert format_of(file).name == name
    assert format_of(file, name) is FORMATS[name]


def test_the_formats_are_the_choices_of_a_workload() -> None:
    assert [str(choice) for choice in TraceFormat if choice is not TraceFormat.ANY] == sorted(FORMATS)


def test_a_request_may_take_several_lines_and_end_after_the_next(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reader(_: str) -> Callable[[str], Row | None]:
        begun: dict[str, int] = {}

        def parse(line: str) -> Row | None:
            what, name, number = line.split()
            if what == "begin":
                begun[name] = int(number)
                return None
            return Row(begun.pop(name), 1, int(number), session=name)

        return parse

    own = Format("own", "begin", lambda line: line.startswith("begin"), reader, header=False, in_order=False,
                 left_out="")
    monkeypatch.setitem(FORMATS, "own", own)
    file.write_text("begin a 5\nbegin b 7\nend b 3\nend a 4\nbegin c 9\n", encoding="utf-8")
    notes: list[str] = []
    assert list(read_trace(file, notes=notes)) == [Row(5, 1, 4, session="a"), Row(7, 1, 3, session="b")]
    assert notes == []


def test_columns_are_found_by_name(file: Path) -> None:
    assert brief(file, "output_tokens,what,PROMPT_TOKENS, arrives_s\n3,x,2,1\n") == [(S, 2, 3)]


# --- what is of no account -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\n\r\n", "\n  \n\n"], ids=["lf", "crlf", "blank", "blanks"])
@pytest.mark.parametrize("last", ["", "\n"], ids=["open", "ended"])
def test_bom_crlf_and_blank_lines(file: Path, mark: bytes, end: str, last: str) -> None:
    text = end.join([PLAIN.strip(), "1,2,3", "4,5,6"]) + last
    assert brief(file, mark + text.encode()) == [(S, 2, 3), (4 * S, 5, 6)]
    text = end.join([MOONCAKE.strip(), MOONCAKE.strip()]) + last
    assert brief(file, mark + text.encode()) == [(0, 700, 5), (0, 700, 5)]


def test_a_file_may_end_within_its_last_line(file: Path) -> None:
    whole = AZURE + "2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:50.99,396,109"
    for length in range(len(AZURE) + 30, len(whole) + 1):
        notes: list[str] = []
        file.write_text(whole[:length], encoding="utf-8")
        found = list(read_trace(file, notes=notes))
        assert found[0].output_tokens == 44
        cut = whole[length:].count(",") > 0 or whole[:length].endswith(",")
        assert len(found) == (1 if cut or whole[:length].endswith("\n") else 2)
        assert notes == ([f"{file}:3: the last line is cut off and left out"] if len(found) == 1 and cut and
                         not whole[:length].endswith("\n") else [])


def test_a_file_may_end_within_a_character(file: Path) -> None:
    assert brief(file, (PLAIN + "1,2,3\n").encode() + b"4,\xc3") == [(S, 2, 3)]


def test_rows_without_output_are_left_out_and_told(file: Path) -> None:
    file.write_text(BURST + "1,x,0,0,0,l\n2,x,5,0,5,l\n3,x,0,7,7,l\n", encoding="utf-8")
    notes: list[str] = []
    assert list(read_trace(file, notes=notes)) == [Row(3 * S, 1, 7, "x")]
    assert notes == [f"{file}: 2 rows without output tokens are left out"]


def test_unsorted_rows_are_sorted_when_asked_and_ties_keep_their_order(file: Path) -> None:
    found = rows(file, PLAIN + "3,1,1\n1,2,2\n3,3,3\n1,4,4\n", sort=True)
    assert [row.prompt_tokens for row in found] == [2, 4, 1, 3]


# --- errors --------------------------------------------------------------------------------------------------------

KNOWN = ('the first lines are azure: TIMESTAMP,ContextTokens,GeneratedTokens; '
         "burstgpt: Timestamp,Model,Request tokens,Response tokens; plain: arrives_s,prompt_tokens,output_tokens; "
         'events: {"ollama-lb-log": 1, ...}; mooncake: {"timestamp": 0, "input_length": 9, ...}')
DATE_FIX = "write it as 2023-11-16 18:15:46.6805900, in UTC"


@pytest.mark.parametrize(("text", "error"), [
    ("", "F: is empty"),
    ("\n\n", "F: is empty"),
    ("a,b\n1,2\n", f"F:1: is the first line of no trace that is known; {KNOWN}"),
    ('{"a": 1}\n', f"F:1: is the first line of no trace that is known; {KNOWN}"),
    (AZURE + "x,1,2\n", f'F:2: column TIMESTAMP: "x" is no date and time; {DATE_FIX}'),
    (AZURE + "2023-02-30 00:00:00,1,2\n",
     f'F:2: column TIMESTAMP: "2023-02-30 00:00:00" is no date and time; {DATE_FIX}'),
    (AZURE + "2023-02-28 00:00:00.1234567890,1,2\n",
     f'F:2: column TIMESTAMP: "2023-02-28 00:00:00.1234567890" is no date and time; {DATE_FIX}'),
    (AZURE + "2023-02-28 00:00:00,-1,2\n", 'F:2: column ContextTokens: "-1" is not a whole number of tokens'),
    (AZURE + "2023-02-28 00:00:00,1\n2023-02-28 00:00:00,1,2\n",
     "F:2: column GeneratedTokens: is missing: the line has 2 of 3 columns"),
    (PLAIN + "\n1,2,3.5\n", 'F:3: column output_tokens: "3.5" is not a whole number of tokens'),
    (PLAIN + "1,2,\u0663\n", 'F:2: column output_tokens: "\u0663" is not a whole number of tokens'),
    (PLAIN + "1,99999999,3\n", "F:2: column prompt_tokens: 99999999 tokens are too many; the most is 10000000"),
    (PLAIN + f"1,{'9' * 5000},3\n",
     f"F:2: column prompt_tokens: {'9' * 20} tokens are too many; the most is 10000000"),
    (PLAIN + "x,2,3\n", 'F:2: column arrives_s: "x" is not a number of seconds'),
    (PLAIN + ",2,3\n", 'F:2: column arrives_s: "" is not a number of seconds'),
    (PLAIN + f"{'x' * 5000},2,3\n", f'F:2: column arrives_s: "{"x" * 80}..." is not a number of seconds'),
    (PLAIN + "-1,2,3\n", "F:2: column arrives_s: -1 is no time; times are 0 or more"),
    (PLAIN + "nan,2,3\n", "F:2: column arrives_s: NaN is no time; times are 0 or more"),
    (PLAIN + "1e30,2,3\n", "F:2: column arrives_s: 1E+30 is no time; times are 0 or more"),
    (PLAIN + '1,"2\r3",3\n', 'F:2: column prompt_tokens: "2\\r3" is not a whole number of tokens'),
    (PLAIN + '1\r"2,3\n', "F:2: is no line of CSV"),
    ('"a\rb\n', f"F:1: is the first line of no trace that is known; {KNOWN}"),
    (PLAIN + "2,2,3\n\n1,2,3\n", "F:4: is earlier than line 2; sort the file, or set sort = true"),
    (PLAIN + "2,2,3\n1,2,3", "F:3: is earlier than line 2; sort the file, or set sort = true"),
    (BURST + "5,ChatGPT,x,18,490,l\n", 'F:2: column Request tokens: "x" is not a whole number of tokens'),
    (MOONCAKE + "{\n", "F:2: is no JSON"),
    (MOONCAKE + "[1]\n", "F:2: is no JSON object"),
    (MOONCAKE + "[" * 100_000 + "\n", "F:2: is no JSON"),
    (MOONCAKE + '{"input_length": 1}\n', "F:2: column timestamp: is missing"),
    (MOONCAKE + '{"timestamp": "1"}\n', "F:2: column timestamp: is not a number of ms"),
    (MOONCAKE + '{"timestamp": true}\n', "F:2: column timestamp: is not a number of ms"),
    (MOONCAKE + '{"timestamp": -1, "input_length": 1, "output_length": 1}\n',
     "F:2: column timestamp: -1 is no time; times are 0 or more"),
    (MOONCAKE + '{"timestamp": NaN}\n', "F:2: column timestamp: is not a number of ms"),
    (MOONCAKE + '{"timestamp": 1, "output_length": 1}\n', "F:2: column input_length: is missing"),
    (MOONCAKE + '{"timestamp": 1, "input_length": 1.5}\n', 'F:2: column input_length: "1.5" is not a whole number'),
    (MOONCAKE + '{"timestamp": 1, "input_length": 1, "output_length": 99999999}\n',
     "F:2: column output_length: 99999999 tokens are too many; the most is 10000000"),
    (MOONCAKE + '{"timestamp": 1, "input_length": 1, "output_length": true}\n',
     "F:2: column output_length: true is not a whole number"),
    (MOONCAKE + '{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [1, "2"]}\n',
     "F:2: column hash_ids: is not a list of whole numbers"),
])
def test_what_is_wrong_is_told_with_line_and_column(file: Path, text: str, error: str) -> None:
    with pytest.raises(TraceError) as caught:
        rows(file, text)
    assert str(caught.value) == error.replace("F", str(file), 1)


@pytest.mark.parametrize(("content", "error"), [
    ((PLAIN + "1,2,3\n").encode() + b"4,5,\xff\n7,8,9\n", "F:3: is not UTF-8 text; is it compressed?"),
    (b"\x1f\x8b\x08\x00\xff\n123", "F:1: is not UTF-8 text; is it compressed?"),
    (PLAIN.encode() + b"1" * 17_000_000, "F:2: is longer than 16777216 bytes; is this a trace?"),
])
def test_what_is_no_text_is_told(file: Path, content: bytes, error: str) -> None:
    with pytest.raises(TraceError) as caught:
        rows(file, content)
    assert str(caught.value) == error.replace("F", str(file), 1)


@pytest.mark.parametrize(("name", "error"), [
    ("azur", ('F: "azur" is no format of a trace; did you mean "azure"? '
              'The choices are "azure", "burstgpt", "plain", "events", "mooncake"')),
    ("azure", ("F:1: column TIMESTAMP: is missing from the header; "
               "the columns needed are TIMESTAMP, ContextTokens, GeneratedTokens")),
    ("mooncake", "F:1: is no JSON"),
])
def test_a_named_format_must_fit(file: Path, name: str, error: str) -> None:
    with pytest.raises(TraceError) as caught:
        rows(file, PLAIN + "1,2,3\n", name)
    assert str(caught.value) == error.replace("F", str(file), 1)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"absent: cannot be read: No such file or directory$"):
        list(read_trace(tmp_path / "absent"))
    with pytest.raises(TraceError, match=r"cannot be read: Is a directory$"):
        list(read_trace(tmp_path))


# --- properties ------------------------------------------------------------------------------------------------------


@given(
    data=st.lists(st.tuples(st.integers(0, 10**15), st.integers(1, 10**7), st.integers(1, 10**7))),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]), kind=st.sampled_from(["azure", "plain", "mooncake"]),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, data: list[tuple[int, int, int]], end: str, kind: str
) -> None:
    data.sort(key=lambda row: row[0])
    file = tmp_path_factory.mktemp("traces") / "t"
    written = {"azure": _azure_lines, "plain": _plain_lines, "mooncake": _mooncake_lines}[kind](data)
    file.write_text(end.join(written), encoding="utf-8", newline="")
    found = list(read_trace(file, kind)) if written else []
    zero = EPOCH_2024_NS if kind == "azure" else 0
    assert [(row.at_ns - zero, *row[1:3]) for row in found] == data


def _azure_lines(data: list[tuple[int, int, int]]) -> list[str]:
    lines = []
    for at, prompt, output in data:
        s, ns = divmod(at, S)
        clock = f"{s // 3600 % 24:02}:{s // 60 % 60:02}:{s % 60:02}.{ns:09}"
        lines.append(f"2024-01-{s // 86_400 + 1:02} {clock},{prompt},{output}")
    return [AZURE.strip(), *lines]


def _plain_lines(data: list[tuple[int, int, int]]) -> list[str]:
    return [PLAIN.strip(), *(f"{at // S}.{at % S:09},{prompt},{output}" for at, prompt, output in data)]


def _mooncake_lines(data: list[tuple[int, int, int]]) -> list[str]:
    return [f'{{"timestamp": {at // 10**6}.{at % 10**6:06}, "input_length": {prompt}, "output_length": {output}}}'
            for at, prompt, output in data]


@given(st.binary(max_size=200), st.sampled_from([AZURE, PLAIN, BURST, MOONCAKE, ""]))
def test_no_bytes_are_read_as_anything_but_rows_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, header: str
) -> None:
    file = tmp_path_factory.mktemp("traces") / "t"
    file.write_bytes(header.encode() + junk)
    found: list[Row] = []
    with suppress(TraceError):
        found = list(read_trace(file))
    assert all(row.prompt_tokens >= 1 and row.output_tokens >= 1 for row in found)


def test_rows_are_read_as_they_are_drawn(file: Path) -> None:
    with file.open("w", encoding="utf-8") as out:
        out.write(MOONCAKE)
        out.writelines(json.dumps({"timestamp": at, "input_length": 9, "output_length": 1}) + "\n"
                       for at in range(10_000))
        out.write("nonsense\n")
    assert len(list(islice(read_trace(file), 10))) == 10
    tracemalloc.start()
    for _ in islice(read_trace(file), 10_000):
        pass
    assert tracemalloc.get_traced_memory()[1] < 500_000
    tracemalloc.stop()


# --- the real ones -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "n", "prompt_tokens", "output_tokens", "length_ns"), [
    ("conv", 19_366, 22_361_870, 4_088_665, 3_501_721_937_000), ("code", 8_819, 18_059_974, 245_896, 3_435_948_056_000),
])
def test_the_azure_traces_are_read_in_full(
    name: str, n: int, prompt_tokens: int, output_tokens: int, length_ns: int
) -> None:
    path = REAL / f"AzureLLMInferenceTrace_{name}_2023.csv"
    if not path.exists():
        pytest.skip(f"the trace is not at {path}")
    notes: list[str] = []
    found = list(read_trace(path, notes=notes))
    assert len(found) == n
    assert notes == []
    assert sum(row.prompt_tokens for row in found) == prompt_tokens
    assert sum(row.output_tokens for row in found) == output_tokens
    assert found[-1].at_ns - found[0].at_ns == length_ns
