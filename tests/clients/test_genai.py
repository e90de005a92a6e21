"""onnxruntime-genai opens the exported folder and gives the same greedy text, with its own tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime_genai as genai
import pytest
import torch

from export.onnx import DATA_FILE, MODEL_FILE, export_onnx
from export.onnx_clients import COMPAT, GENAI_CONFIG, GENAI_MODEL, genai_config
from fox_edge.artifact import Artifact
from fox_edge.chat_template import FOX_TEMPLATE
from fox_edge.checkpoint import Checkpoint
from fox_edge.config import FoxConfig, read_json_object
from fox_edge.quant import ONNX, find_recipe
from fox_edge.tokenizer import Tokenizer
from tests.clients.helpers import Asked
from tests.helpers import make_checkpoint


def chat_ids(tokenizer: Any, question: str) -> list[int]:
    messages = json.dumps([{"role": "user", "content": question}])
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return [int(id) for id in tokenizer.encode(text)]


def generate(model: Any, prompt: list[int], **options: Any) -> list[int]:
    """Its own generator with the folder's own search settings, and what a caller says."""
    params = genai.GeneratorParams(model)
    params.set_search_options(**options)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompt)
    tokens: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


def test_same_greedy_text(asked: Asked) -> None:
    model = genai.Model(str(asked.folder))
    tokenizer = genai.Tokenizer(model)
    assert chat_ids(tokenizer, asked.question) == asked.prompt
    tokens = generate(model, asked.prompt, max_length=400)
    stops = Tokenizer.from_folder(asked.folder).stop_ids
    assert tokens[:-1] == asked.answer and tokens[-1] in stops
    assert tokenizer.decode(asked.answer) == asked.text


def test_a_conversation_goes_on_in_the_same_cache(asked: Asked) -> None:
    """Two appends, the second behind a cache in use, are one prompt."""
    model = genai.Model(str(asked.folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=400)
    generator = genai.Generator(model, params)
    generator.append_tokens(asked.prompt[:10])
    generator.append_tokens(asked.prompt[10:])
    for token in asked.answer[:20]:
        generator.generate_next_token()
        assert int(generator.get_next_tokens()[0]) == token


def test_an_export_for_padded_batches_opens_too(answers: dict[str, Asked], tmp_path: Path) -> None:
    quant = find_recipe(ONNX, "int8")
    other = export_onnx(Checkpoint.open("nano"), tmp_path / "out", quant, compat=list(COMPAT))
    tokens = [
        generate(genai.Model(str(path)), [2, 4, 474, 343], max_length=40)
        for path in (answers["int8"].folder, other.path)
    ]
    assert tokens[0] == tokens[1] and len(tokens[0]) > 10


def test_the_cache_is_no_longer_than_a_conversation_needs(exported: Artifact) -> None:
    """nano's whole context; of Fox-1's 8,192 positions a quarter, unless the caller asks for more."""
    told = read_json_object(exported.path / GENAI_CONFIG)
    assert told["model"]["context_length"] == told["search"]["max_length"] == 1024
    fox = dataclasses.replace(FoxConfig.read(exported.path / "config.json"), max_positions=8192)
    told = genai_config(fox, Tokenizer.from_folder(exported.path))
    assert (told["model"]["context_length"], told["search"]["max_length"]) == (8192, 2048)


def test_special_ids_are_the_tokenizers(asked: Asked) -> None:
    tokenizer = Tokenizer.from_folder(asked.folder)
    told = read_json_object(asked.folder / GENAI_CONFIG)["model"]
    assert (told["bos_token_id"], told["pad_token_id"]) == (tokenizer.bos_id, tokenizer.pad_id)
    assert told["eos_token_id"][0] == tokenizer.eos_id and set(told["eos_token_id"]) == tokenizer.stop_ids
    theirs = genai.Tokenizer(genai.Model(str(asked.folder)))
    assert (theirs.bos_token_id, theirs.pad_token_id) == (tokenizer.bos_id, tokenizer.pad_id)
    assert set(theirs.eos_token_ids) == tokenizer.stop_ids


def test_its_graph_reads_the_models_bytes_and_adds_none(asked: Asked) -> None:
    ours, theirs = (
        onnx.load(asked.folder / name, load_external_data=False).graph for name in (MODEL_FILE, GENAI_MODEL)
    )
    assert list(theirs.initializer) == list(ours.initializer) and list(theirs.node) == list(ours.node)
    external = {
        entry.value
        for tensor in theirs.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert external == {DATA_FILE}
    assert (asked.folder / GENAI_MODEL).stat().st_size < 100_000


def test_foxs_own_chat_format_where_a_checkpoint_has_none(tmp_path: Path) -> None:
    """Without a template of its own (the published base model), the folder still says Fox's."""
    nano = Checkpoint.open("nano").path
    source = tmp_path / "in"
    source.mkdir()
    for path in nano.iterdir():
        if path.suffix in (".json", ".model", ".safetensors"):
            (source / path.name).symlink_to(path)
    settings = read_json_object(nano / "tokenizer_config.json")
    del settings["chat_template"]
    (source / "tokenizer_config.json").unlink()
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    artifact = export_onnx(Checkpoint.open(source), tmp_path / "out", find_recipe(ONNX, "int8"))
    tokenizer = Tokenizer.from_folder(artifact.path)
    assert tokenizer.chat_template == FOX_TEMPLATE
    theirs = genai.Tokenizer(genai.Model(str(artifact.path)))
    message = {"role": "user", "content": "How many foxes?"}
    text = theirs.apply_chat_template(json.dumps([message]), add_generation_prompt=True)
    assert text == tokenizer.render_chat([message])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_shapes_other_than_nanos(tied: bool, tmp_path: Path) -> None:
    """Another number of heads, a head of its own: the model opens and runs from token ids."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "in", tied=tied, gemma=tied))
    artifact = export_onnx(checkpoint, tmp_path / "out", find_recipe(ONNX, "float32"))
    assert any("no tokenizer.json" in note for note in artifact.manifest.notes)
    model = genai.Model(str(artifact.path))
    prompt = [1, 20, 30, 40]
    tokens = generate(model, prompt, max_length=12)
    reference = checkpoint.load_model()
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + tokens]))[0]
    assert tokens == [int(row.argmax()) for row in logits[len(prompt) - 1 : -1]]
