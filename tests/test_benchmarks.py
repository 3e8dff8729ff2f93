"""The asv suite: its formulas, a small run of every benchmark, results brought home."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import numbakern
from benchmarks import ROOT, bounds, bring_home, digest, regression, report, runner, sources, suite
from numbakern._roofline import Arrays, Case, bytes_moved, check, gigabytes_per_second, multiple

PACKAGE = Path(numbakern.__file__).parent
NO_ASV = pytest.mark.skipif(importlib.util.find_spec("asv") is None, reason="asv is not installed")
NO_TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)


# --- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "streams", "extra"),
    [
        ("log_softmax", 2, 0),
        ("log_softmax_fresh", 2, 0),
        ("log_softmax_backward", 3, 0),
        ("cross_entropy", 1, 8 * 6),
        ("cross_entropy_backward", 2, 8 * 6),
        ("value_and_grad", 2, 8 * 6),
        ("nll_loss", 0, (8 + 2) * 6),
        ("nll_loss_backward", 1, 8 * 6),
    ],
)
def test_bytes_moved(op, streams, extra):
    assert bytes_moved(op, 6, 5, 2) == streams * 6 * 5 * 2 + extra
    assert Case(op, (2, 5, 3), "float16", axis=1).nbytes == bytes_moved(op, 6, 5, 2)


def test_ratios():
    assert gigabytes_per_second(3 * 10**9, 0.5) == 6
    assert multiple(0.3, 0.2) == pytest.approx(1.5)
    assert bounds.verdict(1.0, 1.25, 1.05) == "goal"
    assert bounds.verdict(1.25, 1.25, 1.05) == "must"
    assert bounds.verdict(1.26, 1.25, 1.05) == "missed"
    assert bounds.verdict(None, 1.25, 1.05) == "failed"
    assert bounds.verdict(0.01, 0.06, None) == "must"


def test_bounds_of_cuda_are_shares_of_the_copy_rate():
    bound = bounds.cuda_bound("log_softmax", 1024, "float32")
    assert (bound.must, bound.goal) == (1 / 0.85, 1 / 0.97)
    assert math.prod(bound.case.shape) == 2**28
    assert bounds.cuda_bound("log_softmax_backward", 1024, "float16").must == 1.5 / 0.85
    assert bounds.cuda_bound("cross_entropy", 1024, "float32").goal == 0.5


def test_a_row_of_the_table():
    names = [f"cpu.Speed.track_{figure}" for figure in ("x_copy", "seconds", "gigabytes")]
    at = ("'log_softmax'", "'1024x32000'", "'float32'")
    values = {name: {("'numbakern'", *at): 2.0, ("'torch'", *at): 3.0} for name in names}
    (row,) = report.rows(values, "cpu")
    assert (row.ours, row.ratio("torch"), row.ratio("jax")) == (2.0, 1.5, None)
    assert row.verdict == "missed"
    assert "| **2.00** | 3.00 | 1.25 | 1.05 |" in report.markdown_table([row])


def test_small_calls_are_told_in_microseconds():
    at = ("'numbakern'", "'log_softmax'", "'8x10'", "'float32'")
    (row,) = report.rows({"cpu.Speed.track_seconds": {at: 2.5e-6}}, "cpu")
    assert row.ours == pytest.approx(2.5)
    assert row.verdict == "goal"


def test_the_wrong_result_is_found():
    case = Case("log_softmax", (40, 30))
    arrays = Arrays(case.shape, case.dtype, case.axis)
    right = numbakern.log_softmax(arrays.logits)
    assert check(case, arrays, right) is None
    assert check(case, arrays, right * np.float32(1.01))
    assert check(case, arrays, right[:, :-1])
    assert check(case, arrays, (right, right))


# --- the suite -----------------------------------------------------------------------------------


def test_importing_the_sections_starts_nothing(python):
    done = python(
        f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from benchmarks import cpu, cuda, numerics, startup
        print({{"numba", "torch", "jax", "scipy", "cupy", "triton", "pytest"}} & set(sys.modules))
        """
    )
    assert done.stdout.strip() == "set()"


