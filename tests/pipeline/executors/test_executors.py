"""executors: the same bytes whoever does the work, and what happens if a worker fails, dies or has other code."""

from __future__ import annotations

import errno
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import hardbatch
from hardbatch.pipeline.artifacts.commit import ArtifactBuilder, open_builder
from hardbatch.pipeline.artifacts.files import as_user_error
from hardbatch.pipeline.errors import ConfigError, InputError, NoSpaceError, WorkerError
from hardbatch.pipeline.executors import pool
from hardbatch.pipeline.executors.choose import open_executor
from hardbatch.pipeline.progress import SilentProgress
from hardbatch.pipeline.run import plan_corpus, run_step
from hardbatch.pipeline.runlog import list_logs, read_log
from hardbatch.pipeline.step import Executor, InlineExecutor, Progress, Unit, Work, run_pending
from tests.pipeline.executors.works import FAILURES, OddError, Toy, Unloadable, units
from tests.reliability.processes import HARDBATCH, ROOT, finish, start, tree, wait_until
from tests.reliability.workspaces import faults_in, hidden, write_corpus

Arguments = tuple[str, int, str | None]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray with two nodes of one core beside a head without any, on the loopback device."""
    ray_constants = pytest.importorskip("ray._private.ray_constants", reason="needs pip install 'hardbatch[ray]'")
    from ray.cluster_utils import Cluster

    # This machine is then 127.0.0.1, for those who connect as well.
    ray_constants.ENABLE_RAY_CLUSTER = False
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        found.add_node(num_cpus=1)
    yield found
    found.shutdown()
    ray_constants.ENABLE_RAY_CLUSTER = True


@pytest.fixture(params=["processes", "ray"])
def two_workers(request: pytest.FixtureRequest) -> Arguments:
    """The arguments that open an executor with two workers."""
    if request.param == "processes":
        return "processes", 2, None
    return "ray", 2, request.getfixturevalue("cluster").address


@dataclass
class Counting:
    """Progress that calls back after each unit."""

    then: Callable[[int], object] = lambda done: None
    done: int = 0
    labels: list[str] = field(default_factory=list)

    def start(self, label: str, total: int) -> None:
        self.labels.append(label)

    def advance(self, amount: int) -> None:
        self.done += amount
        self.then(self.done)

    def finish(self) -> None:
        pass


@dataclass
class Bench:
    """Runs toy works, each as an artifact of its own."""

    folder: Path
    number: int = 0
    builders: list[ArtifactBuilder] = field(default_factory=list)

    def run(self, executor: Executor, num_units: int, progress: Progress | None = None, **settings: Any) -> set[int]:
        """Runs a work and returns the workers that did it."""
        self.number += 1
        deaths = self.folder / f"deaths-{self.number}"
        deaths.mkdir()
        with open_builder(self.folder / str(self.number)) as builder:
            work = Toy(path=builder.path, deaths=deaths, **settings)
            names = run_pending(builder, executor, work, units(num_units), progress or SilentProgress(), "toy")
            assert sorted(names) == sorted(
                path.name for path in (builder.path / "files").iterdir() if path.name[0] != "."
            )
            assert hidden(builder.path) == []
            return {builder.unit_record(name).counts["worker"] for name in names}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# the same bytes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), {"alpha": 70, "beta": 44})


@pytest.fixture(scope="module")
def inline(corpus: Path) -> dict[str, bytes]:
    """What a run in one process makes."""
    hardbatch.run_corpus(corpus, workspace=corpus.parent / "inline")
    return tree(corpus.parent / "inline")


def assert_same_bytes(inline: dict[str, bytes], corpus: Path, workspace: Path, **arguments: Any) -> None:
    progress = Counting()
    hardbatch.run_corpus(corpus, workspace=workspace, progress=progress, **arguments)
    together = ["answers, steps", "clusters, hardness, steps", "batches, steps"]
    assert [label for label in progress.labels if label.endswith("steps")] == together
    (log,) = map(read_log, list_logs(workspace))
    assert len(log.steps) == 15 and log.torn_lines == 0

    made = tree(workspace)
    assert sorted(made) == sorted(inline) and len(made) > 30
    assert [name for name in made if made[name] != inline[name]] == []


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.soak), 2, 4])
def test_processes_make_the_same_bytes(
    num_workers: int, corpus: Path, inline: dict[str, bytes], tmp_path: Path
) -> None:
    assert_same_bytes(inline, corpus, tmp_path / "w", executor="processes", workers=num_workers)


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_ray_makes_the_same_bytes(
    num_workers: int, cluster: Any, corpus: Path, inline: dict[str, bytes], tmp_path: Path
) -> None:
    where = {"executor": "ray", "workers": num_workers, "ray_address": cluster.address}
    assert_same_bytes(inline, corpus, tmp_path / "w", **where)


def test_every_work_can_be_sent_to_another_process(corpus: Path, tmp_path: Path) -> None:
    sent = []

    class Sending(InlineExecutor):
        def run(self, work: Work, units: Any, progress: Progress, device: str = "cpu") -> int:
            sent.append(type(work).__name__)
            work, units = pickle.loads(pickle.dumps((work, units)))  # noqa: S301 -- our own bytes
            return super().run(work, units, progress, device)

    for step in plan_corpus(corpus, tmp_path / "w").steps:
        run_step(step, executor=Sending())
    assert set(sent) == {"_Staging", "_Embedding", "_Ranking", "_Writing"}


# workers


def test_workers_share_the_units_and_are_kept(two_workers: Arguments, bench: Bench) -> None:
    with open_executor(*two_workers) as executor:
        first = bench.run(executor, 8, seconds=0.2)
        second = bench.run(executor, 8, seconds=0.2)
    assert len(first | second) == 2 and first & second


def test_processes_are_the_same_for_all_devices(bench: Bench) -> None:
    with open_executor("processes", 1) as executor:
        first = bench.run(executor, 1)
        executor.run(Toy(path=bench.folder / "gpu", deaths=bench.folder), units(1), SilentProgress(), "cuda")
        record = ArtifactBuilder(bench.folder / "gpu").unit_record("unit-0")
    assert first == {record.counts["worker"]}


def test_a_worker_that_is_killed_costs_its_unit_in_hand(
    two_workers: Arguments, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Counting()
    with open_executor(*two_workers) as executor:
        bench.run(executor, 8, progress, kills={"unit-2": 1, "unit-5": 2})
    assert progress.done == 8
    warnings = [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines()]
    assert sorted(warnings) == [f"warning: a worker died over unit unit-{i}" for i in (2, 5, 5)]


def test_a_unit_that_kills_every_worker_is_named(two_workers: Arguments, bench: Bench) -> None:
    with open_executor(*two_workers) as executor:
        with pytest.raises(WorkerError, match=r"workers died 3 times over unit unit-2 .*use fewer --workers"):
            bench.run(executor, 4, kills={"unit-2": 99})
        bench.run(executor, 2)  # with workers that are started for it


def test_a_work_that_kills_every_worker_ends(bench: Bench) -> None:
    with open_executor("processes", 2) as executor, pytest.raises(WorkerError, match=r"opening .*signal 9"):
        bench.run(executor, 4, kills_as_it_opens=True)


@pytest.mark.parametrize("error", FAILURES)
def test_an_error_is_raised_as_what_it_is(error: type[Exception], bench: Bench) -> None:
    raised = RuntimeError if error is OddError else error
    with open_executor("processes", 2) as executor, pytest.raises(raised) as caught:
        bench.run(executor, 3, fails={"unit-1": error})
    assert type(caught.value) is raised
    assert "works.py" in caught.value.__notes__[0]  # the traceback of the worker


def test_an_error_of_an_actor_is_raised_as_what_it_is(cluster: Any, bench: Bench) -> None:
    with open_executor("ray", 2, cluster.address) as executor, pytest.raises(InputError) as caught:
        bench.run(executor, 3, fails={"unit-1": InputError})
    assert type(caught.value) is InputError and str(caught.value) == "unit-1: wrong"


def test_a_node_that_is_lost_costs_its_units(cluster: Any, bench: Bench) -> None:
    node = cluster.add_node(num_cpus=1)
    progress = Counting(lambda done: done == 4 and cluster.remove_node(node, allow_graceful=False))
    with open_executor("ray", 3, cluster.address) as executor:
        bench.run(executor, 12, progress, seconds=0.3)
    assert progress.done == 12


def test_other_code_is_refused(two_workers: Arguments, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {**pool.code_version(), "torch": "0.1"}
    monkeypatch.setattr(pool, "code_version", lambda: here)
    with open_executor(*two_workers) as executor, pytest.raises(ConfigError) as caught:
        bench.run(executor, 2)
    assert "has other versions than this run: torch" in str(caught.value) and "\n" not in str(caught.value)


def test_a_node_without_the_package_is_refused(cluster: Any, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hardbatch.pipeline.executors.ray_actors._Actor", Unloadable)
    with open_executor("ray", 2, cluster.address) as executor, pytest.raises(WorkerError) as caught:
        bench.run(executor, 2)
    assert "cannot start: ModuleNotFoundError: No module named 'hardbatch'; install" in str(caught.value)


def test_a_full_disk_in_a_worker_is_an_error_of_the_system(bench: Bench) -> None:
    full = partial(OSError, errno.ENOSPC)
    with open_executor("processes", 1) as executor, pytest.raises(OSError, match="unit-1: wrong") as caught:
        bench.run(executor, 3, fails={"unit-1": full})
    assert isinstance(as_user_error(caught.value), NoSpaceError)


def test_the_code_version_is_that_of_the_files(tmp_path: Path) -> None:
    """A copy of the package with one more line has another one."""
    copy = tmp_path / "hardbatch"
    subprocess.run(["cp", "-rL", ROOT / "hardbatch", copy], check=True)
    with (copy / "pipeline" / "errors.py").open("a") as file:
        file.write("# changed\n")
    code = "from hardbatch.pipeline.executors.pool import code_version; print(code_version())"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, text=True, capture_output=True
    )
    here = pool.code_version()
    assert ended.stdout.strip() != str(here) and len(ended.stdout.strip()) == len(str(here)), ended.stderr


def test_threads_are_shared_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from hardbatch.pipeline.executors import processes

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [processes.threads_of_each(number, 8) for number in (1, 2, 4, 16)] == [3, 3, 2, 1]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [processes.threads_of_each(number, 8) for number in (1, 2, 16)] == [8, 4, 1]


def test_each_process_sees_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from hardbatch.pipeline.executors import processes

    seen: list[str] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setattr(
        processes, "ProcessWorker", lambda environment: seen.append(environment["CUDA_VISIBLE_DEVICES"])
    )
    with open_executor("processes") as executor:
        assert isinstance(executor, processes.ProcessExecutor)
        for number in range(3):
            executor._start(number, "cuda")
        assert executor._num_workers == 2
    assert seen == ["5", "7", "5"]


# how a run ends

_SLOW = """
import sys
from pathlib import Path
from hardbatch.pipeline.executors.choose import open_executor
from hardbatch.pipeline.progress import SilentProgress
from tests.pipeline.executors.works import Toy, units
folder = Path(sys.argv[1])
with open_executor("processes", 2) as executor:
    executor.run(Toy(path=folder, deaths=folder, seconds=60), units(2), SilentProgress())
