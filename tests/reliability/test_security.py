"""Row 20: what would run code or reach outside is not in the code, and is refused in what the code reads."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hardbatch.flows import service
from hardbatch.pipeline import cli
from hardbatch.pipeline.artifacts.artifact import MANIFEST, find_artifact, verify_artifact
from hardbatch.pipeline.artifacts.files import DigestCache
from hardbatch.pipeline.config import EmbedConfig, load_manifest
from hardbatch.pipeline.errors import ConfigError, HardbatchError, IntegrityError
from hardbatch.pipeline.models.encoders import open_encoder
from hardbatch.pipeline.models.resolve import resolve_model
from hardbatch.pipeline.run import plan_corpus
from tests import models
from tests.reliability import processes
from tests.reliability.workspaces import rewrite_manifest

Record = Callable[[int, str], None]
SOURCES = sorted(
    path for folder in ("pipeline", "trainer", "flows") for path in (processes.ROOT / folder).rglob("*.py")
)
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "code", "runpy"}
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.jit.load", "torch.hub.load",
    "yaml.load", "tempfile.mktemp", "pd.read_pickle", "joblib.load", "np.fromfile",
}  # fmt: skip
REMOTE_CODE = ("False", "spec.trust_remote_code")


def dangers(source: str) -> Iterator[str]:
    """What in a module could run code of a file, or lets a shell read a line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"line {node.lineno}: imports {name}" for name in names if name.split(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS:
                yield f"line {node.lineno}: calls {name}"
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                if keyword.arg in ("shell", "allow_pickle") and value != "False":
                    yield f"line {node.lineno}: {keyword.arg}={value}"
                if keyword.arg == "trust_remote_code" and name != "ModelSpec" and value not in REMOTE_CODE:
                    yield f"line {node.lineno}: trust_remote_code={value}"


def test_no_module_runs_what_it_reads(record_row: Record) -> None:
    found = {path.name: list(dangers(path.read_text())) for path in SOURCES}
    (exception,) = found.pop("pool.py")  # requests from a run to its own workers
    assert exception.endswith("imports pickle")
    assert {name: lines for name, lines in found.items() if lines} == {}
    record_row(20, f"{len(SOURCES)} modules without pickle, torch.load, yaml, eval, exec or a shell")


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from yaml import safe_load", "os.system('x')", "eval('1')", "torch.load(path)",
        "subprocess.run('x', shell=True)", "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)", "SentenceTransformer(f, trust_remote_code=x)",
    ],
)  # fmt: skip
def test_the_search_finds_them(source: str) -> None:
    assert len(list(dangers(source))) == 1


# paths


@pytest.fixture
def corpus(write_jsonl: Callable[..., Path], rows: Any, tmp_path: Path) -> Path:
    """A data root with pairs.jsonl and an evaluation, and an evaluation outside."""
    write_jsonl("root/pairs.jsonl", rows(48))
    for folder in ("root/eval", "outside"):
        (tmp_path / folder).mkdir()
        for name in ("corpus", "queries"):
            pq.write_table(pa.table({"text": ["secret"]}), tmp_path / folder / f"{name}.parquet")
    return tmp_path / "root"


def try_manifest(corpus: Path, text: str, *overrides: str) -> int | str:
    """Plans over a manifest in the data root; returns the number of steps, or the line of the refusal."""
    lines = 'corpus = "c"\n[[dataset]]\nname = "n"\nsource = "pairs.jsonl"\n'
    lexical = '[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\n'
    (corpus / "c.toml").write_text(
        (text if "[[dataset]]" in text else lines + text) + lexical * ("[embed]" not in text)
    )
    try:
        return len(plan_corpus(corpus / "c.toml", corpus.parent / "workspace", overrides=overrides).steps)
    except HardbatchError as error:
        assert error.exit_code in (2, 3)
        return str(error)