def test_what_the_suite_covers():
    from benchmarks import cpu, cuda

    assert {2, 262144, 1023, 1025, 32000, 128256} <= set(suite.CLASSES)
    assert suite.ROWS[0] == 1 and suite.ROWS[-1] == 10**6
    assert {"numbakern", "scipy", "torch", "torch.compile", "jax"} <= set(cpu.IMPLEMENTATIONS)
    assert {"cupy", "torch", "torch.compile", "triton", "liger", "quack"} <= set(
        cuda.IMPLEMENTATIONS
    )
    cases = {cpu.Speed().case(*p[1:]) for p in _of("cpu.Speed.track_x_copy").selected([])}
    assert cases - {None} == {bound.case for bound in bounds.CPU}
    for case in cases - {None}:
        assert suite.unlabel(suite.label(case)) == (case.shape, case.axis)


def _of(name):
    return next(b for b in runner.discover() if b.name == name)


def test_families_are_those_of_the_accuracy_tests():
    from benchmarks import numerics
    from tests import accuracy

    assert numerics.FAMILIES == list(accuracy.FAMILIES)


def a_few(benchmark):
    """The first parameters of each library that is quick to import."""
    chosen, seen = [], set()
    for params in benchmark.selected([]):
        name = params[0] if params else ""
        if name in seen or name in ("torch.compile", "jax"):
            continue
        seen.add(name)
        chosen.append(params)
        if benchmark.cls in ("PeakMemory", "UlpOfFamily"):
            break
    return chosen


def run_all(few, results):
    """Every class in one process: importing the libraries is what takes long."""
    for section, cls, jobs in few:
        runner.run_class(section, cls, jobs, results)


def test_every_benchmark_runs(monkeypatch):
    """At small shapes; a missing library or GPU is n/a, and nothing fails."""
    monkeypatch.setenv("NUMBAKERN_BENCH_SMALL", "1")
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")  # other tests have the cores: no waiting for both
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PACKAGE.parent), str(ROOT)]))
    few, figures = {}, {}
    for benchmark in runner.discover():
        jobs = few.setdefault((benchmark.section, benchmark.cls), [])
        jobs += [(benchmark.method, params) for params in a_few(benchmark)]
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    classes = [(*key, runner.in_order(jobs)) for key, jobs in few.items()]
    process = context.Process(target=run_all, args=(classes, sender))
    process.start()
    sender.close()
    for section, cls, jobs in classes:
        for job in jobs:
            method, params, value, note = receiver.recv()
            assert job == (method, params)
            assert value is not None, f"{section}.{cls}.{method}{params}: {note}"
            figures.setdefault((section, cls, method), []).append(value)
    process.join()
    assert set(figures) == {(b.section, b.cls, b.method) for b in runner.discover()}
    for (section, *_), values in figures.items():
        if section == "cuda" and not _has_cuda():
            assert all(map(math.isnan, values))
        else:
            assert values[0] > 0 or section == "numerics"


def _has_cuda():
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


@NO_TORCH
@pytest.mark.parametrize("axis", [-1, 1])
def test_the_cuda_section_on_host_tensors(axis):
    """Its arrays, references, copies and torch's calls; only the clock is another."""
    import torch

    from benchmarks import device

    def clock(calls, rounds):
        return {name: [call() is not None and 1.0] * rounds for name, call in calls.items()}

    bench = device.DeviceBench([device.TORCH, device.CUPY], rounds=2, device="cpu", clock=clock)
    for op in bounds.CUDA_STREAMS:
        for dtype in bounds.CUDA_DTYPES:
            result = bench.measure(Case(op, (6, 33, 5), dtype, axis))
            assert result.seconds.get("torch") == 1.0, result.notes
            assert result.copy_seconds == 1.0
    arrays = device.DeviceArrays((4, 7), "float32", -1, "cpu")
    assert torch.allclose(arrays.lse, torch.logsumexp(arrays.logits.double(), 1))


@pytest.fixture
def cuda_on_host(monkeypatch):
    """The CUDA section, its arrays host tensors."""
    pytest.importorskip("torch")
    from benchmarks import cuda, device

    monkeypatch.setattr(device, "require_cuda", lambda: None)
    monkeypatch.setattr(cuda._Prepared, "where", "cpu")
    return cuda


