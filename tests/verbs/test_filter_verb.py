"""`tokenkit filter` keeps whole rows, counts what it leaves out, and writes a folder that is a source again."""

import gzip
import json

import pytest

from tokenkit.config import UserError, build, parse_yaml
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.verbs.filter import FilterRun, filter_source


def test_a_source_is_filtered(tmp_path, documents):
    good = " ".join(" ".join(text.split()[:30]) for text in documents[:4])
    lines = [
        {"text": text, "ids": [n]} for n, text in enumerate([good, "HA HA", good, " ", good.replace(" ", "... ", 90)])
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    values = {"output": tmp_path / "out", "source": {"path": str(source)}}
    quality = {"without": ["unigram_entropy", "repeated_5_grams", "top_2_gram", "unique_words"]}
    found = filter_source(build(FilterRun, {**values, "quality": quality}))
    with gzip.open(tmp_path / "out" / "kept.jsonl.gz", "rt") as file:
        assert [json.loads(line) for line in file] == [lines[0]]  # with its ids
    assert (found["documents"], found["kept"]) == (4, 1)
    assert found["kept_bytes"] == len(good.encode())
    assert found["rejected"]["duplicate"] == 2  # without punctuation the last is the first
    assert found["rejected_by_this_rule_alone"]["duplicate"] == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert report["rejected"] == found["rejected"]
    assert report["rules"]["words"] == {"at_least": 50.0, "at_most": 10000.0}
    assert parse_yaml((tmp_path / "out" / "run.yaml").read_text("utf-8"))["quality"]["without"] == quality["without"]
    assert read_documents(build(SourceConfig, {"path": str(tmp_path / "out")})) == [good]
    with pytest.raises(UserError, match="exists already"):
        filter_source(build(FilterRun, values))
    other = {"output": tmp_path / "no", "source": {"path": str(source), "field": "ids"}}
    with pytest.raises(UserError, match=r"set source\.field"):
        filter_source(build(FilterRun, other))
    assert not (tmp_path / "no").exists()


def test_plain_text_is_filtered_too(tokenkit, tmp_path, corpus):
    output = tmp_path / "out"
    code, out, error = tokenkit("filter", f"output={output}", f"source={{path: {corpus}, separator: '\\n\\n'}}")
    assert code == 0, error
    assert parse_yaml(out)["documents"] == 40
    assert sum(parse_yaml(out)["rejected"].values()) > 0