@pytest.mark.parametrize("path", ["../outside", "eval/../../outside", "OUTSIDE", "link", "part"])
def test_an_evaluation_outside_is_refused(corpus: Path, path: str) -> None:
    (corpus / "link").symlink_to("../outside")
    (corpus / "part").mkdir()
    for name in ("corpus", "queries"):
        (corpus / "part" / f"{name}.parquet").symlink_to(corpus.parent / "outside" / f"{name}.parquet")
    given = path.replace("OUTSIDE", str(corpus.parent / "outside"))
    assert "leads out of" in str(try_manifest(corpus, f'[ingest]\ndecontaminate = ["{given}"]\n')) or path == "OUTSIDE"
    assert isinstance(try_manifest(corpus, f'[ingest]\ndecontaminate = ["{given}"]\n'), str)
    assert try_manifest(corpus, '[ingest]\ndecontaminate = ["eval"]\n') == 8


@pytest.mark.parametrize("field", ["model", "surrogate_model"])
@pytest.mark.parametrize("name", ["/models/x", "../x", "a/../../x", "~/x", "~root/x"])
def test_a_manifest_names_no_model_outside(tmp_path: Path, field: str, name: str) -> None:
    manifest = tmp_path / "c.toml"
    usual = 'corpus = "c"\n[[dataset]]\nname = "n"\nsource = "x"\n'
    manifest.write_text(usual + f'[embed]\n{field} = "{name}"\n')
    with pytest.raises(ConfigError, match=rf"embed\.{field}: '{name}' leads out of the data root.*--set"):
        load_manifest(manifest)
    manifest.write_text(usual)
    assert getattr(load_manifest(manifest, [f"embed.{field}={name}"]).embed, field) == name  # who types it may


@pytest.mark.parametrize(
    "source",
    ["file:///x.jsonl", "local:///x.jsonl", "FILE:///x.jsonl", "zip://x.jsonl", "tar://x", "dir:///etc", "reference://x",
     "simplecache::s3://b/k", "filecache::https://h/x", "blockcache::file:///x", "sftp://host/x", "ssh://host/x", "git://x",
     "memory://x", "data://x", "github://o:r@s/x", "smb://h/x", "libarchive://x", "python:os.path;x", "python:../x",
     "hf://../x::file:///etc/passwd", "jlab://x", "dask-worker://x", "ftp://h/x"],
)  # fmt: skip
def test_only_stores_and_the_web_are_fetched_from(corpus: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: pytest.fail(f"{url} was opened"))
    told = try_manifest(corpus, f'corpus = "c"\n[[dataset]]\nname = "n"\nsource = "{source}"\nformat = "jsonl"\n')
    assert isinstance(told, str) and source in told


@pytest.mark.parametrize("protocol", ["hf", "s3", "gs", "https"])
def test_stores_and_the_web_are_fetched_from(corpus: Path, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(url: str) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr("fsspec.core.url_to_fs", unreachable)
    told = try_manifest(corpus, f'corpus = "c"\n[[dataset]]\nname = "n"\nsource = "{protocol}://bucket/x.jsonl"\n')
    assert "cannot be reached: no network in this test" in str(told)


# artifacts


@pytest.mark.parametrize("name", ["../../outside.txt", "/etc/hostname", "data/../../outside.txt"])
def test_an_artifact_names_no_file_outside(copied_run: tuple[Path, Path, Path], name: str, capsys: Any) -> None:
    _, _, shards = copied_run
    outside = shards.parents[1] / "outside.txt"
    outside.write_text("x")
    record = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1, "rows": None}
    rewrite_manifest(shards / MANIFEST, lambda content: content["files"].update({name: record}))
    with pytest.raises(IntegrityError, match="names files that are not below its folder"):
        find_artifact(shards)
    assert verify_artifact(shards) == [f"{shards / MANIFEST}: names files that are not below its folder; do not use it"]
    assert cli.main(["inspect", str(shards)]) == 4
    assert "not below its folder" in capsys.readouterr().err


