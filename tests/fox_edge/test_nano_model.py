"""The embedded model: tokenizer in both formats, special ids, chat template, sizes; and its training loop."""

import json
from pathlib import Path

import jinja2.sandbox
import numpy as np
import pytest
import sentencepiece as spm
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

import fox_edge.nano
from fox_edge.config import FoxConfig
from fox_edge.nano import data
from fox_edge.nano.evaluate import accuracy, load, perplexity
from fox_edge.nano.plan import Plan, Stage
from fox_edge.nano.problems import generate, held_out
from fox_edge.nano.train import Trainer, export_weights, read_positions, stage_data

NANO = Path(fox_edge.nano.__file__).parent
TEXTS = [
    "",
    " ",
    "   leading and   inner spaces  ",
    "\n\nlines\n\n\n of text\n",
    "12345 + 67.89 = ￥0",
    "🦊 emoji 👩‍👩‍👧 and é́ accents",
    "数学の問題 한국어 中文",
    "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "She has 3+4=<<3+4=7>>7 apples.\n#### 7",
    " " * 40 + "x" + "\n" * 40 + "\ttab\r\n",
    "aaaaaaaaa====<<<<>>>>",
]


@pytest.fixture(scope="module")
def processor():
    return spm.SentencePieceProcessor(model_file=str(NANO / "tokenizer.model"))


@pytest.fixture(scope="module")
def fast():
    return Tokenizer.from_file(str(NANO / "tokenizer.json"))


def test_special_ids_are_gemmas(processor):
    assert processor.vocab_size() == 8192 == FoxConfig.nano().vocab_size
    ids = [processor.piece_to_id(piece) for piece in ("<pad>", "<eos>", "<bos>", "<unk>")]
    assert ids == [0, 1, 2, 3]
    turn = processor.piece_to_id("<end_of_turn>")
    config = json.loads((NANO / "config.json").read_text())
    generation = json.loads((NANO / "generation_config.json").read_text())
    assert FoxConfig.from_hf(config) == FoxConfig.nano()
    for fields in (config, generation):
        assert (fields["bos_token_id"], fields["pad_token_id"]) == (2, 0)
    assert config["eos_token_id"] == 1 and generation["eos_token_id"] == [1, turn]


def test_digits_are_split_and_bytes_fall_back(processor):
    assert processor.encode("2026", out_type=str) == ["2", "0", "2", "6"]
    assert processor.encode("🦊", out_type=str) == ["<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>"]


@pytest.mark.parametrize("text", TEXTS)
def test_both_tokenizer_formats_agree(text, processor, fast):
    ids = processor.encode(text)
    assert fast.encode(text, add_special_tokens=False).ids == ids
    assert fast.decode(ids, skip_special_tokens=False) == text == processor.decode(ids)


def test_both_tokenizer_formats_agree_on_problems(processor, fast):
    for problem in generate(21, 300, drills=True):
        text = data.plain_text((problem.question, problem.answer))
        assert fast.encode(text, add_special_tokens=False).ids == processor.encode(text)


def test_turns_are_special_and_bos_is_added(fast, processor):
    tokens = {t["content"]: t for t in json.loads((NANO / "tokenizer.json").read_text())["added_tokens"]}
    assert all(tokens[piece]["special"] for piece in ("<pad>", "<bos>", "<start_of_turn>", "<end_of_turn>"))
    assert not tokens["\n"]["special"]
    assert fast.encode("a").ids == [2, *processor.encode("a")]


def _render(messages, **options):
    config = json.loads((NANO / "tokenizer_config.json").read_text())

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    # As transformers compiles it.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(config["chat_template"]).render(
        messages=messages, bos_token=config["bos_token"], **options
    )


def test_chat_template():
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": " hi "},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "again"},
    ]
    assert _render(messages, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nBe short.\n\nhi<end_of_turn>\n"
        "<start_of_turn>model\nhello<end_of_turn>\n"
        "<start_of_turn>user\nagain<end_of_turn>\n<start_of_turn>model\n"
    )
    assert _render(messages[1:2]) == "<bos><start_of_turn>user\nhi<end_of_turn>\n"
    with pytest.raises(jinja2.TemplateError, match="alternate"):
        _render(messages[2:])


def test_training_and_the_chat_template_write_the_same_tokens(fast, processor):
    prompt, reply = data.dialogue(processor, ("What is 2+2?", "2+2=<<2+2=4>>4\n#### 4"))
    messages = [{"role": "user", "content": "What is 2+2?"}]
    text = _render(messages, add_generation_prompt=True)
    assert fast.encode(text, add_special_tokens=False).ids == prompt
    assert reply[-2:] == [processor.piece_to_id("<end_of_turn>"), processor.piece_to_id("\n")]


