import json
import math
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from dvae.errors import MachineError, UserError
from dvae.tracking.charts import Line, line_chart, linear_ticks, log_ticks, tick_label
from dvae.tracking.metrics_log import MetricsLog
from dvae.tracking.pictures import grid
from dvae.tracking.report import write_report
from dvae.utils import rng

PICTURES = ["heldout", "reconstructions", "refined_reconstructions", "vae_samples", "refined_samples"]


def faces(n: int, size: int, blur: int) -> torch.Tensor:
    """Round faces of keyed colors, so that a person can judge the page."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    out = []
    for i in range(n):
        back, skin, eye = torch.from_numpy(rng.generator(0, "face", i).random((3, 3, 1, 1))).float()
        image = 0.75 + 0.25 * back.expand(3, size, size)
        image = torch.where((x**2 + y**2 < 0.6), 0.35 + 0.6 * skin, image)
        image = torch.where(((x.abs() - 0.3) ** 2 + (y + 0.15) ** 2 < 0.012), 0.3 * eye, image)
        image = torch.where(((x**2 + (y - 0.2) ** 2 - 0.09).abs() < 0.025) & (y > 0.25), 0.4 * eye, image)
        out.append(image)
    images = torch.stack(out)
    if blur:
        images = torch.nn.functional.avg_pool2d(images, 2 * blur + 1, 1, blur, count_include_pad=False)
    return (255 * images).round().to(torch.uint8)


def figures(kid: float, fid: float, seeds: int = 3, n: int = 1000) -> dict:
    values = [kid * (1 + 0.02 * i) for i in range(seeds)]
    return {
        "n": n,
        "n_reference": 5000,
        "KID-lite0": {"mean": kid, "se": 0.0012 if seeds > 1 else None, "per_seed": values, "subset_std": values},
        "FID-lite0": {"mean": fid, "se": 1.1 if seeds > 1 else None, "per_seed": values},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with everything in it."""
    for name in PICTURES:
        grid(
            faces(32, 32, blur=2 if name in ("reconstructions", "vae_samples") else 0),
            tmp_path / "images" / f"{name}.png",
        )
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(50, 2001, 50):
        terms = {"loss": 900 / step + 3, "reconstruction": 800 / step + 2, "kl": 1 + step / 4000}
        log.append({"stage": "encoder", "step": step, **terms})
    for step in range(50, 6001, 50):
        noise = 1 + 0.1 * math.sin(step)
        by_time = {f"loss_t{i}": noise * (0.02 + 0.1 * (10 - i) / 10 + 8 / (step + 20)) for i in range(10)}
        log.append({"stage": "refiner", "step": step, "loss": noise * (0.05 + 20 / (step + 20)), **by_time})
    stages = {
        "shards": {"seconds": 41.2, "steps": None, "images_per_second": 291.0, "parameters": None},
        "encoder": {"seconds": 130.0, "steps": 2000, "images_per_second": 984.6, "parameters": 1_480_000},
        "prior": {"seconds": 3.1},
        "refiner": {"seconds": 480.0, "steps": 6000, "images_per_second": 400.0, "parameters": 2_840_000},
        "evaluate": {"seconds": 95.0},
    }
    protocol = {
        "backend": "torch-fidelity 0.4.0",
        "seeds": [0, 1, 2],
        "reference_sha256": "ab" * 32,
        "sampler": {"name": "ddim"},
    }
    evaluation = {
        "protocol": protocol,
        "sets": {"vae": figures(0.1834, 241.3), "refined": figures(0.0211, 88.2)},
        "floor": {"heldout": figures(0.0004, 31.0, seeds=1), "reference halves": figures(0.0005, 33.0, seeds=1)},
    }
    summary = {"recipe": "demo", "stages": stages, "evaluation": evaluation}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    long_line = "source: {path: " + "a/very/long/folder/" * 12 + "}\n"
    (tmp_path / "config.yaml").write_text(f"recipe: demo\nimage_size: 32\nnote: <script>alert(1)</script>\n{long_line}")
    return tmp_path


def sections(page: str) -> set[str]:
    return set(re.findall(r'<section id="(\w+)"', page))


ALL = {"samples", "results", "reconstructions", "metrics", "curves", "timings", "config"}