def test_the_host_cost_of_a_wrong_call_is_not_measured(cuda_on_host, monkeypatch):
    cuda = cuda_on_host
    torch = cuda._LIBRARIES["torch"]
    fake = SimpleNamespace(from_dlpack=lambda tensor: tensor.numpy())
    monkeypatch.setitem(sys.modules, "cupy", fake)
    cuda.HostCost().setup("torch", "value_and_grad")
    cuda.HostCost().setup(cuda.CUPY_ARRAYS, "log_softmax")  # which NumPy's arrays stand for
    wrong = {**torch.builders, "log_softmax": lambda a: lambda: a.logits}
    monkeypatch.setitem(cuda._LIBRARIES, "torch", dataclasses.replace(torch, builders=wrong))
    with pytest.raises(RuntimeError, match="wrong result: relative error"):
        cuda.HostCost().setup("torch", "log_softmax")


class Books:
    """The books of torch's allocator on a device, and those of CuPy's pool."""

    def __init__(self, held):
        self.held = self.most = held
        self.pool = 0

    def take(self, size):
        self.held += size
        self.most = max(self.most, self.held)

    def reset(self):
        self.most = self.held

    def free_all_blocks(self):
        self.pool = 0

    def total_bytes(self):
        return self.pool


@pytest.fixture
def books(monkeypatch):
    torch = pytest.importorskip("torch")
    kept = Books(1000)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: kept.held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: kept.most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", kept.reset)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(get_default_memory_pool=lambda: kept))
    return kept


def test_peak_memory_of_a_device(books):
    from benchmarks.device import peak_bytes

    sizes = iter([500, 100])  # the first call takes more, for its own ends

    def call():
        size = next(sizes)
        books.take(size)
        books.take(30 - size)

    assert peak_bytes(call) == 100
    books.take(-books.held)
    with pytest.raises(NotImplementedError):
        peak_bytes(lambda: None)


def test_peak_memory_of_cupy_is_how_far_its_pool_grew(books):
    from benchmarks.device import peak_bytes

    def call():
        books.pool = max(books.pool, 512)

    assert peak_bytes(call) == 512


def test_a_wrong_first_call_has_no_figure(monkeypatch):
    from benchmarks import startup

    monkeypatch.setitem(startup.CALLS, "log_softmax", "x * 1")
    benchmark = startup.FirstCall()
    benchmark.setup("cpu", "log_softmax", "cold")
    with pytest.raises(RuntimeError, match="wrong result: relative error"):
        benchmark.track_seconds("cpu", "log_softmax", "cold")


def test_an_error_of_the_wrong_shape_is_no_figure(monkeypatch):
    from benchmarks import numerics

    monkeypatch.setattr(numerics, "CLASSES", (10,))
    one = lambda function, x, labels: np.zeros((1, 1), x.dtype)  # noqa: E731
    monkeypatch.setitem(numerics.CALLS, "numbakern", ("numbakern", one))
    found = numerics._measure("numbakern", "float32")
    assert all("wrong result" in note for of in found.values() for note in of.values())


def test_code_of_two_versions_has_two_caches(tmp_path):
    """Whichever file was edited: neither the kernels' own key nor Numba's decides alone."""
    folders = []
    for edit in ("", "# another version\n"):
        folder = tmp_path / f"version{len(folders)}"
        shutil.copytree(PACKAGE, folder / "numbakern")
        with (folder / "numbakern/cpu/vmath.py").open("a") as file:
            file.write(edit)
        script = "import os, benchmarks; print(os.environ['NUMBA_CACHE_DIR'])"
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": "elsewhere"},
            capture_output=True,
            text=True,
            check=True,
        )
        folders.append(done.stdout.strip())
    assert len({*folders, "elsewhere"}) == 3


# --- asv -----------------------------------------------------------------------------------------


@pytest.fixture
def asv(tmp_path, monkeypatch):
    """Runs asv on this tree with its results, environments and home in a temporary folder."""
    from benchmarks.dashboard import site

    monkeypatch.setenv("NUMBAKERN_BENCH_SMALL", "1")
    config = site.configuration(tmp_path, results_dir=str(tmp_path / "results"))
    return lambda *arguments: site.asv(*arguments, config=config)