def test_inspect_shows_no_command_of_a_terminal(run_corpus: Any, write_jsonl: Any, rows: Any, capsys: Any) -> None:
    write_jsonl("pairs.jsonl", [{**row, "query": f"{row['query']} \x1b[31m\u202e"} for row in rows(16)])
    dataset = 'corpus = "c"\n[[dataset]]\nname = "n"\nsource = "pairs.jsonl"\nquery_prompt = "\\u001b]0;title\\u0007"\n'
    shards = run_corpus(dataset + "[pack]\nbatch_size = 8\n").shards
    assert cli.main(["inspect", str(shards), "--batch", "0"]) == 0
    shown = capsys.readouterr().out
    assert shown.replace("\n", "").isprintable() and "\\x1b]0;title\\x07" in shown


# models


def refusal(folder: Path, **settings: Any) -> str:
    """The line that refuses the model at `folder`."""
    config = EmbedConfig(model=str(folder), device="cpu", dtype="float32", **settings)
    with pytest.raises(ConfigError) as caught:
        open_encoder(resolve_model(config, "cluster", folder.parent, DigestCache(folder.parent / ".digests.json")))
    return str(caught.value)


def test_a_module_of_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    for kind in ("evil.Evil", "subprocess.Popen", "sentence_transformers_evil.X", "1"):
        (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
        assert f"({kind})" in refusal(folder) and "embed.trust_remote_code" in refusal(folder)


@pytest.mark.soak
@pytest.mark.parametrize("way", ["auto_map", "module"])
def test_code_beside_a_model_is_not_run(tmp_path: Path, way: str) -> None:
    models.require_minilm()
    folder = models.save_gtr(tmp_path / "model")
    mark = tmp_path / "was_run"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    if way == "auto_map":
        settings = json.loads((folder / "config.json").read_text())
        settings |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
        (folder / "config.json").write_text(json.dumps(settings))
    else:
        kinds = json.loads((folder / "modules.json").read_text())
        kinds[-1]["type"] = "evil.Evil"
        (folder / "modules.json").write_text(json.dumps(kinds))
    assert "model 'model'" in refusal(folder)
    assert not mark.exists()


# the Prefect server


def test_the_server_listens_on_loopback_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: dict[str, list[str]] = {}
    for name, value in (
        ("HOME", tmp_path),
        ("RECORD", tmp_path / "service.json"),
        ("SETTINGS", tmp_path / "prefect.toml"),
    ):
        monkeypatch.setattr(service, name, value)
    monkeypatch.setattr(service, "_free_port", lambda: 4200)
    monkeypatch.setattr(service, "_start", lambda made, role, arguments, is_ready: started.update({role: arguments}))
    monkeypatch.setattr(service, "_deploy", lambda made: None)
    monkeypatch.setenv("PREFECT_SERVER_API_HOST", "0.0.0.0")  # noqa: S104 -- must have no effect
    service.up()
    server = started["server"]
    assert server[server.index("--host") + 1] == "127.0.0.1"
    assert "127.0.0.1" in (tmp_path / "prefect.toml").read_text()
    made = service.Service(url="http://127.0.0.1:4200", token="t")  # noqa: S106 -- a mark, no secret
    assert "PREFECT_SERVER_API_HOST" not in service._environment(made)


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks for sockets in /proc")
def test_a_real_server_listens_on_loopback_alone(tmp_path: Path, record_row: Record) -> None:
    """Every listening socket of every process of the service is on 127.0.0.1."""
    from tests.flows import test_service

    root = tmp_path / "project"
    for package in ("hardbatch", "flows", "pipeline"):
        shutil.copytree(
            processes.ROOT / package, root / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(processes.ROOT / "prefect.yaml", root)
    port = test_service.free_port()
    try:
        assert test_service.service(root, "up", port).returncode == 0
        listening = [address for pid in test_service.pids_in(root) for address in listening_addresses(pid)]
        assert f"0100007F:{port:04X}" in listening
        assert {address.split(":")[0] for address in listening} == {"0100007F"}  # 127.0.0.1
    finally:
        test_service.service(root, "down", port)
    record_row(20, f"the Prefect server: {len(listening)} listening sockets, all on 127.0.0.1")


def listening_addresses(pid: int) -> Iterator[str]:
    """ADDRESS:PORT in hex of the listening TCP sockets of a process."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except OSError:
            continue  # closed while we looked
        if target.startswith("socket:["):
            sockets.add(target[8:-1])
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                yield fields[1]
