"""Optimum's ORTModelForCausalLM opens the exported folder and generates the same greedy text."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

from export.onnx import MODEL_FILE, export_onnx
from export.onnx_clients import COMPAT, GENAI_MODEL, OPTIMUM
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.cli import main, parse
from fox_edge.quant import ONNX, find_recipe
from runtimes.base import SessionOptions, open_session
from tests.clients.helpers import Asked
from tests.helpers import make_checkpoint

QUESTIONS = (
    "Ivy buys 4 crates of 12 apples. She gives 9 apples to Julia. How many does she have left?",
    "Tom has 5 pens. He buys 7 more. How many pens does he have?",
)


def prompt_of(asked: Asked) -> Any:
    """The question through transformers' own reading of the folder's tokenizer files."""
    tokenizer = AutoTokenizer.from_pretrained(asked.folder)
    messages = [{"role": "user", "content": asked.question}]
    return tokenizer, tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


@pytest.mark.parametrize(
    "options", [{}, {"use_io_binding": True, "file_name": GENAI_MODEL}], ids=["", "bound"]
)
def test_same_greedy_text(asked: Asked, options: dict[str, Any]) -> None:
    """As it comes; and with IO binding (its default on a GPU), which needs one row of logits declared."""
    model = ORTModelForCausalLM.from_pretrained(asked.folder, **options)
    assert model.use_io_binding is bool(options)
    tokenizer, prompt = prompt_of(asked)
    assert prompt["input_ids"][0].tolist() == asked.prompt
    with torch.inference_mode():
        tokens = model.generate(**prompt, do_sample=False, max_new_tokens=200)[
            0, len(asked.prompt) :
        ].tolist()
    assert tokens[:-1] == asked.answer and tokens[-1] in model.generation_config.eos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == asked.text


def batch_of(folder: Path, questions: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """The answers to several questions at once, shorter prompts padded on the left; and their lengths."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False
        )
        for q in questions
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    model = ORTModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        tokens = model.generate(**batch, do_sample=False, max_new_tokens=120)
    answers = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers, batch["attention_mask"].sum(1).tolist()


def test_compat_lets_a_batch_be_padded(answers: dict[str, Asked], tmp_path: Path) -> None:
    """Two questions of different lengths at once; as it comes, the padded one is answered wrongly."""
    usual, recipe = answers["int8"].folder, find_recipe(ONNX, "int8")
    compatible = export_onnx(Checkpoint.open("nano"), tmp_path / "out", recipe, compat=[OPTIMUM])
    alone = [batch_of(usual, (question,))[0][0] for question in QUESTIONS]
    assert all("####" in answer for answer in alone)
    together, lengths = batch_of(compatible.path, QUESTIONS)
    assert lengths[0] != lengths[1]
    assert together == alone
    padded = lengths.index(min(lengths))
    assert batch_of(usual, QUESTIONS)[0][padded] != alone[padded]


def test_a_padded_batch_has_the_logits_of_its_rows(tmp_path: Path) -> None:
    """Prompt and step of a padded float32 batch, against the reference model row by row."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "in", dtype=torch.float32))
    artifact = export_onnx(checkpoint, tmp_path / "out", find_recipe(ONNX, "float32"), compat=[OPTIMUM])
    model = ORTModelForCausalLM.from_pretrained(artifact.path)
    rows = [[int(t) for t in np.random.default_rng(5).integers(10, 500, n)] for n in (20, 13)]
    ids = torch.tensor([rows[0], [0] * 7 + rows[1]])
    mask = torch.tensor([[1] * 20, [0] * 7 + [1] * 13])
    reference = checkpoint.load_model()
    with torch.inference_mode():
        prompt = model(input_ids=ids, attention_mask=mask, use_cache=True)
        step = model(
            input_ids=torch.tensor([[50], [60]]),
            attention_mask=torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1),
            past_key_values=prompt.past_key_values,
            use_cache=True,
        )
        for n, row in enumerate(rows):
            want = reference(torch.tensor([[*row, 50 + 10 * n]]))[0, -2:]
            found = torch.stack([prompt.logits[n, -1], step.logits[n, -1]])
            torch.testing.assert_close(found, want, atol=1e-4, rtol=0)


def test_compat_costs_no_bytes_and_changes_no_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes, logits = [], []
    for extra in ([], ["--compat", OPTIMUM]):
        out = tmp_path / f"out{len(extra)}"
        command = ["export", "nano", str(out), "--format", "onnx", "--quant", "int8", "--json", *extra]
        assert main(command) == 0
        notes = json.loads(capsys.readouterr().out)["notes"]
        assert notes == ([f"made with --compat optimum: {COMPAT[OPTIMUM]}"] if extra else [])
        sizes.append((out / "model.onnx_data").stat().st_size)
        for kv in ("float32", "int8"):
            options = SessionOptions(threads=1, kv=kv)
            with contextlib.closing(open_session(Artifact.open(out), options)) as session:
                logits.append(session.prefill([2, 100, 200, 300, 400]))
        graph = onnx.load(out / MODEL_FILE, load_external_data=False).graph
        assert sum(node.op_type == "GroupQueryAttention" for node in graph.node) == 8
    assert sizes[0] == sizes[1]
    np.testing.assert_allclose(logits[2:], logits[:2], atol=1e-4)


def test_compat_names_the_clients_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", "nano", "out", "--format", "onnx"]
    for client in COMPAT:
        assert parse([*command, "--compat", client]).compat == [client]
    assert main(["export", "nano", "out", "--format", "gguf", "--compat", OPTIMUM]) == 2
    assert "is for --format onnx, not gguf" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        main([*command, "--compat", "excel"])
    assert error.value.code == 2