@NO_ASV
def test_asv_check(asv):
    assert "No problems found" in asv("check", "--environment", "existing:same")


@NO_ASV
def test_asv_and_the_runner_agree(asv, tmp_path):
    """On names, parameters, units and versions; and asv measures what was selected."""
    out = asv(
        *("run", "--quick", "--show-stderr", "--environment", "existing:same"),
        *("--dry-run", "--machine", "here"),
        *("--bench", r"cpu.SweepRows.track_x_copy\('numbakern', 'log_softmax', 64"),
        *("--bench", r"cuda.HostCost.*\('numbakern', 'log_softmax'"),
        *("--bench", "startup.Import"),
        *("--bench", r"numerics.Ulp.track_ulp\('numbakern', 'log_softmax', 'float32'"),
    )
    assert "failed" not in out and "Import.track_seconds" in out
    found = json.loads((tmp_path / "results/benchmarks.json").read_text())
    ours = {benchmark.name: benchmark for benchmark in runner.discover()}
    assert set(found) - {"version"} == set(ours)
    for name, benchmark in ours.items():
        assert found[name]["version"] == benchmark.version == "1"
        assert found[name]["unit"] == benchmark.unit
        assert found[name]["params"] == [list(map(repr, values)) for values in benchmark.params]


# --- results brought home ------------------------------------------------------------------------


@pytest.fixture
def history(tmp_path):
    """A repository with three commits: two of the package, one of its text alone."""
    root = tmp_path / "repository"
    root.mkdir()

    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(root), *settings, *arguments], check=True)

    git("init", "-q", "-b", "main")
    for number, change in enumerate(("one", "two", "text")):
        folder = root / "numbakern/cpu"
        folder.mkdir(parents=True, exist_ok=True)
        if change != "text":
            (folder / "kernels.py").write_text(f"# {change}\n")
        (root / "README.md").write_text(change)
        git("add", ".")
        git("commit", "-q", "-m", str(number))
    return root


def measured(root, **results):
    """What `python -m benchmarks --save` writes, for the sources in a tree."""
    names = {
        path.relative_to(root / "numbakern").as_posix(): bring_home.git(
            "hash-object", str(path), root=root
        ).strip()
        for path in (root / "numbakern").rglob("*.py")
    }
    return {
        "machine": "gpu",
        "date": 0,
        "sources": digest(names),
        "environment": {"python": "3.12", "threads": 2, "versions": {"numba": "1", "numpy": "2"}},
        "results": results,
    }


def test_sources_are_named_as_git_names_them():
    name = "_roofline.py"
    content = bring_home.git("hash-object", "--no-filters", str(PACKAGE / name))
    assert sources()[name] == content.strip()


@NO_ASV
def test_results_find_their_commit(history):
    commits = bring_home.git("log", "--format=%H", root=history).split()
    of_both = list(bring_home.commits_of(measured(history)["sources"], root=history))
    assert of_both == commits[:2]  # the last one changed no source
    (history / "numbakern/cpu/kernels.py").write_text("# edited\n")
    assert not list(bring_home.commits_of(measured(history)["sources"], root=history))


@NO_ASV
def test_results_are_brought_home(history, tmp_path):
    from asv.results import Results

    name = "cuda.HostCost.track_microseconds"
    ours = ["'numbakern'", "'log_softmax'"]
    entry = {"version": "1", "values": [[ours, 4.5], [["'torch'", "'log_softmax'"], None]]}
    first = measured(history, **{name: entry, "cuda.Gone.track_x": entry})
    commit = bring_home.git("rev-parse", "HEAD", root=history).strip()
    results = tmp_path / "results"
    path = bring_home.bring_home(first, commit, results, root=history)
    # A second file adds to the first, and what it did not measure stays.
    entry = {"version": "1", "values": [[["'cupy'", "'log_softmax'"], 40.0]]}
    other = {"version": "0", "values": [[["'cpu'", "'log_softmax'", "'cold'"], 1.0]]}
    second = measured(history, **{name: entry, "startup.FirstCall.track_seconds": other})
    assert bring_home.bring_home(second, commit, results, root=history) == path
    kept = Results.load(str(path))
    assert (kept.commit_hash, kept.params["machine"]) == (commit, "gpu")
    assert set(kept.get_all_result_keys()) == {name}  # gone, or of another version: left out
    params = kept.get_result_params(name)
    keys = [(a, b) for a in params[0] for b in params[1]]
    values = dict(zip(keys, kept.get_result_value(name, params), strict=True))
    assert values[tuple(ours)] == 4.5
    assert values["'cupy'", "'log_softmax'"] == 40.0
    assert math.isnan(values["'torch'", "'log_softmax'"])
    assert str(tmp_path) not in path.read_text()