def test_weights_are_one_small_bf16_file_without_a_head():
    path = NANO / "model.safetensors"
    assert path.stat().st_size <= 14_000_000
    with safe_open(path, "pt") as weights:
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        assert {weights.get_slice(name).get_dtype() for name in shapes} == {"BF16"}
    assert shapes == FoxConfig.nano().tensor_shapes()


def test_the_model_answers():
    """A taste of the card's figure: 24 of the 200 held-out problems, well under what the card says."""
    torch.set_num_threads(2)
    model, processor = load(NANO)
    assert accuracy(model, processor, held_out(24)) >= 50
    documents = data.pairs(held_out(5))
    assert 1 < perplexity(model, processor, documents)["perplexity"] < 12


def test_training_is_finished_as_planned():
    log = json.loads((NANO / "training.json").read_text())
    assert log["tokens"] == Plan().tokens == sum(stage["tokens"] for stage in log["stages"])
    assert [stage["name"] for stage in log["stages"]] == [stage.name for stage in Plan().stages]
    card = (NANO / "README.md").read_text(encoding="utf-8")
    assert f"{FoxConfig.nano().num_parameters():,}" in card
    for stage in log["stages"]:
        assert f"| {stage['tokens']:,} | {stage['loss_nats']} |" in card


TINY = FoxConfig(8192, 32, 64, 1, 2, 1, 16, 1024)


def test_stages_hold_whole_documents_and_only_replies_are_targets(processor):
    books = [(f"Book {n}?", f"It is {n}.\n#### {n}") for n in range(5)]
    inputs, targets = data.stage_batches(Stage("s", 64, 256, 3, 0.2, sheets_share=0.2), processor, books, 7)
    assert inputs.shape == targets.shape == (12, 64)
    assert inputs[0, 0] == 2 and (inputs.reshape(-1)[1:] == targets.reshape(-1)[:-1]).all()
    longer, _ = data.stage_batches(Stage("s", 64, 256, 4, 0.2, sheets_share=0.2), processor, books, 7)
    assert (longer[:12] == inputs).all()

    inputs, targets = data.stage_batches(Stage("c", 256, 512, 2, 0.2, chat=True), processor, books, 7)
    assert (inputs[:, 0] == 2).all()
    read = targets != data.IGNORE
    assert (targets[read] == np.roll(inputs, -1, axis=1)[read]).mean() > 0.99
    turn = processor.piece_to_id("<end_of_turn>")
    assert (targets == turn).sum() == (inputs == 2).sum()


def test_read_positions():
    positions, values = read_positions(np.array([[-100, 5], [7, -100]], dtype=np.int32), 3)
    assert positions.tolist() == [1, 2, 0] and values.tolist() == [5, 7, data.IGNORE]


def test_the_training_loop_learns_resumes_and_exports(tmp_path, processor):
    stage = Stage("s", 64, 512, 30, 0.0)
    plan = Plan(stages=(stage,), peak_lr=1e-2, warmup_steps=5, micro_batch_tokens=256)
    np.save(tmp_path / "stage-0.npy", np.stack(data.stage_batches(stage, processor, [], 3)))
    arrays, capacity = stage_data(tmp_path, 0, stage, plan, workers=1)

    def train(trainer, steps):
        rows = ((n * stage.rows, (n + 1) * stage.rows) for n in steps)
        return [trainer.step(arrays[0, a:b], arrays[1, a:b], capacity) for a, b in rows]

    trainer = Trainer(TINY, plan, seed=0, compiled=False)
    losses = train(trainer, range(15))
    trainer.save(tmp_path / "checkpoint.pt")
    losses += train(trainer, range(15, 30))
    assert losses[0] > 8.9 and losses[-1] < 6

    resumed = Trainer(TINY, plan, seed=1, compiled=False)
    resumed.load(tmp_path / "checkpoint.pt")
    assert resumed.progress.step == 15
    assert train(resumed, range(15, 30)) == pytest.approx(losses[15:], abs=2e-3)

    export_weights(trainer.model, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert {k: tuple(weights.get_tensor(k).shape) for k in weights.keys()} == TINY.tensor_shapes()  # noqa: SIM118


def test_learning_rate_warms_up_stays_and_decays():
    plan = Plan()
    assert plan.learning_rate(0, 0) == pytest.approx(plan.peak_lr / plan.warmup_steps)
    assert plan.learning_rate(plan.warmup_steps, plan.tokens // 2) == plan.peak_lr
    near_end = plan.learning_rate(9999, int(plan.tokens * (1 - plan.decay_share / 2)))
    assert near_end == pytest.approx(plan.peak_lr / 2, rel=1e-3)
    assert plan.learning_rate(9999, plan.tokens) == pytest.approx(plan.peak_lr * plan.final_lr_share)
