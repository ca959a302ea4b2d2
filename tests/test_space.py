"""The demo: its forecasts are the package's, bad files are refused in one line, and the page works in a browser."""

import copy
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml
from archive_data import EXTRACTOR, rain, save_model
from tiny import DATA, ROOT, tiny_model, tiny_pipeline

from earthformer_hf.data.simulated import rain_events
from earthformer_hf.forecasting import forecast
from earthformer_hf.forecasting.nowcasters import load_nowcaster


SPACE = ROOT / "examples/space"
ENSEMBLE = {"members": 3, "steps": 2, "sigma": 0}


@pytest.fixture
def app(monkeypatch):
    pytest.importorskip("gradio", reason="needs the extra `demo`")
    monkeypatch.syspath_prepend(SPACE)
    import app

    yield app
    del sys.modules["app"]


@pytest.fixture
def model():
    return load_nowcaster(tiny_model(), EXTRACTOR)


@pytest.fixture
def ensemble():
    """Of tiles of 12 x 16; it knows the usual change."""
    pipeline = tiny_pipeline(alignment=True)
    usual = {"mean": 0.1, "deviation": 0.1, "change_mean": 0.0, "change_deviation": 0.01}
    pipeline.alignment.register_to_config(statistics=usual)
    return load_nowcaster(pipeline, EXTRACTOR)


@pytest.fixture
def upload(tmp_path):
    """Ten frames, 10 minutes apart, of 20 x 28."""
    rain(10).to_netcdf(tmp_path / "radar.nc")
    return str(tmp_path / "radar.nc")


