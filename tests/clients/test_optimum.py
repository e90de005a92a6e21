"""Optimum's ORTModelForCausalLM opens the exported folder and generates the same greedy text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

from export.onnx_clients import GENAI_MODEL
from tests.clients.helpers import Asked


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