def test_everything_is_on_the_page(run):
    page = write_report(run).read_text()
    assert sections(page) == ALL
    assert page.count("<img") == 5
    assert page.count("<svg") == 5  # encoder: loss, reconstruction, kl; refiner: loss, loss by time
    for text in ("0.0211 ± 0.0012", "88.2 ± 1.1", "2.8 M", "12:29 in all", "torch-fidelity 0.4.0", "32 × 32 pixels"):
        assert text in page
    assert "<script>" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "FID</" not in page  # always FID-lite0


@pytest.mark.parametrize(
    ("missing", "lost"),
    [
        ("config.yaml", {"config"}),
        ("summary.json", {"results", "metrics", "timings"}),
        ("metrics.jsonl", {"curves"}),
        ("images", {"samples", "reconstructions"}),
    ],
)
def test_what_is_missing_is_left_out(run, missing, lost):
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert sections(write_report(run).read_text()) == ALL - lost


def test_an_empty_run_has_a_page_and_no_run_has_none(tmp_path):
    assert sections(write_report(tmp_path).read_text()) == set()
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "none")


def test_damaged_files_are_named(run):
    (run / "images" / "heldout.png").write_bytes(b"\x89PNG\r\n\x1a\nnot one")
    with pytest.raises(MachineError, match=r"heldout\.png: not a readable PNG"):
        write_report(run)
    (run / "summary.json").write_text("{")
    with pytest.raises(MachineError, match=r"summary\.json: damaged"):
        write_report(run)


def other_format(path: Path, kind: str) -> None:
    Image.new("RGB", (4, 4)).save(path, kind)


def huge(path: Path, side: int) -> None:
    """A small PNG whose header speaks of so many pixels."""
    other_format(path, "PNG")
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.mkdir, "is a folder, not a file"),
        (os.mkfifo, "is a pipe, not a file"),
        (Path.touch, "not a readable PNG"),
        (lambda path: other_format(path, "JPEG"), "not a readable PNG"),
        (lambda path: other_format(path, "GIF"), "not a readable PNG"),
        (lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not a readable PNG"),
        (lambda path: path.write_text("<svg/>"), "not a readable PNG"),
        (lambda path: huge(path, 9000), "9000x9000 pixels, more than"),
        (lambda path: huge(path, 10_000), "exceeds limit"),
        (lambda path: huge(path, 2**16), "exceeds limit"),
        (lambda path: path.touch() or os.truncate(path, 2**40), "bytes, more than"),
    ],
)
def test_a_picture_that_is_none_is_one_line(run, make, reason):
    path = run / "images" / "refined_samples.png"
    path.unlink()
    make(path)
    with pytest.raises(MachineError) as error:
        write_report(run)
    assert str(error.value).startswith(f"{path}: ")
    assert reason in str(error.value)
    assert str(error.value).endswith("run the evaluate stage again")
    assert len(str(error.value).splitlines()) == 1


SCRIPT = "<script>alert(1)</script>"
QUOTE = '"><script>alert(1)</script>'


def test_what_a_hostile_folder_says_never_becomes_a_tag(run):
    log = MetricsLog(run / "metrics.jsonl")
    for step in (1, 2):
        figures_of_time = {f"loss_t{i}": 0.5 for i in range(10)} | {"confidence_real": 0.5, "confidence_fake": 0.5}
        log.append({"stage": SCRIPT, "step": step, "loss": 1.0, "kl": 2.0, SCRIPT: SCRIPT} | figures_of_time)
        log.append({"stage": QUOTE, "step": step, "loss": 1.0})
    sets = {SCRIPT: figures(0.1, 20.0), QUOTE: figures(0.1, 20.0)}
    evaluation = {
        "protocol": {SCRIPT: SCRIPT, "x": {SCRIPT: SCRIPT}, "y": [QUOTE], "a_sha256": SCRIPT, "b_sha256": 3},
        "sets": sets,
        "floor": {"f" + SCRIPT: figures(0.1, 20.0)},
        "points": {"classes": {SCRIPT: {"sliced_wasserstein": {"mean": 1, "se": 0.1}, "floor": {"mean": 0}}}},
    }
    summary = {"recipe": SCRIPT, "stages": {SCRIPT: {"seconds": 1.0}, QUOTE: {}}, "evaluation": evaluation}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.yaml").write_text(f"recipe: {SCRIPT}\nimage_size: {SCRIPT!r}\n</pre>: {SCRIPT}\n")
    page = write_report(run).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 15
    assert page.count("</pre>") == 1
    tags = set(re.findall(r"<(\w+)", page))
    assert tags <= set(re.findall(r"<(\w+)", write_report_of_nothing(run))) | {"td", "tr", "b", "dt", "dd", "circle"}
    assert not re.search(r"<[^>]*\son\w+=", page)  # no event handlers