def test_the_header_of_the_space():
    _, header, _ = (SPACE / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(header)
    assert facts["sdk"] == "gradio" and (SPACE / facts["app_file"]).is_file()
    assert f"gradio=={facts['sdk_version']}" in (ROOT / "constraints.txt").read_text().split()
    for name in facts["models"]:
        namespace, _, folder = name.partition("/")
        assert namespace == "<your-namespace>" and list((ROOT / "model_cards" / folder).rglob("*.safetensors"))
    assert "earthformer-hf[eval,geo,plot] @" in (SPACE / "requirements.txt").read_text()


def test_models_of_the_variable(app, tmp_path, monkeypatch):
    one, many = save_model(tmp_path / "one"), save_model(tmp_path / "many", pipeline=True)
    monkeypatch.setenv("EARTHFORMER_HF_MODELS", f"{one}, {many}")
    models = app.load_models()
    assert list(models) == [str(many), str(one)]  # ensembles first
    page = app.build(models).get_config_file()["components"]
    assert {"Model", "Storm", "Members", "Guidance by n sigma"} <= {each["props"].get("label") for each in page}
    monkeypatch.setenv("EARTHFORMER_HF_MODELS", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="`model`: no folder"):
        app.load_models()
    monkeypatch.delenv("EARTHFORMER_HF_MODELS")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no model of rain"):
        app.load_models()


def test_storms_are_simulated_where_there_are_no_data(app, tmp_path, monkeypatch):
    monkeypatch.setenv("EARTHFORMER_HF_DATA", str(tmp_path))
    label, storms = app.storms("10m")
    assert label == "simulated rain (not real)" and list(storms) == [f"storm {n}" for n in range(1, 5)]
    events = rain_events(8, minutes=10)
    wettest = max(events, key=lambda event: event["values"].mean())
    first = storms["storm 1"]
    np.testing.assert_allclose(first, wettest["values"], rtol=0.1, atol=0.06)  # coded
    assert first["time"][1] - first["time"][0] == np.timedelta64(10, "m")
    assert first["y"][0] > first["y"][1] and float(first["x"][1] - first["x"][0]) == 3000
    assert float(first.mean()) > float(storms["storm 4"].mean())


def test_a_storm_without_dates_is_counted_from_2000_and_says_so(app):
    if not (DATA / "radar_open_10min_3km.h5").exists():
        pytest.skip("open radar data: set EARTHFORMER_HF_DATA")
    label, storms = app.storms("10m")
    assert "real radar" in label and "dates unknown" in label
    assert str(storms["storm 1"]["time"].values[1])[:16] == "2000-01-01T00:10"


def test_the_forecast_of_a_file_is_that_of_the_package(app, model, ensemble, upload):
    result = app.forecast_files([upload], model, False, {}, {})
    xr.testing.assert_equal(result.dataset, forecast(model, upload))
    held_back = app.forecast_files([upload], model, True, {}, {})
    xr.testing.assert_equal(held_back.dataset, forecast(model, upload, until="2020-06-01T00:50"))
    assert held_back.dataset["time"][-1] == rain(10)["time"][-1]
    members = app.forecast_files([upload], ensemble, True, ENSEMBLE, {"units": " "}).dataset
    options = {"ensemble_size": 3, "num_inference_steps": 2, "mean": True, "thresholds": app.THRESHOLDS}
    xr.testing.assert_equal(members, forecast(ensemble, upload, until="2020-06-01T01:10", **options))


def test_guidance_is_of_models_that_know_the_usual_change(app, model, ensemble, upload):
    assert [app.can_be_guided(each) for each in (ensemble, model)] == [True, False]
    assert not app.can_be_guided(load_nowcaster(tiny_pipeline(), EXTRACTOR))
    more = app.forecast_files([upload], ensemble, True, ENSEMBLE | {"sigma": 1.5}, {}).dataset
    assert more.attrs["guide"] == "change=+1.5sigma"
    assert "guide" not in app.forecast_files([upload], ensemble, True, ENSEMBLE, {}).dataset.attrs


def test_scores_are_those_of_a_naive_loop(app, model, ensemble, upload):
    result = app.forecast_files([upload], model, True, {}, {})
    known, found = rain(10)["rain"].values, result.dataset["rainfall_rate"].values
    text = app.scores(result, 2.0)
    for name, values in (("forecast", found), ("persistence", np.stack([known[5]] * 4))):
        hits = ((values >= 2) & (known[6:] >= 2)).sum()
        csi = hits / ((values >= 2) | (known[6:] >= 2)).sum()
        assert f"| {name} | {np.abs(values - known[6:]).mean():.3f} | {csi:.3f} |" in text
    assert "CRPS" not in text
    members = app.forecast_files([upload], ensemble, True, ENSEMBLE, {})
    values, known = members.dataset["rainfall_rate"].values, known[8:]
    pairs = sum(np.abs(values[i] - values[j]) for i in range(3) for j in range(i))
    crps = (np.abs(values - known).mean(0) - pairs / 6).mean()
    assert f"CRPS of the members: {crps:.3f} mm/h" in app.scores(members, 2.0)
    assert "What followed is not known" in app.scores(app.forecast_files([upload], model, False, {}, {}), 2.0)


@pytest.mark.slow
def test_pictures_and_the_folder_that_goes_with_them(app, model, ensemble, upload):
    from PIL import Image

    result = app.forecast_files([upload], ensemble, True, ENSEMBLE, {})
    with Image.open(app.animation(result, 2.0)) as moving:
        assert moving.n_frames == 6 + 2  # observed, and forecast
    low, high = (Image.open(app.chance_map(result, threshold)).convert("L") for threshold in (0.5, 10.0))
    assert low.size == high.size and low.tobytes() != high.tobytes()
    first, last = (Image.open(app.maps(result, lead)).convert("L") for lead in ("10m", "20m"))
    assert first.size == last.size and first.tobytes() != last.tobytes()
    folder = Path(result.folder.name)
    assert folder.is_dir()
    del result
    assert not folder.exists()
    single = app.forecast_files([upload], model, True, {}, {})
    assert app.chance_map(single, 1.0) is None
    assert Path(app.maps(single, "10m")).stat().st_size > 10_000


def test_images_of_one_time_each(app, model, tmp_path):
    pytest.importorskip("rioxarray")
    frames = rain(4)["rain"]
    for number in range(4):
        image = frames.isel(time=number, drop=True).rio.write_crs("EPSG:3035")
        image.attrs.pop("grid_mapping", None)
        image.rio.to_raster(tmp_path / f"r_{number}.tif")
    paths = [str(path) for path in sorted(tmp_path.glob("*.tif"))]
    about = {"units": "mm/h", "time_step": "10m", "start": "2020-06-01T00:00", "grid_spacing": ""}
    found = app.forecast_files(paths, model, False, {}, about).dataset
    np.testing.assert_allclose(found["rainfall_rate"], forecast(model, rain(4))["rainfall_rate"], atol=1e-5)


def bad_file(kind, folder):
    path = folder / "radar.nc"
    data = rain(2 if kind == "short" else 10)
    if kind == "units":
        del data["rain"].attrs["units"]
    if kind == "large":
        data = xr.Dataset({"rain": (("time", "y", "x"), np.zeros((3, 401, 401), "float32"), data["rain"].attrs)})
        data = data.assign_coords(rain(3, shape=(401, 401)).coords)
    data.to_netcdf(path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    if kind in ("garbage", "<b>"):
        path = path.rename(folder / f"{kind}.nc")
        path.write_bytes(b"not a file")
    return str(path)


@pytest.mark.parametrize(
    "kind, text",
    [
        ("garbage", "garbage.nc is not hdf5 or netcdf3, it begins with"),
        ("<b>", "&lt;b&gt;.nc is not hdf5"),
        ("cut", "radar.nc "),
        ("short", "`data`: 3 frames without a hole are needed, there are 2"),
        ("units", "`units` states those of the data"),
        ("large", "the map has 160801 cells of 3 km, at most 160000"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(app, model, tmp_path, kind, text):
    import gradio

    path = bad_file(kind, tmp_path)
    with pytest.raises(gradio.Error) as failure:
        app.says_why(app.forecast_files)([path], model, False, {}, {})
    message = failure.value.message
    assert text in message and "\n" not in message and "/upload-" not in message and str(tmp_path) not in message


def test_no_file_too_much_and_two_alike(app, model, upload, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="choose a file first"):
        app.forecast_files(None, model, False, {}, {})
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="two files have the same name"):
        app.forecast_files([upload, shutil.copy(upload, tmp_path / "other")], model, False, {}, {})
    monkeypatch.setattr(app, "MAX_UPLOAD", Path(upload).stat().st_size - 1)
    with pytest.raises(ValueError, match="larger than 0 MB together"):
        app.forecast_files([upload], model, False, {}, {})


# ---------------------------------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `demo`")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs a Chromium")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def address(app, tmp_path, monkeypatch):
    """The page with the shipped models and simulated storms."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("EARTHFORMER_HF_DATA", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    demo = app.build(app.load_models())
    options = copy.copy(app.LAUNCH) | {"max_file_size": 10**6}
    yield demo.launch(prevent_thread_lock=True, quiet=True, **options)[1]
    demo.close()


def opened(browser, address, width, problems):
    """The page, whose errors join the problems."""
    page = browser.new_context(viewport={"width": width, "height": 844}).new_page()
    page.set_default_timeout(60_000)
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("response", lambda response: response.ok or problems.append(f"{response.status} {response.url}"))
    page.on("request", lambda request: re.match(f"{address}|data:|blob:", request.url) or problems.append(request.url))
    page.goto(address)
    page.get_by_role("button", name="Forecast", exact=True).wait_for()
    return page


def picture(page):
    """The source of the picture that is seen, when it has been loaded."""
    image = page.locator(".picture img:visible")
    image.wait_for()
    page.wait_for_function("image => image.complete && image.naturalWidth > 300", arg=image.element_handle())
    return image.get_attribute("src")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_choose_slide_click_and_look(browser, address, tmp_path, width):
    problems = []
    page = opened(browser, address, width, problems)
    assert page.get_by_text("simulated rain (not real)").is_visible()
    page.get_by_role("combobox", name="Storm").click()
    page.get_by_role("option", name="storm 2").click()
    page.get_by_label("number input for Members").fill("2")
    page.get_by_label("number input for Denoising steps").fill("2")
    page.get_by_label("range slider for Guidance").press("ArrowRight")  # by a step of 0.5
    page.get_by_role("button", name="Forecast", exact=True).click()
    assert picture(page).endswith("forecast.gif")
    page.get_by_role("tab", name="Chance").click()
    before = picture(page)
    page.get_by_label("10", exact=True).check()
    page.wait_for_function("before => !document.body.innerHTML.includes(before)", arg=before)
    assert picture(page).endswith("chance.png")
    page.get_by_role("tab", name="Members").click()
    assert picture(page).endswith("maps.png")
    page.get_by_role("tab", name="Scores").click()
    page.get_by_role("cell", name="persistence").wait_for()
    page.get_by_text("CSI at 10 mm/h").wait_for()
    with page.expect_download() as download:
        page.get_by_text("Download NetCDF").click()
    download.value.save_as(tmp_path / "forecast.nc")
    with xr.open_dataset(tmp_path / "forecast.nc") as dataset:
        assert dataset.sizes["realization"] == 2 and dataset.attrs["guide"] == "change=+0.5sigma"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert problems == []


@pytest.fixture
def with_files(browser, address):
    """Open a page, choose a model that makes one forecast, and a file."""

    def opened_with(path, problems):
        page = opened(browser, address, 390, problems)
        page.get_by_role("combobox", name="Model").click()
        page.get_by_role("option", name="earthformer-radar-small").click()
        page.get_by_label("number input for Members").wait_for(state="hidden")
        page.get_by_label("files of mine").check()
        page.locator("input[type=file]").set_input_files(path)
        return page

    return opened_with


@pytest.mark.slow
def test_a_file_by_a_model_that_makes_one_forecast(with_files, upload):
    problems = []
    page = with_files(upload, problems)
    page.get_by_text("radar.nc").wait_for()
    page.get_by_label("Hold back").check()
    page.get_by_role("button", name="Forecast", exact=True).click()
    page.locator(".toast-body", has_text="7 frames without a hole are needed, there are 4").wait_for()
    page.get_by_label("Hold back").uncheck()
    page.get_by_role("button", name="Forecast", exact=True).click()
    assert picture(page).endswith("forecast.gif")
    page.get_by_role("tab", name="Members").click()
    assert picture(page).endswith("maps.png")
    page.get_by_role("tab", name="Chance").click()
    page.get_by_text("members of an ensemble").wait_for()
    assert not page.locator(".picture img:visible").count()
    page.get_by_role("tab", name="Scores").click()
    page.get_by_text("What followed is not known").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert problems == []


@pytest.mark.slow
def test_wrong_files_are_said_on_the_page(with_files, tmp_path):
    problems = []
    (tmp_path / "wrong.nc").write_bytes(b"not a file")
    page = with_files(tmp_path / "wrong.nc", problems)
    page.get_by_text("wrong.nc").wait_for()
    page.get_by_role("button", name="Forecast", exact=True).click()
    page.locator(".toast-body", has_text="wrong.nc is not hdf5 or netcdf3").wait_for()
    assert problems == []
    # gradio itself leaves an error in the console: it asks how far an upload is that it has refused
    (tmp_path / "large.nc").write_bytes(bytes(10**6 + 1))
    page = with_files(tmp_path / "large.nc", [])
    page.locator(".toast-body", has_text="exceed the maximum allowed size").wait_for()
