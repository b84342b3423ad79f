"""With no share it is the run without; with one, what follows the prompts is what the student would say, seeded."""

import copy
import shutil

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError, build
from tokenkit.data.batch import Batches
from tokenkit.data.example import Reading, cut, make_examples
from tokenkit.data.messages import Dialogue
from tokenkit.models.load import load_model
from tokenkit.models.sample import SamplingConfig, drawing_of, sample, sequence_key
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.folder import RunFolder
from tokenkit.train.loop import Interrupted
from tokenkit.train.loop import train as train_loop
from tokenkit.train.on_policy import STREAM, OnPolicyBatches, OnPolicyConfig, continued, prompt_length
from tokenkit.train.optimizer import build_optimizer
from tokenkit.train.schema import OptimizerConfig, TrainConfig
from tokenkit.train.step import accumulate_gradients
from tokenkit.train.tasks.distill import TextTask

TURNS = """{%- for m in messages %}{{ '<|endoftext|>' + m.role + ' ' + m.content + '<|endoftext|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|endoftext|>assistant ' }}{% endif %}"""


@pytest.fixture
def student(model_folder):
    return ModelView(load_model(str(model_folder)))


def batches_of(documents, tokenizer, **options) -> Batches:
    windows = cut(documents, 60)
    return Batches(windows, tokenizer, tokenizer, **{"batch_size": 6, "seed": 3, **options})


def on_policy(batches, student, teacher=None, **keys) -> OnPolicyBatches:
    config = build(OnPolicyConfig, {"share": 1.0, "prompt_tokens": 4, **keys})
    return OnPolicyBatches(batches, config, student, teacher)


def same(a, b) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_no_share_is_the_run_without_bit_for_bit(documents, bpe, student):
    plain = batches_of(documents, bpe)
    mixed = on_policy(plain, student, share=0)
    for step in range(4):
        for one, other in zip(mixed.at(step, 2), plain.at(step, 2), strict=True):
            assert same(one.tensors, other.tensors)
            assert (one.rows, one.num_bytes, one.num_tokens) == (other.rows, other.num_bytes, other.num_tokens)
    assert mixed.place(2) == plain.place(2)
    assert mixed.state() == {}


def test_the_rows_of_a_share(documents, bpe, student):
    plain = batches_of(documents, bpe, batch_size=8)
    changed = {}
    for share in (0.3, 0.7, 1.0):
        mixed = on_policy(plain, student, share=share, max_new_tokens=4)
        changed[share] = set()
        for step in range(4):
            one, other = mixed.at(step)[0].tensors["student_labels"], plain.at(step)[0].tensors["student_labels"]
            width = max(one.shape[1], other.shape[1])
            one, other = (torch.nn.functional.pad(t, (0, width - t.shape[1]), value=-1) for t in (one, other))
            changed[share] |= {(step, row) for row in (one != other).any(1).nonzero().flatten().tolist()}
    assert changed[0.3] < changed[0.7] < changed[1.0]
    assert len(changed[0.3]) / 32 == pytest.approx(0.3, abs=0.2)
    assert len(changed[1.0]) > 28  # a window may be all prompt