def write_report_of_nothing(run: Path) -> str:
    """A page of harmless files with every section."""
    (run / "summary.json").write_text(json.dumps({"stages": {"a": {}}, "evaluation": {
        "sets": {"a": figures(0.1, 20.0)}, "protocol": {"a": "b"}, "points": {"classes": {"a": {
            "sliced_wasserstein": {"mean": 1, "se": 0.1}, "floor": {"mean": 1}}}}}}))  # fmt: skip
    (run / "config.yaml").write_text("recipe: demo\n")
    return write_report(run).read_text()


def test_labels_of_a_chart_are_escaped():
    svg = line_chart([Line(QUOTE, [(0, 1), (1, 2)]), Line("b", [(0, 1)])], SCRIPT, QUOTE)
    assert "<script" not in svg
    assert svg.count("&lt;script&gt;") == 6  # legend, both axes, and three times in the label for screen readers
    assert re.search(r'aria-label="[^"<>]*"', svg)


@pytest.mark.parametrize(
    "points",
    [
        [(0, 1e308), (1, -1e308)], [(0, 5e-324), (1, 1e-323)], [(0, 1e149), (1, -1e149)], [(2**63, 1.0), (0, 2.0)],
        [(0, 1e15), (1, 1e15 + 0.125)], [(0, 1e-320), (1, 1e140)], [(0, -0.0), (1, 0.0)], [(7, 3.0), (7, 3.0)],
        [(0, math.inf), (1, 1.0)],
    ],
)  # fmt: skip
def test_numbers_of_any_size_make_a_chart_or_none(points):
    svg = line_chart([Line("a", points)], "step", "loss")
    assert svg == "" or (svg.startswith("<svg") and "nan" not in svg and "inf" not in svg)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", "[]"), ("summary.json", '{"stages": []}'), ("summary.json", '{"stages": {"encoder": 3}}'),
        ("summary.json", '{"stages": {"encoder": {"seconds": "1"}}}'), ("summary.json", '{"recipe": {"a": 1}}'),
        ("summary.json", '{"stages": {"encoder": {"seconds": NaN}}}'),
        ("summary.json", '{"stages": {"encoder": {"seconds": 1e300}}}'),
        ("summary.json", '{"evaluation": {"sets": {"vae": {"KID-lite0": {"se": 1}}}}}'),
        ("summary.json", '{"evaluation": {"sets": {"vae": {"KID-lite0": {"mean": "1"}}}}}'),
        ("summary.json", '{"evaluation": {"protocol": []}}'),
        ("summary.json", '{"evaluation": {"reconstructions": {"psnr": 1}}}'),
        ("summary.json", '{"evaluation": {"points": {"classes": {"a": {}}}}}'),
        ("summary.json", '{"recipe": "a", "recipe": "b"}'), ("summary.json", "[" * 100_000),
        ("config.yaml", "a: ["), ("config.yaml", "- a\n- b\n"), ("config.yaml", "a: 1\na: 2\n"),
        ("config.yaml", "a: &x [1]\nb: *x\n"), ("config.yaml", "!!python/object:os.system {}"),
        ("config.yaml", "text"), ("config.yaml", "\x00"), ("metrics.jsonl", "{}\n"),
    ],
)  # fmt: skip
def test_every_damaged_record_is_one_line(run, name, text):
    (run / name).write_text(text)
    with pytest.raises(MachineError) as error:
        write_report(run)
    assert str(error.value).startswith(f"{run / name}: ")
    assert len(str(error.value).splitlines()) == 1


