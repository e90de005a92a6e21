"""The page opens an exported folder in Chromium and gives the same greedy text, asking nobody else."""

from __future__ import annotations

import dataclasses
import http.client
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from export.gguf import export_gguf
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ArtifactError, FoxEdgeError
from fox_edge.quant import GGUF, find_recipe
from fox_edge.tokenizer import Tokenizer
from runtimes.browser import server
from runtimes.browser.server import HERE as PAGE
from runtimes.browser.server import PAGE_FILES, VENDORED, serve
from tests.clients.conftest import ask_our_own
from tests.clients.helpers import HERE, Asked, need, need_chromium, need_node, run_node


@contextmanager
def serving(artifact: Artifact | None) -> Iterator[str]:
    """The page, and a folder to open, on a free port, as long as the context lasts; gives host:port."""
    running = serve(artifact)
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


@pytest.fixture(scope="module")
def gguf_asked(
    tmp_path_factory: pytest.TempPathFactory, nano: Checkpoint, nano_gguf: Artifact
) -> dict[str, Asked]:
    """The embedded model in GGUF, and llama.cpp's own greedy answer."""
    q4_0 = export_gguf(nano, tmp_path_factory.mktemp("gguf") / "q4_0", find_recipe(GGUF, "q4_0"))
    return {"int8": ask_our_own(nano_gguf), "q4_0": ask_our_own(q4_0)}