def test_what_follows_is_what_the_student_says_in_evaluation_mode(documents, bpe, student):
    plain = batches_of(documents, bpe)
    mixed = on_policy(plain, student, temperature=0.8)
    student.model.train()  # it has dropout
    before = torch.get_rng_state()
    batch = mixed.at(2)[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert student.model.training
    student.model.eval()
    drawing = next(iter(mixed._drawings.values()))
    for place, number in enumerate(plain.rows(2)):
        example = make_examples([plain.windows[number]], bpe, bpe)[0]
        room = len(example.student.ids) - 5
        prompt = example.student.ids[:5].tolist()
        key = sequence_key(3, 2 * 6 + place, STREAM)
        drawn = sample(student.model, [prompt], drawing, [key], limits=[room])[0].ids
        row = [*prompt, *drawn]
        assert batch.tensors["student_inputs"][place, : len(row)].tolist() == row
        assert batch.tensors["student_labels"][place, : len(row) - 1].tolist() == row[1:]
        assert not batch.tensors["student_label_mask"][place, len(row) - 1 :].any()
    for name in ("inputs", "labels", "token_mask", "chunk", "chunk_end"):
        assert torch.equal(batch.tensors[f"student_{name}"], batch.tensors[f"teacher_{name}"])


def test_the_step_is_the_same_however_it_is_cut_and_again(documents, bpe, student):
    mixed = on_policy(batches_of(documents, bpe), student, share=0.5, batch_size=2)
    whole = mixed.at(1)[0].tensors["student_inputs"]
    parts = mixed.at(1, 3)
    rows = torch.cat(
        [torch.nn.functional.pad(p.tensors["student_inputs"], (0, 64))[:, : whole.shape[1]] for p in parts]
    )
    assert torch.equal(rows, whole)
    again = on_policy(batches_of(documents, bpe), student, share=0.5, batch_size=5)
    assert same(again.at(1)[0].tensors, mixed.at(1)[0].tensors)
    assert not torch.equal(mixed.at(2)[0].tensors["student_inputs"][:, :8], whole[:, :8])
    with torch.no_grad():
        student.model.lm_head.weight.mul_(-1)
    assert not same(again.at(1)[0].tensors, on_policy(batches_of(documents, bpe), student, share=0).at(1)[0].tensors)


@pytest.mark.parametrize("special", ["identity", "ignore"])
@pytest.mark.parametrize("spaces", [False, True])
def test_going_on_as_it_was_changes_nothing(documents, bpe, special, spaces):
    begins = np.array([spelled[:1] == b" " for spelled in bpe.token_bytes])
    reading = Reading(special_tokens=special, spaces=(begins, begins) if spaces else None)
    for row in [*cut(documents[:3], 60), *cut(["a. Q: the cat sat"], 60, "Q: ")]:
        example = make_examples([row], bpe, bpe, reading)[0]
        for more in (0, 3, 7):
            length = prompt_length(example, more)
            found = continued(example, length, example.student.ids[length:].tolist(), bpe, reading)
            for side in (found.student, found.teacher):
                assert np.array_equal(side.ids, example.student.ids)
                assert np.array_equal(side.trained, example.student.trained)
                assert np.array_equal(side.chunk, example.student.chunk)
            assert (found.num_chunks, found.num_bytes) == (example.num_chunks, example.num_bytes)
            assert np.array_equal(found.space_after, example.space_after) or not spaces


def test_a_prompt_goes_up_to_what_is_learnt(bpe):
    marked = make_examples(cut(["a. Q: the cat sat on a mat"], 60, "Q: "), bpe, None)[0]
    stays = len(bpe.encode("a. Q:")) + 1  # the space is in the token that follows
    assert prompt_length(marked, 0) in (stays, stays + 1)
    assert prompt_length(marked, 2) == prompt_length(marked, 0) + 2
    assert prompt_length(make_examples(cut(["the cat sat"], 60), bpe, None)[0], 2) == 3


def test_a_conversation_goes_on_after_its_last_question(tmp_path, model_folder, student):
    folder = tmp_path / "chat"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(TURNS, "utf-8")
    tokenizer = load_tokenizer(str(folder))
    turns = [("user", "the cat"), ("assistant", "sat on"), ("user", "and then"), ("assistant", "ran home to see who")]
    rows = [Dialogue(0, [{"role": role, "content": text} for role, text in turns])]
    mixed = on_policy(Batches(rows, tokenizer, tokenizer, batch_size=1, seed=0), student)
    plain = make_examples(rows, tokenizer, tokenizer)[0].student
    batch = mixed.at(0)[0]
    ids = batch.tensors["student_inputs"][0]
    begin = prompt_length(make_examples(rows, tokenizer, None)[0], 0)
    assert tokenizer.decode(plain.ids[begin:].tolist()).strip() == "ran home to see who"
    assert tokenizer.decode(plain.ids[:begin].tolist()).strip().endswith("assistant")
    assert ids[:begin].tolist() == plain.ids[:begin].tolist()
    assert ids[begin : len(plain.ids)].tolist() != plain.ids[begin:].tolist()
    learnt = batch.tensors["student_label_mask"][0]
    assert learnt[: begin - 1].tolist() == plain.trained[1:begin].tolist()
    assert learnt[begin - 1]


def test_the_teacher_writes(documents, bpe, student, model_folder):
    other = load_model(str(model_folder))
    with torch.no_grad():
        other.lm_head.weight.mul_(-3)
    plain = batches_of(documents, bpe)
    by_teacher = on_policy(plain, student, ModelView(other), who="teacher").at(0)[0].tensors
    as_student = on_policy(plain, ModelView(other)).at(0)[0].tensors
    assert same(by_teacher, as_student)
    assert not same(by_teacher, on_policy(plain, student).at(0)[0].tensors)


def test_what_is_refused(documents, bpe, unigram, student):
    plain = batches_of(documents, bpe)
    with pytest.raises(UserError, match="read other ids; leave target_tokenizer out"):
        on_policy(Batches(cut(documents, 60), bpe, unigram, batch_size=2, seed=0), student)
    with pytest.raises(UserError, match="write unconstrained"):
        on_policy(batches_of(documents, bpe, reading=Reading(mode=lambda *rest: rest[-1])), student)
    shared = ModelView(student.model, tables={"head": student.head()}, adapters=False)
    for teacher in (None, shared):
        with pytest.raises(UserError, match="write teacher="):
            on_policy(plain, student, teacher, who="teacher")
    with pytest.raises(UserError, match=r"on_policy\.max_new_tokens: missing"):
        on_policy(plain, student, temperature={"kind": "linear", "start": 2, "end": 1})
    on_policy(plain, student, temperature={"kind": "linear", "start": 2, "end": 1}, max_new_tokens=5).at(0)


def divergence(teacher, student, rows) -> float:
    """Mean KL(teacher ‖ student) at the positions of what the student itself writes."""
    with torch.no_grad():
        p, q = (model(rows).logits.double().log_softmax(-1) for model in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
def test_the_divergence_from_the_teacher_falls_where_the_student_stands(documents, bpe):
    def made(seed, layers):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": layers}
        config = LlamaConfig(vocab_size=bpe.vocab_size, bos_token_id=bpe.bos_id, eos_token_id=bpe.eos_id, **sizes)
        return LlamaForCausalLM(config)

    def train(model, losses, teacher=None, steps=60, share=0.0):
        view = ModelView(model)
        plain = batches_of(documents, bpe, batch_size=8)
        mixed = on_policy(plain, view, share=share)
        objective = Objective.of(LossesConfig.model_validate(losses))
        task = TextTask(objective, view, bpe, None if teacher is None else ModelView(teacher), bpe)
        optimizer = build_optimizer(task.trainable(), OptimizerConfig(learning_rate=3e-3))
        for step in range(steps):
            model.train()
            optimizer.zero_grad()
            accumulate_gradients(task, mixed.at(step), step)
            optimizer.step()
        return model.eval()

    teacher = train(made(0, 2), {"clm": {}}, steps=100)
    student = made(1, 1)
    begun = copy.deepcopy(student)
    train(student, {"forward_kl": {}}, teacher, share=1.0)
    before, after = (divergence(teacher, model, own_rows(model, bpe)) for model in (begun, student))
    assert after < before / 2


def own_rows(model, tokenizer) -> torch.Tensor:
    drawing = drawing_of(SamplingConfig(max_new_tokens=24, end_of_text="forbid"), tokenizer, tokenizer.vocab_size)
    start = [tokenizer.start_id()]
    found = sample(model, [start] * 32, drawing, [sequence_key(9, n) for n in range(32)], batch_size=32)
    return torch.tensor([[*start, *row.ids] for row in found])


def test_a_resumed_run_draws_the_same(tmp_path, documents, bpe, model_folder):
    def run(folder, **train):
        torch.manual_seed(11)  # whatever was drawn before
        student, teacher = (ModelView(load_model(str(model_folder))) for _ in range(2))
        task = TextTask(Objective.of(LossesConfig.model_validate({"forward_kl": {}})), student, bpe, teacher, bpe)
        with torch.no_grad():
            student.model.lm_head.weight.mul_(0.5)
        batches = on_policy(batches_of(documents, bpe), student, share=0.5)
        values = {"steps": 5, "batch_size": 6, "save_every": 2, "log_every": 1, "accumulation": 2, **train}
        config = build(TrainConfig, {**values, "optimizer": {"learning_rate": 1e-2}})
        made = RunFolder(tmp_path / folder)
        made.path.mkdir(exist_ok=True)
        train_loop(task, batches, config, made, dict, quiet=True)
        return student.model.state_dict(), made.logged("loss")

    whole, losses = run("whole")
    with pytest.raises(Interrupted):
        run("cut", stop_after=2)
    resumed, again = run("cut")
    assert same(whole, resumed)
    assert losses == again
    assert len(set(losses.values())) == 5