def test_null_is_as_good_as_nothing(run):
    record = {"seconds": None, "steps": None, "images_per_second": None, "parameters": None}
    floor = {"heldout": {"KID-lite0": None, "n": None}}
    evaluation = {"protocol": None, "sets": None, "floor": floor, "reconstructions": None, "points": None}
    summary = {"recipe": None, "stages": {"encoder": record}, "evaluation": evaluation, "figures": None}
    (run / "summary.json").write_text(json.dumps(summary))
    assert sections(write_report(run).read_text()) == ALL - {"results"}


def test_wide_pictures_are_scaled_down(tmp_path):
    grid(torch.zeros(8, 3, 256, 256, dtype=torch.uint8), tmp_path / "images" / "heldout.png")
    assert 'width="1600"' in write_report(tmp_path).read_text()
    assert Image.open(tmp_path / "images" / "heldout.png").width == 8 * 256 + 7


def test_chart_places_points_where_the_axes_say():
    svg = line_chart([Line("a", [(0.0, 1.0), (5.0, 10.0), (10.0, 100.0)])], "step", "loss")
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', svg).group(1).split()]
    assert points == [(66.0, 228.0), (231.0, 120.0), (396.0, 12.0)]  # log y: 10 is half-way between 1 and 100
    assert "loss (log)" in svg
    assert "(log)" not in line_chart([Line("a", [(0.0, -1.0), (1.0, 10.0)])], "step", "loss")
    assert line_chart([Line("a", [(0.0, math.nan)]), Line("b", [])], "step", "loss") == ""
    assert "<circle" in line_chart([Line("a", [(3.0, 2.0)])], "step", "loss")


def test_long_curves_keep_their_mean_and_lose_points():
    svg = line_chart([Line("a", [(float(i), float(i % 2)) for i in range(2400)])], "step", "loss")
    points = re.search(r'points="([^"]+)"', svg).group(1).split()
    assert len(points) == 240
    assert len({p.split(",")[1] for p in points}) == 1


def test_ticks_and_their_labels():
    assert linear_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert linear_ticks(50, 6000) == [1000, 2000, 3000, 4000, 5000, 6000]
    assert linear_ticks(0.05, 0.95) == [0.2, 0.4, 0.6, 0.8]
    assert linear_ticks(3, 3) == [3]
    assert log_ticks(0.5, 2000) == [1, 10, 100, 1000]
    assert log_ticks(3, 40) == [5, 10, 20]
    assert [tick_label(v) for v in (0, 0.001, 250, 6000, 20000, 3e6)] == ["0", "0.001", "250", "6000", "20k", "3M"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver, which are not installed")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("name", "width", "height"), [("desktop", 1280, 900), ("phone", 390, 844)])
def test_in_a_real_browser(run, tmp_path_factory, name, width, height, dark):
    """Screenshots go to the folder named by REPORT_SCREENSHOTS, so that a person can look at them."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-sync", "no-first-run", "hide-scrollbars", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    page = write_report(run)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as browser:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": name == "phone"}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        browser.get(page.as_uri())
        browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert (
            browser.execute_script("return document.documentElement.scrollWidth <= innerWidth && innerWidth") == width
        )
        shown = browser.execute_script(
            "return [...document.images].map(i => i.naturalWidth > 0 && i.clientWidth > 250 && i.alt != '')"
        )
        assert shown == [True] * 5
        smallest = browser.execute_script(
            "return Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
        )
        assert smallest >= 12  # pixels: charts stay readable
        assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert page.as_uri() in asked
        assert [url for url in asked if url.startswith(("http", "ws"))] == []
        folder = Path(os.environ.get("REPORT_SCREENSHOTS", tmp_path_factory.mktemp("screenshots")))
        size = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        screen |= {"height": math.ceil(size["height"])}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        folder.mkdir(parents=True, exist_ok=True)
        assert browser.save_screenshot(str(folder / f"report-{name}-{'dark' if dark else 'light'}.png"))


def test_the_discriminators_confidences_share_a_chart(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        real, fake = 0.5 + 0.1 * step, 0.5 - 0.1 * step
        log.append({"stage": "encoder", "step": step, "loss": 1.0, "confidence_real": real, "confidence_fake": fake})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    (label,) = re.findall(r'aria-label="(probability of being real[^"]*)"', page)
    assert label.endswith("images, reconstructions")