"""


def children(pid: int) -> list[int]:
    """The processes that `pid` has started and that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


@contextmanager
def at_work(
    folder: Path, command: list[object], **environment: str
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A command and its two workers, both of which are in the middle of a unit."""
    process = start(command, environment=environment)
    try:
        assert wait_until(lambda: len(list(folder.rglob(".unit*.tmp"))) == 2, process), process.communicate()
        yield process, children(process.pid)
    finally:
        process.kill()


def assert_gone(pids: list[int], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.02)


def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    with at_work(tmp_path, [sys.executable, "-c", _SLOW, tmp_path]) as (process, workers):
        assert len(workers) == 2
        process.kill()
        assert_gone(workers)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_workers(corpus: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    words = ["run", corpus, "--workspace", tmp_path / "w", "--executor", "processes", "--workers", "2"]
    process = start([*HARDBATCH, *words])
    assert wait_until(lambda: any((tmp_path / "w").rglob("vectors/*/*/units/*.json")), process)
    workers = children(process.pid)
    process.send_signal(number)
    ended = finish(process)
    assert ended.code == code and "Traceback" not in ended.errors, ended.errors
    assert "committed work stays, run the same command to continue" in ended.errors
    assert_gone(workers)
    assert hidden(tmp_path / "w") == [] and faults_in(tmp_path / "w") == []


# flags


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "2"], "--workers: 'inline' works in this process alone; add --executor processes or ray"),
        (["--executor", "processes"], "no GPU was found; give the number of processes with --workers"),
        (["--executor", "processes", "--workers", "0"], "0 is less than 1"),
        (["--executor", "threads"], "invalid choice: 'threads'"),
        (["--executor", "processes", "--workers", "1", "--ray-address", "auto"], "'processes' does not use Ray"),
        (["--executor", "ray", "--ray-address", "ray://head:10001"], "not a ray:// address"),
        (["--executor", "ray", "--ray-address", "127.0.0.1:1"], "127.0.0.1:1: [Errno 111] Connection refused"),
        (["--executor", "ray", "--ray-address", "head"], "give HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit(words: list[str], message: str, small_manifest: Path, tmp_path: Path, cli: Any) -> None:
    if "ray" in words:
        pytest.importorskip("ray", reason="needs pip install 'hardbatch[ray]'")
    code, _, errors = cli("run", small_manifest, "--workspace", tmp_path / "w", *words)
    assert code == 2 and message in errors and "Traceback" not in errors


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "hardbatch.pipeline.executors.ray_actors", raising=False)
    with pytest.raises(ConfigError, match=r'pip install "hardbatch\[ray\]"'), open_executor("ray"):
        pass


def test_one_gpu_for_all_workers_is_refused() -> None:
    with open_executor("processes", 2) as executor, pytest.raises(ConfigError, match="'cuda:1' is one GPU"):
        executor.run(Toy(path=Path(), deaths=Path()), units(1), SilentProgress(), "cuda:1")


# who runs which unit


def test_units_are_begun_in_order_and_prepared_by_who_runs_them() -> None:
    schedule = pool._Schedule(units(5))
    names = [tuple(unit and unit.name for unit in schedule.take(worker)) for worker in (0, 1, 0, 0, 1)]
    assert names == [
        ("unit-0", "unit-1"),
        ("unit-2", "unit-3"),
        ("unit-1", "unit-4"),
        ("unit-4", None),
        ("unit-3", None),
    ]


def test_an_idle_worker_takes_what_another_prepares() -> None:
    schedule = pool._Schedule(units(2))
    assert [unit and unit.name for unit in schedule.take(0)] == ["unit-0", "unit-1"]
    assert [unit and unit.name for unit in schedule.take(1)] == ["unit-1", None]
    assert schedule.take(0) == (None, None)
    schedule.put_back(Unit(name="unit-1", start=1, stop=2))
    assert schedule.take(0)[0] == Unit(name="unit-1", start=1, stop=2)