SAVED = {
    "machine": "gpu",
    "sources": "0" * 64,
    "environment": {"python": "3.12", "versions": {"torch": "2.13.0+cu130"}},
    "results": {"cuda.HostCost.track_microseconds": {"version": "1", "values": [[["'x'"], 1.0]]}},
}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"machine": "../elsewhere"}, "other characters"),
        ({"environment": {"python": "3.12", "versions": {"numpy": "2/3"}}}, "other characters"),
        ({"environment": {"python": "3.12"}}, "no 'versions'"),
        ({"sources": None}, "expected a digest"),
        ({"results": {"x": {"version": "1", "values": [[["'x'"], "fast"]]}}}, "got 'fast'"),
        ({"results": {"x": {"version": "1", "values": [[[1], 2.0]]}}}, "expected text, got [1]"),
        ({"results": {"x": [1.0]}}, "list indices"),
    ],
)
def test_a_file_of_something_else_is_refused(change, line, tmp_path):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(SAVED))
    assert bring_home.load(file) == SAVED
    file.write_text(json.dumps(SAVED | change))
    with pytest.raises(SystemExit) as refused:
        bring_home.load(file)
    (told,) = str(refused.value).splitlines()
    assert line in told and str(file) in told


def test_a_file_that_is_no_json_is_refused(tmp_path):
    file = tmp_path / "measured.json"
    with pytest.raises(SystemExit, match="No such file"):
        bring_home.load(file)
    file.write_text('{"machine": "gpu", ')
    with pytest.raises(SystemExit, match="not what"):
        bring_home.load(file)


@NO_ASV
def test_the_command_refuses_edited_sources(tmp_path, capsys):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(SAVED))
    assert bring_home.main([str(file), "--results", str(tmp_path)]) == 1
    assert "No commit" in capsys.readouterr().err


def test_the_runner_saves(tmp_path, monkeypatch):
    from benchmarks import __main__ as command

    file = tmp_path / "measured.json"
    monkeypatch.setenv("NUMBAKERN_BENCH_SMALL", "1")
    options = ["-b", r"cpu.Call.*\('numbakern', 'log_softmax', '8x10'", "--machine", "here"]
    assert command.main([*options, "--save", str(file)]) == 0
    saved = json.loads(file.read_text())
    assert saved["sources"] == digest(sources())
    ((params, value),) = saved["results"]["cpu.Call.time_call"]["values"]
    assert params == ["'numbakern'", "'log_softmax'", "'8x10'"]
    assert 0 < value < 1
    assert str(ROOT) not in file.read_text()


def test_a_library_is_left_out(monkeypatch):
    """Neither measured beside the others, nor asked for a figure of its own, which is n/a."""
    from benchmarks import __main__ as command
    from benchmarks import cpu

    monkeypatch.setenv(suite.WITHOUT_SETTING, "")  # given back as it was
    monkeypatch.setattr(command, "run", lambda *_: iter([]))
    command.main(["--without", "jax", "--without", "scipy"])
    sweep = cpu.SweepRows()
    bench = sweep.bench(sweep.case("log_softmax", 1))
    assert [peer.name for peer in bench.peers] == [
        name for name in sweep.params[0][1:] if name not in ("jax", "scipy")
    ]
    with pytest.raises(NotImplementedError, match="left out"):
        sweep.setup("scipy", "log_softmax", 1)
    with pytest.raises(NotImplementedError, match="left out"):
        cpu.Call().setup("jax", "log_softmax", "8x10")


