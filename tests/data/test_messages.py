"""Conversations as training rows: what is learnt, what is compared, how they are cut, what is refused."""

import json

import numpy as np
import pytest

from tokenkit.config import UserError
from tokenkit.data.batch import collate, reading_of
from tokenkit.data.corpus import DataConfig, read_training_rows
from tokenkit.data.example import Reading, cut, make_examples
from tokenkit.data.messages import read_dialogues
from tokenkit.data.source import SourceConfig
from tokenkit.tokenizers.hf import HFTokenizer

TURNS = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"""
ROWS = [
    {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on a mat"}]},
    {
        "messages": [
            {"role": "system", "content": "be small"},
            {"role": "user", "content": "and then"},
            {"role": "assistant", "content": "ran home <|im_end|> to see"},
            {"role": "user", "content": "who"},
            {"role": "assistant", "content": "green fish"},
        ]
    },
]


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return path


@pytest.fixture(scope="module")
def chatml(bpe) -> HFTokenizer:
    definition = bpe.definition
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for number, literal in enumerate(("<|im_start|>", "<|im_end|>")):
        definition["added_tokens"].append({"id": bpe.vocab_size + number, "content": literal, **flags})
    return HFTokenizer(definition, {**bpe.config, "chat_template": TURNS}, "chatml")


def test_answers_and_their_ends_are_learnt_and_nothing_else(chat_file, chatml, unigram):
    dialogues = read_dialogues(SourceConfig(path=str(chat_file)))
    examples = make_examples(dialogues, chatml, unigram)
    batch = collate(examples, [0, 1]).tensors
    for row, answers in ((0, ["sat on a mat"]), (1, ["ran home <|im_end|> to see", "green fish"])):
        labels = [i for i in batch["student_labels"][row].tolist() if i >= 0]
        ends = [chatml.special_tokens["<|im_end|>"], *chatml.encode("\n").ids.tolist()]
        wanted = [i for answer in answers for i in [*chatml.encode(answer).ids.tolist(), *ends]]
        assert labels == wanted
        assert examples[row].num_bytes == sum(len(answer.encode()) for answer in answers)
        chunked = batch["student_chunk"][row] >= 0
        assert not (chunked & ~batch["student_label_mask"][row]).any()  # what is compared is learnt
        assert examples[row].num_chunks == len(set(batch["student_chunk"][row][chunked].tolist()))
        assert (batch["teacher_chunk_end"][row, : examples[row].num_chunks] >= 0).all()


def test_special_tokens_mode_leaves_out_what_it_says(documents, chatml, bpe, unigram):
    rows = cut(documents[:3], 100_000)  # whole documents: begun and ended by special tokens
    counts = {}
    for mode in ("identity", "ignore_pad", "ignore"):
        (example, *_) = make_examples(rows, bpe, unigram, Reading(special_tokens=mode))
        counts[mode] = example.num_chunks
        assert example.student.chunk.max() == example.num_chunks - 1
    assert counts["identity"] == counts["ignore_pad"]  # nothing is padded yet, and pad is no other role
    assert counts["ignore"] == counts["identity"] - 2


def test_long_conversations_are_cut_at_the_same_byte(chat_file, chatml, unigram):
    dialogues = read_dialogues(SourceConfig(path=str(chat_file)))
    whole = make_examples(dialogues, chatml, unigram)[1]
    for longest in range(1, len(whole.teacher.ids) + 3):
        short = make_examples(dialogues, chatml, unigram, Reading(max_tokens=longest))[1]
        for part, full in ((short.student, whole.student), (short.teacher, whole.teacher)):
            assert len(part.ids) <= longest
            assert np.array_equal(part.ids, full.ids[: len(part.ids)])
        assert set(short.student.chunk) - {-1} == set(short.teacher.chunk) - {-1}


def test_chunks_of_words_and_of_little_bias(documents, bpe, unigram, tmp_path):
    source = SourceConfig(path="unused")
    words = reading_of(DataConfig(source=source, chunks="space"), bpe, unigram)
    rows = cut(["the catcatsat onamat, ranran home. seen beensat", documents[0]], 100)
    fine, coarse = (make_examples(rows, bpe, unigram, reading) for reading in (Reading(), words))
    assert all(b.num_chunks <= a.num_chunks for a, b in zip(fine, coarse))
    assert coarse[0].num_chunks == 1 + 6 + 1  # start, words, end
    assert fine[0].num_chunks > 8
    with pytest.raises(UserError, match="tokenizer-info"):
        reading_of(DataConfig(source=source, chunks="unbiased"), bpe, unigram)


@pytest.mark.parametrize(
    "line, said",
    [
        ("[]", "expected a JSON object"),
        ("{", "not JSON"),
        ('{"text": "a"}', "nothing under 'messages'"),
        ('{"messages": []}', "non-empty list"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of an assistant"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "tools": "x"}', "list of JSON schemas"),
    ],
)
def test_bad_rows_are_one_line_with_their_place(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n", "utf-8")
    with pytest.raises(UserError, match=said) as caught:
        read_training_rows(DataConfig(source=SourceConfig(path=str(path)), format="chat"))
    assert "line 1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_stands_before_a_marker_is_read_and_not_learnt(bpe, unigram):
    prompt, answer = "the cat sat on a mat ###: ", "green fish and ###: then ran home"
    documents = [prompt + answer, "no marker at all", "x" * 50 + "###: y"]
    learnt = ["", "", ""]
    for window in cut(documents, 30, "###: "):
        learnt[window.document] += window.text[window.learnt_from :]
    assert learnt == ["then ran home", "no marker at all", "y"]
    (example, *_) = make_examples(cut(documents, 1000, "###: "), bpe, unigram)
    batch = collate([example], [0]).tensors
    for side, tokenizer in (("student", bpe), ("teacher", unigram)):
        labels = [i for i in batch[f"{side}_labels"][0].tolist() if i >= 0]
        spelled = b"".join(tokenizer.token_bytes[i] for i in labels).decode()
        assert "then ran home".endswith(spelled.strip())
        assert len(spelled) >= len("ran home")
        assert labels[-1] == tokenizer.eos_id
    assert example.num_chunks == 1 + len(set(batch["student_chunk"][0].tolist()) - {-1})  # the start token is given
    chunked = batch["student_chunk"][0] >= 0
    assert not (chunked & ~batch["student_label_mask"][0]).any()