@pytest.fixture
def vendored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A page whose packages are empty files: enough for what only the server does."""
    page = tmp_path / "page"
    (page / "vendor").mkdir(parents=True)
    for name in PAGE_FILES:
        shutil.copy(PAGE / name, page / name)
    for name in VENDORED:
        (page / "vendor" / name).touch()
    monkeypatch.setattr(server, "HERE", page)


Get = Callable[..., tuple[int, dict[str, str], bytes]]


@pytest.fixture
def get(vendored: None, exported: Artifact) -> Iterator[Get]:
    with serving(exported) as host:

        def answer(
            path: str, method: str = "GET", headers: Mapping[str, str] | None = None
        ) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(host, timeout=10)
            connection.request(method, path, headers=headers or {})  # sends the path as it is, dots and all
            response = connection.getresponse()
            result = response.status, dict(response.getheaders()), response.read()
            connection.close()
            return result

        yield answer


def test_same_greedy_text(asked: Asked) -> None:
    node, chromium = need_node(HERE), need_chromium()
    need("node", (PAGE / "vendor" / VENDORED[0]).is_file(), "`make clients` was not run")
    with serving(Artifact.open(asked.folder)) as host:
        seen = run_node(node, "browser.mjs", chromium, f"http://{host}/")
    assert seen["state"] == "ready", seen
    assert seen["question"] == asked.question
    first, again, more = seen["answers"]
    assert (first["text"], first["ids"]) == (asked.text, asked.answer)
    assert (again["text"], again["ids"]) == (asked.text, asked.answer)
    # The second time all of the prompt but its last token is still in the cache.
    assert first["figures"].startswith(f"{len(asked.prompt)} tokens read ·")
    assert f"({len(asked.prompt) - 1} of them kept from before)" in again["figures"]
    # A second question in the same chat reads only what is new: question and answer are known.
    kept = re.search(r"\((\d+) of them kept from before\)", more["figures"])
    assert kept and int(kept[1]) == len(asked.prompt) + len(asked.answer)
    assert seen["turns"] == 4 and len(more["ids"]) > 1
    assert re.search(r"first token after \d.* · \d+ tokens written at [\d.]+ tokens/s", first["figures"])
    size = sum((asked.folder / name).stat().st_size for name in ("model.onnx", "model.onnx_data"))
    assert seen["facts"]["size"] == f"{size / 1e6:.1f} MB"
    assert seen["facts"]["model"] == f"nano, ONNX {Artifact.open(asked.folder).manifest.quant}"
    assert seen["isolated"] and "thread" in seen["facts"]["device"]
    assert seen["complaints"] == []
    assert {url.split("/")[2] for url in seen["requests"]} == {host}


def test_the_page_says_what_went_wrong(exported: Artifact, tmp_path: Path) -> None:
    """Weights cut short while the folder was being served: a sentence on the page, and no question taken."""
    node, chromium = need_node(HERE), need_chromium()
    folder = tmp_path / "cut"
    shutil.copytree(exported.path, folder)
    with serving(Artifact.open(folder)) as host:
        with (folder / "model.onnx_data").open("r+b") as file:
            file.truncate(1000)
        seen = run_node(node, "browser.mjs", chromium, f"http://{host}/")
    assert seen["state"] == "failed" and len(seen["failed"]) > 10, seen


def test_what_is_dropped_is_opened_or_refused_in_a_sentence(
    gguf_asked: dict[str, Asked], answers: dict[str, Asked], tmp_path: Path
) -> None:
    """By mouse and keyboard, wide and narrow, light and dark; and in browsers that lack something."""
    node, chromium = need_node(HERE), need_chromium()
    need("node", (PAGE / "vendor" / VENDORED[-1]).is_file(), "`make clients` was not run")
    int8, q4_0 = (Artifact.open(gguf_asked[quant].folder).model_path for quant in ("int8", "q4_0"))
    asked = answers["int4"]
    long = " ".join([asked.question] * 12)
    (tmp_path / "notes.txt").write_text("Hello, this is no model.")
    (tmp_path / "cut.gguf").write_bytes(int8.read_bytes()[:2_000_000])
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.txt").write_text("x")
    given = {
        "text": tmp_path / "notes.txt",
        "cut": tmp_path / "cut.gguf",
        "empty": tmp_path / "pictures",
        "gguf": int8,
        "other": q4_0,
        "onnx": asked.folder,
        "question": asked.question,
        "long": long,
    }
    with serving(None) as host:
        url = f"http://{host}/"
        seen = run_node(node, "drop.mjs", chromium, url, json.dumps({k: str(v) for k, v in given.items()}))

    assert seen["empty"]["state"] == "empty" and set(seen["empty"]["facts"].values()) == {"–"}
    assert seen["buttons"][1:4] == ["Open a model", "Choose a GGUF file", "Choose an ONNX folder"]
    size = int8.stat().st_size
    browser = "A current Chrome, Edge, Firefox or Safari has it"
    refused = {
        "text": "notes.txt is not a model: a GGUF file begins with the letters GGUF, and this one does not",
        "cut": f"cut.gguf is cut short: it has 2,000,000 bytes, but its tensors end at {size:,} bytes",
        "noModel": "pictures is not a model: it has neither a .gguf file nor model.onnx",
        "webAssembly": "This browser has no WebAssembly, which is what models run in here. "
        f"{browser}, unless it was switched off.",
        "simd": "This browser's WebAssembly has no SIMD instructions, without which no model runs here. "
        f"{browser}.",
        "worker": f"This browser has no workers to run a model in. {browser}.",
    }
    for name, sentence in refused.items():
        expected = {"state": "failed", "send": True, "choices": True}
        assert seen[name] == {**expected, "sentence": sentence, "announced": sentence}, name
    assert re.match(
        r"The browser does not give this page the memory .*could not all", seen["poor"]["sentence"]
    )

    # Threads or none, current browsers or old ones, dropped or chosen: the native runtime's text.
    cases = [("gguf", "int8"), ("old", "int8"), ("alone", "q4_0")]
    for name, told in [("onnx", asked), *((name, gguf_asked[quant]) for name, quant in cases)]:
        found = seen[name]
        assert found["text"] == found["announced"] == told.text, name
        assert found["note"].startswith(f"{len(told.prompt)} tokens read · first token after")
        assert f" {len(told.answer)} tokens written at " in found["note"]
        assert found["ready"]["state"] == "ready" and found["focused"] == ["question", "question"]
        assert not found["moved"], name
        assert re.fullmatch(r"[\d.]+ MB", found["facts"]["memory"]) and "tokens/s" in found["facts"]["speed"]
    tokens = len(Tokenizer.from_folder(asked.folder).encode_chat([{"role": "user", "content": long}]))
    sentence = f"The conversation has {tokens} tokens, and the context holds 256: begin a new chat."
    for name in ("shortGguf", "shortOnnx"):
        assert seen[name]["note"] == seen[name]["announced"] == sentence and seen[name]["text"] == ""
        assert seen[name]["facts"]["context"] == "256 tokens"
    facts = seen["gguf"]["facts"]
    assert (facts["model"], facts["size"], facts["context"]) == (
        "nano",
        f"{size / 1e6:.1f} MB",
        "1,024 tokens",
    )
    assert seen["alone"]["facts"]["device"] == "llama.cpp, 1 thread"
    assert "on one thread, since its server does not isolate it" in seen["alone"]["ready"]["hint"]
    assert seen["stopped"].endswith("· stopped")
    assert seen["turns"] == 0  # another model, another conversation
    assert seen["narrow"] == {"sideways": 0, "ground": "rgb(27, 25, 23)"}
    assert seen["complaints"] == []
    elsewhere = [
        url for url in seen["requests"] if not url.startswith((f"http://{host}/", "blob:http://127"))
    ]
    assert elsewhere == []


def test_the_pages_loop() -> None:
    done = subprocess.run(
        [need_node(HERE), "--test", HERE / "generate.test.mjs"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "pass 4" in done.stdout, done.stdout[-3000:]


def test_server_hands_out_the_page_and_the_folder(get: Get, exported: Artifact) -> None:
    status, headers, body = get("/", "GET")
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert body == (PAGE / "index.html").read_bytes()
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    status, headers, body = get("/model/model.onnx_data?again", "GET")
    assert status == 200 and body == (exported.path / "model.onnx_data").read_bytes()
    status, headers, body = get("/model/manifest.json", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) == (exported.path / "manifest.json").stat().st_size
    assert get("/served.json", "GET")[2] == b'{"model": "model/"}'


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-4000", 5, 4001),
        ("bytes=0-", 0, None),
        ("bytes=1000-", 1000, None),
        ("bytes=2000-99999999999", 2000, None),
        # Nothing that is served: all of it comes, as RFC 9110 lets a server do.
        *((text, None, None) for text in ("bytes=9-5", "bytes=-5", "bytes=0-1,4-5", "lines=1-2")),
        ("bytes=99999999999-", None, None),
    ],
)
def test_server_hands_out_pieces(
    asked: str, start: int | None, stop: int | None, get: Get, exported: Artifact
) -> None:
    data = (exported.path / "model.onnx_data").read_bytes()
    status, headers, body = get("/model/model.onnx_data", "GET", {"Range": asked})
    assert body == data[start:stop] and int(headers["Content-Length"]) == len(body)
    if start is None:
        assert status == 200 and "Content-Range" not in headers
        return
    last = (len(data) if stop is None else stop) - 1
    assert (status, headers["Content-Range"]) == (206, f"bytes {start}-{last}/{len(data)}")


@pytest.mark.usefixtures("vendored")
def test_server_without_a_model_has_the_page_alone() -> None:
    with serving(None) as host:
        connection = http.client.HTTPConnection(host, timeout=10)
        for path, status in (("/served.json", 200), ("/model/manifest.json", 404), ("/", 200)):
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            assert response.status == status
            assert path != "/served.json" or body == b'{"model": null}'
        connection.close()


@pytest.mark.parametrize(
    "path",
    [
        "/server.py",
        "/model/../../conftest.py",
        "/model/%2e%2e/x",
        "//etc/passwd",
        "/model/",
        "/vendor/..",
        "/x",
    ],
)
def test_server_hands_out_nothing_else(get: Get, path: str) -> None:
    assert get(path, "GET")[0] == 404


def test_server_takes_no_posts(get: Get) -> None:
    assert get("/", "POST")[0] == 501


@pytest.mark.usefixtures("vendored")
def test_server_refuses_what_the_page_cannot_open(exported: Artifact) -> None:
    other = dataclasses.replace(exported, manifest=dataclasses.replace(exported.manifest, format="pte"))
    with pytest.raises(ArtifactError, match="is pte, but the page opens gguf and onnx"):
        serve(other)
    with serving(exported) as host, pytest.raises(FoxEdgeError, match="cannot be opened"):
        serve(exported, int(host.split(":")[1]))


def test_server_says_how_to_build_the_page(exported: Artifact, vendored: None) -> None:
    (server.HERE / "vendor" / VENDORED[0]).unlink()
    with pytest.raises(FoxEdgeError, match=r"vendor/jinja.mjs is missing: .*npm run vendor"):
        serve(exported)


def test_the_page_names_no_other_place() -> None:
    """Nothing in the page's own files is fetched from elsewhere, and the page forbids it too."""
    for name in PAGE_FILES:
        assert not re.search(r"https?://", (PAGE / name).read_text()), name
    policy = (PAGE / "index.html").read_text()
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy


@pytest.mark.parametrize("folder", [PAGE, HERE], ids=["page", "tests"])
def test_lock_files_pin_everything_and_name_no_registry(folder: Path) -> None:
    lock = (folder / "package-lock.json").read_text()
    assert '"resolved"' not in lock and lock.count('"integrity"') > 10
    wanted = re.findall(
        r'"[@\w/-]+": "([^"]+)"', (folder / "package.json").read_text().split("ependencies")[1]
    )
    assert wanted and all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted)
