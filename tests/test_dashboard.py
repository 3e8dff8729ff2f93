"""The dashboard: what is built, that it needs no internet, and how it looks in a browser."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import threading

import pytest

from benchmarks import ROOT, bounds, report, runner

for name in ("asv", "matplotlib"):
    pytest.importorskip(name)

from benchmarks.dashboard import page, readme, results, site  # noqa: E402

COMMITTED = ROOT / "benchmarks/results"
SECTION_GRAPHS = {
    "cpu": "cpu.Speed.track_x_copy?p-implementation='numbakern'",
    "cuda": "cuda.Speed.track_x_copy",
    "startup": "startup.FirstCall.track_seconds",
    "numerics": "numerics.Ulp.track_ulp",
}
X_AXES = {
    "text": ("cpu.Speed.track_x_copy?x-axis=function&p-dtype='float32'"),
    "numbers": ("cpu.SweepClasses.track_x_copy?x-axis=classes&p-dtype='float32'"),
}


@pytest.fixture
def no_scripts(tmp_path):
    """A node_modules with empty scripts in the right places."""
    folder = tmp_path / "node_modules"
    for package, _, file in site.SCRIPTS.values():
        path = folder / package / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("var AxeSize = minMaxValues[1] - minMaxValues[0];\n")
    return folder


@pytest.fixture
def has_history():
    """asv orders results by the commits they belong to."""
    shallow = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--is-shallow-repository"],
        capture_output=True,
        text=True,
    )
    if shallow.stdout.strip() != "false":
        pytest.skip("needs the history of the repository")


def test_the_pages_are_built_from_the_committed_results(has_history, no_scripts, tmp_path):
    folder = tmp_path / "site"
    site.build(folder, COMMITTED, no_scripts)
    for file in (folder / "index.html", folder / "commits.html", folder / "asv/index.html"):
        text = file.read_text()
        # Links may lead anywhere; nothing is fetched from elsewhere.
        assert not re.search(r'<(script|link|img)[^>]*(src|href)="https?:', text)
    front = (folder / "index.html").read_text()
    assert readme.MACHINE in front
    for name in re.findall(r'(?:src|srcset)="([^"]+\.svg)"', front):
        assert (folder / name).exists(), name
    for commit in re.findall(r"commits.html#(\w+)", front):
        assert f'id="{commit}"' in (folder / "commits.html").read_text()
    index = json.loads((folder / "asv/index.json").read_text())
    assert set(index["benchmarks"]) == {benchmark.name for benchmark in runner.discover()}
    machines = {m.name for m in results.machines(COMMITTED)}
    assert set(index["machines"]) == machines
    # Ten commits of the history at least.
    measured = {m.commit for machine in results.machines(COMMITTED) for m in machine.files}
    assert len(measured) >= 10


def test_a_folder_of_others_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SystemExit, match="expected a folder of the dashboard's own"):
        site.build(tmp_path, COMMITTED)
    assert (tmp_path / "thesis.tex").exists()


def test_what_an_interrupted_build_left_is_replaced(has_history, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(site, "publish", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            site.build(tmp_path / "site", COMMITTED)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("0.json", "{", "not a file of asv's results: Expecting"),
        ("0.json", "[]", "not a file of asv's results: no commit_hash"),
        ("0.json", "3", "not a file of asv's results"),
        ("machine.json", "{}", "not a file of asv's results: no machine"),
    ],
)
def test_a_file_that_holds_no_results_is_named(name, text, line, tmp_path):
    folder = tmp_path / "results/m"
    folder.mkdir(parents=True)
    (folder / "machine.json").write_text('{"machine": "m"}')
    (folder / name).write_text(text)
    with pytest.raises(SystemExit, match=line) as refused:
        site.build(tmp_path / "site", tmp_path / "results")
    assert f"m/{name}" in str(refused.value) and len(str(refused.value).splitlines()) == 1
    with pytest.raises(SystemExit, match="expected a folder with machine.json"):
        site.build(tmp_path / "site", tmp_path / "nowhere")


def test_the_readme_shows_the_latest_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text[text.index(readme.BEGIN) + len(readme.BEGIN) : text.index(readme.END)]
    assert shown == readme.table(COMMITTED)


def test_a_script_of_another_asv_is_noticed(tmp_path, no_scripts):
    folder = tmp_path / "asv"
    folder.mkdir()
    (folder / "index.html").write_text('<head><script src="https://a.b/new.js"></script></head>')
    with pytest.raises(SystemExit, match=r"not listed: https://a\.b/new\.js"):
        site.vendor(folder, no_scripts)


def test_the_columns_of_the_table():
    row = report.Row(bounds.CPU[0], 0.002, 130.0, {"numbakern": 1.1, "torch": 2.2})
    text = page.speed_table([row], "cpu")
    head = re.findall("<th>(.*?)</th>", text)
    cells = [re.sub("<.*?>", "", cell) for cell in re.findall("<td>(.*?)</td>", text)]
    shown = dict(zip(head, cells, strict=True))
    assert shown.pop("call").startswith("log_softmax(out=)(1024, 32000) float32")
    expected = {"× copy": "1.10", "must": "1.25", "goal": "1.05", "met": "must"}
    assert shown == expected | {"time": "2 ms", "GB/s": "130", "torch ÷ ours": "2.00"}


def test_addresses_of_graphs():
    address = page.graph("cpu.Speed.track_x_copy", shape="'8x10'", function="'nll_loss'")
    expected = "asv/index.html#cpu.Speed.track_x_copy?p-shape=%278x10%27&p-function=%27nll_loss%27"
    assert address == expected


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture
def chromium(has_history, tmp_path):
    """Gives (open a path of the built site at a size, the requests that went wrong)."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if program is None:
        pytest.skip("chromium is not installed")
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    try:
        scripts = site.fetch(ROOT / ".asv/npm")
    except SystemExit as error:
        pytest.skip(f"npm fetched nothing: {str(error).splitlines()[0]}")
    from playwright.sync_api import sync_playwright

    folder = tmp_path / "site"
    site.build(folder, COMMITTED, scripts)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/"
    wrong: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])

        def open_page(path, width=1280, dark=False):
            scheme = "dark" if dark else "light"
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            tab.on("pageerror", lambda error: wrong.append(f"{path}: {error}"))
            tab.on("requestfailed", lambda request: wrong.append(request.url))
            tab.on("response", lambda r: wrong.append(r.url) if r.status >= 400 else None)
            tab.on(
                "request",
                lambda r: None if r.url.startswith((base, "data:")) else wrong.append(r.url),
            )
            tab.goto(base + path)
            tab.wait_for_load_state("networkidle")
            return tab

        yield open_page, wrong
        browser.close()
    server.shutdown()
    server.server_close()