def test_what_cannot_run_is_told(monkeypatch, capsys):
    """In a line a class and reason; where nothing ran at all, the status says so too."""
    from benchmarks import __main__ as command

    speed = _of("cuda.Speed.track_x_copy")
    found = [(speed, (n,), math.nan, "no NVIDIA GPU") for n in range(3)]
    monkeypatch.setattr(command, "run", lambda *_: iter(found))
    assert command.main([]) == 1
    assert capsys.readouterr().out == "cuda.Speed: 3 n/a: no NVIDIA GPU\n"
    found.append((_of("startup.Import.track_seconds"), (), 0.01, ""))
    assert command.main([]) == 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["-b", "("], "expected a regular expression"),
        (["-b", "nothing of this name"], "nothing matches"),
        (["--without", "torch_compile"], "choose from"),
        (["--save", "x.json"], "expected --machine too"),
        (["--machine", "a/b"], "expected letters"),
        (["--machine", "a", "--save", "/nowhere/x.json", "-b", "startup.Import"], "/nowhere"),
    ],
)
def test_options_of_the_runner(options, line, capsys):
    from benchmarks import __main__ as command

    with pytest.raises(SystemExit):
        command.main(options)
    assert line in capsys.readouterr().err.splitlines()[-1]


def test_an_interrupted_run_keeps_what_it_had(tmp_path, monkeypatch, capsys):
    from benchmarks import __main__ as command

    def run(benchmarks, patterns):
        yield _of("startup.Import.track_seconds"), (), 0.01, ""
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", run)
    file = tmp_path / "measured.json"
    assert command.main(["--machine", "here", "--save", str(file)]) == 130
    results = bring_home.load(file)["results"]
    assert results["startup.Import.track_seconds"]["values"] == [[[], 0.01]]
    assert str(file) in capsys.readouterr().out


@NO_ASV
def test_the_history_is_measured_again(tmp_path, monkeypatch):
    """By one command, which leaves what was known of the machine."""
    from asv.machine import MachineCollection

    from benchmarks import history

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(history, "ROOT", tmp_path)
    folder = tmp_path / "results/here"
    folder.mkdir(parents=True)
    (folder / "machine.json").write_text("known")
    commands = []

    def run(command):
        commands.append(command)
        (folder / "machine.json").write_text("by asv")
        return 0

    brought = []
    monkeypatch.setattr(history, "status_of", run)
    monkeypatch.setattr(history.bring_home, "commits_of", lambda sources: iter(["0" * 40]))
    monkeypatch.setattr(history.bring_home, "main", lambda options: brought.append(options) or 0)
    assert history.main(["here", "--results", str(tmp_path / "results")]) == 0
    assert MachineCollection.load("here")["machine"] == "here"
    by_asv, here = commands
    assert (
        f"HASHFILE:{history.COMMITS}" in by_asv and by_asv[by_asv.index("--machine") + 1] == "here"
    )
    assert here[1:5] == ["-m", "benchmarks", "--machine", "here"]
    assert brought[0][0] == here[-1]
    monkeypatch.setattr(history.bring_home, "commits_of", lambda sources: iter([]))
    assert history.main(["here"]) == 1 and len(commands) == 2
    selected = [pattern for pattern in by_asv if pattern.startswith("^")]
    for section in ("cpu", "startup", "numerics"):
        found = [b for b in runner.discover() if b.section == section]
        assert any(list(b.selected(selected)) for b in found), section


def test_committed_results_name_no_machine_s_paths():
    files = list((ROOT / "benchmarks/results").glob("*/*.json"))
    assert files
    for path in files:
        text = path.read_text()
        assert "/" not in json.dumps(
            {k: v for k, v in json.loads(text).items() if k not in ("results", "durations")}
        ), path
        assert path.stat().st_size < 500_000
    for path in files:
        if path.name == "machine.json":
            assert json.loads(path.read_text())["machine"] == path.parent.name


# --- the regression check ------------------------------------------------------------------------


def test_the_ratio_bears_noise():
    case = regression.CASES[0]
    quiet = [1.0] * 16
    assert regression.Compared(case, quiet, [1.3] * 16, quiet).ratio == pytest.approx(1.3)
    # Most calls of one version are hit, and one of the other's is lucky.
    noisy = [1.0, 1.0, 1.0, *[3.0] * 13]
    assert regression.Compared(case, quiet, noisy, quiet).ratio == 1.0
    assert regression.Compared(case, [0.5, *quiet[1:]], quiet, quiet).ratio < 1.15
    assert regression.Compared(case, quiet, [2.0] * 4, [0.5] * 4).x_copy([2.0] * 4) == 4.0


