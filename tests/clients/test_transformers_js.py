"""transformers.js under Node opens the exported folder and gives the same greedy text."""

from __future__ import annotations

from fox_edge.tokenizer import Tokenizer
from tests.clients.helpers import HERE, Asked, need_node, run_node


def test_same_greedy_text(asked: Asked) -> None:
    seen = run_node(need_node(HERE), "transformers_js.mjs", asked.folder, asked.question)
    assert seen["prompt"] == asked.prompt
    assert seen["answer"][:-1] == asked.answer
    assert seen["answer"][-1] in Tokenizer.from_folder(asked.folder).stop_ids
    assert seen["text"] == asked.text