# How many pixels of the graph have a colour, which axes and grid do not.
COLOURED = """
canvas => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let count = 0;
  for (let i = 0; i < data.length; i += 4) {
    const most = Math.max(data[i], data[i + 1], data[i + 2]);
    const least = Math.min(data[i], data[i + 1], data[i + 2]);
    count += data[i + 3] > 0 && most - least > 40;
  }
  return count;
}
"""


def coloured(tab):
    graph = tab.locator("#main-graph canvas.flot-base")
    graph.wait_for()
    tab.wait_for_timeout(400)
    return graph.evaluate(COLOURED)


def test_the_pages_in_a_browser(chromium):
    """No request fails, the graphs of every section are drawn, parameters are x-axes."""
    open_page, wrong = chromium
    grid = open_page("asv/index.html")
    grid.locator("#summarygrid-display canvas").first.wait_for()
    open_page("asv/index.html#/summarylist")
    open_page("asv/index.html#/regressions")
    measured = {b for m in results.machines(COMMITTED) for file in m.files for b in file.values}
    for section, address in SECTION_GRAPHS.items():
        tab = open_page(f"asv/index.html#{address}")
        if address.partition("?")[0] in measured or section != "cuda":
            assert coloured(tab) > 50, address
    for address in X_AXES.values():
        assert coloured(open_page(f"asv/index.html#{address}")) > 50, address
    for width, dark in ((1280, False), (390, True)):
        front = open_page("index.html", width, dark)
        assert front.locator("h2").count() > 1
        assert front.evaluate("document.documentElement.scrollWidth") <= width
        ground = front.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
        assert front.evaluate(
            "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
        )
        address = front.locator("td a").first.get_attribute("href")
        assert coloured(open_page(address, width, dark)) > 50
    open_page("commits.html", 390, True)
    assert wrong == []