def test_a_planted_slowdown_is_caught(tmp_path):
    for name in ("base", "slow"):
        shutil.copytree(PACKAGE, tmp_path / name / "numbakern")
    plant(tmp_path / "slow")
    case = Case("log_softmax", (256, 4000))
    (compared,) = regression.compare(tmp_path / "base", tmp_path / "slow", [case], rounds=4)
    assert compared.ratio > 1.3
    untouched = dataclasses.replace(compared, tree=compared.base)
    assert untouched.ratio == 1.0


def test_what_seems_slower_is_measured_again(monkeypatch):
    one, two, three, four = regression.CASES[:4]
    quiet = [1.0] * 16
    trees = {
        one: [quiet],
        two: [[1.4] * 16, quiet],  # the first processes were unlucky
        three: [[1.3] * 16, [1.2] * 16, [1.3] * 16],
        four: [[1.4] * 4 + [2.0] * 12] * 3,  # one version had four quiet moments, the other none
    }
    bases = dict.fromkeys(trees, quiet) | {four: [1.0] * 4 + [2.0] * 12}

    def compare(base, tree, cases, rounds):
        return [regression.Compared(case, bases[case], trees[case].pop(0), quiet) for case in cases]

    monkeypatch.setattr(regression, "compare", compare)
    found = {found.case: found for found in regression.measure(Path(), Path(), list(trees), 1.15)}
    assert not any(trees.values())
    expected = {one: "ok", two: "ok", three: "slower", four: "noisy"}
    assert {case: compared.verdict(1.15) for case, compared in found.items()} == expected


def test_noise_alone_gives_no_alarm():
    """However strong, it does not put a pair above the threshold more often than below."""
    rng = np.random.default_rng(0)

    def alarms(slowdown, noise):
        found = 0
        for _ in range(200):
            base, tree = np.exp(rng.standard_cauchy((2, 48)).clip(-99, 99) * noise)
            compared = regression.Compared(regression.CASES[0], base, slowdown * tree, base)
            found += compared.verdict(1.15) == "slower"
        return found

    assert [alarms(1.0, noise) for noise in (0.01, 0.1, 1.0)] == [0, 0, 0]
    assert alarms(1.3, 0.03) > 180
    pairs = regression.Compared(regression.CASES[0], [1.0] * 4, [2.0, 2.0, 2.0, 1.0], [1.0] * 4)
    assert pairs.chance(1.15) == 5 / 16


@pytest.mark.parametrize(
    ("options", "status", "line"),
    [
        (["--case", "nothing"], 2, "expected a part of one of log_softmax/512x32000/float32"),
        (["--rounds", "0"], 2, "expected 1 or more"),
        (["--base", "nowhere"], 1, "nowhere: expected a commit of this repository"),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_line(options, status, line, python):
    done = python("from benchmarks.regression import main; main()", *options, check=False)
    assert done.returncode == status
    assert line in done.stderr.splitlines()[-1]


def test_without_main_nothing_is_compared(monkeypatch, capsys):
    """A clone that holds one branch would be compared with itself."""
    monkeypatch.setattr(regression, "branch", lambda: "HEAD")
    with pytest.raises(SystemExit):
        regression.main([])
    assert "neither main nor origin/main" in capsys.readouterr().err


def test_a_version_that_cannot_run_is_skipped_by_bisect(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "numbakern")
    (tmp_path / "numbakern/__init__.py").write_text("raise ImportError\n")
    with pytest.raises(SystemExit) as ended:
        regression.compare(tmp_path, tmp_path, [Case("log_softmax", (8, 10))], rounds=1)
    assert ended.value.code == 125


def plant(folder):
    """Make log_softmax wait: other tests on the same cores cannot hide that."""
    file = folder / "numbakern/functional/log_softmax.py"
    text = file.read_text()
    line = '    target.softmax("log_softmax", x, axes, kind.compute, result)\n'
    assert text.count(line) == 1
    file.write_text(text.replace(line, line + '    __import__("time").sleep(0.05)\n'))
