"""What a client process does against the local hub: `python hub_client.py GROUP WORK_FOLDER`, see `test_hub.py`.

Two processes, because the hub's address must be set before anything is imported, and because one of them must never
see this package. Each prints one JSON object: name of a check -> "passed" or its traceback.
"""

import copy
import json
import os
import shutil
import sys
import traceback
import urllib.request
from pathlib import Path


GROUP, WORK = (sys.argv[1], Path(sys.argv[2])) if __name__ == "__main__" else ("", Path())


class Blocked:
    """Makes any import of this package fail."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "earthformer_hf":
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)")


if GROUP == "without_package":
    sys.meta_path.insert(0, Blocked())

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module  # noqa: E402
from huggingface_hub import HfApi, ModelCard  # noqa: E402
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError  # noqa: E402
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForTimeSeriesPrediction  # noqa: E402


CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\ntags: [earthformer]\n---\n\n# Ours\n\nWritten by hand.\n"
OPTIONS = {"ensemble_size": 2, "num_inference_steps": 2, "output_type": "pt"}


def raw_frames() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 254, (1, 3, 20, 28)).astype("float32")


def context() -> torch.Tensor:
    return torch.rand(1, 3, 12, 16, 1, generator=torch.Generator().manual_seed(5))


def ensemble(pipeline, guide=None) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(context(), **OPTIONS, generator=generator, callback_on_step_end=guide).predictions


@torch.no_grad()
def forecast(model, extractor) -> torch.Tensor:
    return model(**extractor(raw_frames())).predictions


def kept(name: str, value: torch.Tensor | None = None) -> torch.Tensor:
    """Between the processes: what a forecast was before it went to the hub."""
    path = WORK / f"{name}.pt"
    if value is not None:
        torch.save(value, path)
    return torch.load(path, weights_only=True)


def raises(kind, call, *words) -> str:
    try:
        call()
    except kind as error:
        message = str(error)
        assert all(word in message for word in words), message
        return message
    raise AssertionError(f"no {kind}")


# -- with this package ------------------------------------------------------------------------------------------------


def tiny_objects():
    from tiny import tiny_model, tiny_pipeline

    from earthformer_hf import EarthformerFeatureExtractor

    torch.manual_seed(0)
    extractor = EarthformerFeatureExtractor(scale=1 / 255, variable="rain code", units="1", valid_range=(0, 254))
    pipeline = tiny_pipeline(alignment=True, forecaster=True)
    pipeline.register_modules(feature_extractor=extractor)
    return tiny_model(), extractor, pipeline


def model():
    from earthformer_hf import EarthformerForPrediction, sharing

    network, extractor, _ = tiny_objects()
    before = kept("model", forecast(network, extractor))
    (WORK / "README.md").write_text(CARD)
    network.push_to_hub("someone/model", feature_extractor=extractor, card=WORK / "README.md", tag="v1")

    loaded = AutoModelForTimeSeriesPrediction.from_pretrained("someone/model", revision="v1")
    assert type(loaded) is EarthformerForPrediction  # and not the code of the repository
    again = AutoFeatureExtractor.from_pretrained("someone/model", revision="v1")
    assert type(again) is type(extractor) and again.variable == "rain code"
    assert torch.equal(forecast(loaded, again), before)
    assert ModelCard.load("someone/model").text.strip().endswith("Written by hand.")

    # what a repository gives, exported again, is the repository
    folder, loaded, again = sharing.load("someone/model", revision="v1")
    sharing.export(loaded, WORK / "again", again, folder / "README.md")
    for path in (WORK / "again").iterdir():
        other = HfApi().hf_hub_download("someone/model", path.name, revision="v1")
        assert path.read_bytes() == Path(other).read_bytes(), path.name

    # a later push: the pinned revision stays, the hand-written card too
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01)
    commit = sharing.push(network, "someone/model", extractor, max_shard_size="100KB")
    later = EarthformerForPrediction.from_pretrained("someone/model")
    assert torch.equal(forecast(later, extractor), forecast(network, extractor))
    assert not torch.equal(forecast(later, extractor), before)
    for revision in ("v1", HfApi().list_repo_refs("someone/model").tags[0].target_commit):
        pinned = EarthformerForPrediction.from_pretrained("someone/model", revision=revision)
        assert torch.equal(forecast(pinned, extractor), before)
    assert ModelCard.load("someone/model").text.strip().endswith("Written by hand.")
    files = HfApi().list_repo_files("someone/model", revision=commit.oid)
    assert "model.safetensors" not in files and sum(name.endswith(".safetensors") for name in files) > 1

    # saving pushes as well, if it is told to; another grid is adapted from a hub id
    network.save_pretrained(WORK / "saved", push_to_hub=True, repo_id="someone/saved")
    saved = EarthformerForPrediction.from_pretrained("someone/saved")
    assert torch.equal(forecast(saved, extractor), forecast(network, extractor))
    files = {path.name for path in (WORK / "saved").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors"}, files  # with the library's card
    wider = EarthformerForPrediction.from_pretrained("someone/saved", image_size=[20, 32])
    assert wider.model.encoder.position_embedding.width.weight.shape == (16, 16)

    # a branch of its own
    sharing.push(network, "someone/model", extractor, revision="trial")
    assert "model.safetensors" in HfApi().list_repo_files("someone/model", revision="trial")


def the_card_goes_first():
    titles = [commit.title for commit in HfApi().list_repo_commits("someone/model")][::-1]
    assert titles[1:3] == ["Upload the model card", "Upload EarthformerForPrediction"], titles
    assert titles.count("Upload the model card") == 1, titles


def pipeline():
    from earthformer_hf import KnowledgeAlignmentCallback, PreDiffPipeline

    _, _, pipe = tiny_objects()
    before = kept("pipeline", ensemble(pipe))
    kept("guided", ensemble(pipe, KnowledgeAlignmentCallback(0.9)))
    pipe.push_to_hub("someone/pipeline", tag="v1")
    loaded = PreDiffPipeline.from_pretrained("someone/pipeline", revision="v1")
    assert torch.equal(ensemble(loaded), before)
    assert loaded.feature_extractor.variable == "rain code"
    guide = KnowledgeAlignmentCallback.from_pretrained("someone/pipeline", target=0.9)
    assert torch.equal(ensemble(loaded, guide), kept("guided"))

    torch.nn.init.ones_(pipe.unet.out_proj.bias)
    pipe.push_to_hub("someone/pipeline")
    assert not torch.equal(ensemble(PreDiffPipeline.from_pretrained("someone/pipeline")), before)
    assert torch.equal(ensemble(PreDiffPipeline.from_pretrained("someone/pipeline", revision="v1")), before)


def half_precision():
    from earthformer_hf import sharing

    _, _, pipe = tiny_objects()
    sharing.push(pipe.to(torch.float16), "someone/half")
    folder, loaded, _ = sharing.load("someone/half")
    assert loaded.unet.dtype == loaded.vae.dtype == loaded.alignment.dtype == torch.float16
    assert torch.equal(ensemble(loaded), ensemble(pipe))


def feature_extractor():
    from earthformer_hf import EarthformerFeatureExtractor

    _, extractor, _ = tiny_objects()
    extractor.push_to_hub("someone/extractor", tag="v1")
    EarthformerFeatureExtractor(scale=2.0).push_to_hub("someone/extractor")
    assert EarthformerFeatureExtractor.from_pretrained("someone/extractor").scale == 2.0
    for loaded in (EarthformerFeatureExtractor, AutoFeatureExtractor):
        loaded = loaded.from_pretrained("someone/extractor", revision="v1")
        assert type(loaded) is EarthformerFeatureExtractor and loaded.valid_range == [0, 254]
        np.testing.assert_array_equal(loaded(raw_frames())["past_values"], extractor(raw_frames())["past_values"])


def dataset():
    from datasets import load_dataset
    from test_hosted import FACTS, encode, event, same_events, table_of
    from typer.testing import CliRunner

    from earthformer_hf import windows
    from earthformer_hf.cli import app
    from earthformer_hf.data.events import as_event
    from earthformer_hf.data.hosted import prepare, push

    events = [event(number, extras=True) for number in range(6)]
    tables = {"train": table_of(events[:4]), "test": table_of(events[4:])}
    prepare(tables, WORK / "events", FACTS, max_shard_size=1)
    push(WORK / "events", "someone/events")
    assert len(HfApi().list_repo_files("someone/events", repo_type="dataset")) == 6 + 3  # shards; two texts, git's one
    streamed = load_dataset("someone/events", split="train", streaming=True)
    same_events([as_event(row) for row in streamed], events[:4])
    for found, expected in zip(windows(streamed, encode, 3, 2), windows(events[:4], encode, 3, 2), strict=True):
        assert all(torch.equal(torch.as_tensor(found[name]), expected[name]) for name in expected)
    same_events([as_event(row) for row in load_dataset("someone/events", split="test")], events[4:])

    # other shards replace those of before, except at a revision that is pinned
    HfApi().create_tag("someone/events", tag="v1", repo_type="dataset")
    prepare(tables, WORK / "larger", FACTS)
    result = CliRunner().invoke(app, ["data", "push", str(WORK / "larger"), "someone/events"])
    assert result.exit_code == 0, result.output
    files = HfApi().list_repo_files("someone/events", repo_type="dataset")
    assert sorted(name for name in files if "parquet" in name) == [
        "data/test-00000-of-00001.parquet",
        "data/train-00000-of-00001.parquet",
    ]
    assert [row["id"] for row in load_dataset("someone/events", split="train", streaming=True)] == [
        made["id"] for made in events[:4]
    ]
    pinned = load_dataset("someone/events", split="train", streaming=True, revision="v1")
    same_events([as_event(row) for row in pinned], events[:4])
    raises(HfHubHTTPError, lambda: push(WORK / "larger", "someone/events", token="hf_wrong"), "401")
    result = CliRunner().invoke(app, ["data", "info", "someone/events"])
    assert result.exit_code == 0 and "| train | 4 | 36 |" in result.output, result.output
    picture = WORK / "events.png"
    result = CliRunner().invoke(app, ["data", "preview", "someone/events", str(picture), "--split", "test"])
    assert result.exit_code == 0 and picture.read_bytes().startswith(b"\x89PNG"), result.output
    result = CliRunner().invoke(app, ["data", "info", "someone/nothing"])
    assert result.exit_code == 1 and "someone/nothing" in result.output, result.output


def pull_request():
    from earthformer_hf import EarthformerForPrediction, sharing

    network, extractor, _ = tiny_objects()
    sharing.push(network, "someone/reviewed", extractor)
    before = HfApi().model_info("someone/reviewed").sha
    changed = copy.deepcopy(network)
    torch.nn.init.ones_(changed.head.out_proj.bias)
    (WORK / "README.md").write_text(CARD)
    commit = changed.push_to_hub(
        "someone/reviewed", create_pr=True, commit_message="Ones", tags=["ones"], card=WORK / "README.md"
    )
    assert commit.pr_url.endswith("/someone/reviewed/discussions/1") and commit.pr_revision == "refs/pr/1"
    assert HfApi().model_info("someone/reviewed").sha == before  # nothing of it is on the main branch
    assert "Written by hand." not in ModelCard.load("someone/reviewed").text
    proposed = EarthformerForPrediction.from_pretrained("someone/reviewed", revision=commit.pr_revision)
    assert torch.equal(forecast(proposed, extractor), forecast(changed, extractor))
    card = ModelCard(Path(HfApi().hf_hub_download("someone/reviewed", "README.md", revision="refs/pr/1")).read_text())
    assert card.data.tags == ["earthformer", "ones"] and "Written by hand." in card.text
    titles = [entry.title for entry in HfApi().list_repo_commits("someone/reviewed")][::-1]
    assert titles[3:] == ["Upload the model card", "Ones"], titles

    # without a card of its own it is one commit; a further push to the same pull request names its branch
    assert changed.push_to_hub("someone/reviewed", create_pr=True).pr_revision == "refs/pr/2"
    network.push_to_hub("someone/reviewed", revision="refs/pr/2")
    again = EarthformerForPrediction.from_pretrained("someone/reviewed", revision="refs/pr/2")
    assert torch.equal(forecast(again, extractor), forecast(network, extractor))
    raises(
        ValueError, lambda: sharing.push(network, "someone/reviewed", create_pr=True, revision="trial"), "`revision`"
    )


def weights_of(repo_id: str) -> list[str]:
    return sorted(name for name in HfApi().list_repo_files(repo_id) if "safetensors" in name)


def variants():
    from earthformer_hf import EarthformerForPrediction, PreDiffPipeline, sharing

    network, extractor, pipe = tiny_objects()
    network.push_to_hub("someone/variants")
    half = copy.deepcopy(network).half()
    half.push_to_hub("someone/variants", variant="fp16", max_shard_size="100KB")
    sharded = weights_of("someone/variants")
    assert {"model.safetensors", "model.safetensors.index.fp16.json"} < {*sharded} and len(sharded) > 3, sharded
    half.push_to_hub("someone/variants", variant="fp16")
    assert weights_of("someone/variants") == ["model.fp16.safetensors", "model.safetensors"]
    loaded = EarthformerForPrediction.from_pretrained("someone/variants")
    assert loaded.dtype == torch.float32 and torch.equal(forecast(loaded, extractor), forecast(network, extractor))
    loaded = EarthformerForPrediction.from_pretrained("someone/variants", variant="fp16").state_dict()
    assert all(tensor.dtype == half.state_dict()[name].dtype for name, tensor in loaded.items())
    assert all(torch.equal(tensor, half.state_dict()[name]) for name, tensor in loaded.items())
    network.push_to_hub("someone/variants", max_shard_size="100KB")
    sharded = weights_of("someone/variants")
    assert {"model.fp16.safetensors", "model.safetensors.index.json"} < {*sharded}, sharded
    assert "model.safetensors" not in sharded

    before = ensemble(pipe)
    commit = pipe.push_to_hub("someone/variants-of-a-pipeline", "A positional message")
    assert commit.commit_message == "A positional message"
    whole = weights_of("someone/variants-of-a-pipeline")
    pipe.to(torch.float16).push_to_hub("someone/variants-of-a-pipeline", variant="fp16")
    halves = [name.replace(".safetensors", ".fp16.safetensors") for name in whole]
    assert len(whole) == 4 and weights_of("someone/variants-of-a-pipeline") == sorted(whole + halves)
    assert torch.equal(ensemble(PreDiffPipeline.from_pretrained("someone/variants-of-a-pipeline")), before)
    loaded = PreDiffPipeline.from_pretrained(
        "someone/variants-of-a-pipeline", variant="fp16", torch_dtype=torch.float16
    )
    assert torch.equal(ensemble(loaded), ensemble(pipe))
    _, loaded, _ = sharing.load("someone/variants-of-a-pipeline")  # the weights of no variant
    assert loaded.unet.dtype == torch.float32 and torch.equal(ensemble(loaded), before)
    raises(ValueError, lambda: pipe.push_to_hub("someone/pickle", safe_serialization=False), "`safe_serialization`")
    raises(ValueError, lambda: pipe.push_to_hub("someone/below", subfolder="below"), "`subfolder`")


def interrupted_upload():
    from earthformer_hf import EarthformerForPrediction, sharing

    network, extractor, _ = tiny_objects()
    before = HfApi().model_info("someone/model").sha
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.5)

    def interrupt(process):
        token = {"Authorization": f"Bearer {os.environ['HF_TOKEN']}"}
        request = urllib.request.Request(f"{os.environ['HF_ENDPOINT']}/interrupt/{process}", b"", token)
        urllib.request.urlopen(request).close()

    interrupt(os.getpid())
    broken_off = (KeyboardInterrupt, RuntimeError)  # on a slow machine the library sees the connection end first
    raises(broken_off, lambda: sharing.push(network, "someone/model", extractor))
    interrupt(0)
    assert HfApi().model_info("someone/model").sha == before
    old = EarthformerForPrediction.from_pretrained("someone/model", force_download=True)
    assert not torch.equal(forecast(old, extractor), forecast(network, extractor))
    sharing.push(network, "someone/model", extractor)
    new = EarthformerForPrediction.from_pretrained("someone/model")
    assert torch.equal(forecast(new, extractor), forecast(network, extractor))


def refusals():
    from earthformer_hf import EarthformerForPrediction, PreDiffPipeline, sharing

    network, extractor, _ = tiny_objects()
    raises(
        HfHubHTTPError, lambda: sharing.push(network, "someone/model", token="hf_wrong"), "401", "Invalid credentials"
    )
    raises(OSError, lambda: EarthformerForPrediction.from_pretrained("someone/nothing"), "someone/nothing")
    raises(RepositoryNotFoundError, lambda: PreDiffPipeline.from_pretrained("someone/nothing"), "Repository Not Found")
    raises(RepositoryNotFoundError, lambda: sharing.load("someone/nothing"), "Repository Not Found")
    raises(OSError, lambda: EarthformerForPrediction.from_pretrained("someone/model", revision="v9"), "v9")
    raises(RevisionNotFoundError, lambda: sharing.load("someone/model", revision="v9"), "Revision Not Found")
    raises(ValueError, lambda: sharing.push(torch.nn.Linear(1, 1), "someone/linear"), "torch.nn")
    assert not HfApi().repo_exists("someone/linear")


def pictures_of_a_card():
    from typer.testing import CliRunner

    from earthformer_hf import sharing
    from earthformer_hf.cli import app

    network, extractor, _ = tiny_objects()
    folder = WORK / "illustrated"
    folder.mkdir()
    (folder / "README.md").write_text(f"{CARD}![rain](rain[1].png) ![elsewhere](https://example.org/x.png)")
    (folder / "rain[1].png").write_bytes(b"a picture")
    (folder / "scores.json").write_text("{}")
    sharing.push(network, "someone/illustrated", extractor, folder / "README.md")
    HfApi().upload_file(path_or_fileobj=b"large", path_in_repo="another.png", repo_id="someone/illustrated")
    result = CliRunner().invoke(app, ["hub", "export", "someone/illustrated", str(WORK / "exported")])
    assert result.exit_code == 0, result.output
    for name in ("README.md", "rain[1].png", "scores.json"):
        assert (WORK / "exported" / name).read_bytes() == (folder / name).read_bytes(), name
    cached, _, _ = sharing.load("someone/illustrated")
    assert (cached / "rain[1].png").is_file() and not (cached / "another.png").exists()


def command_line():
    from typer.testing import CliRunner

    from earthformer_hf.cli import app

    def run(*command):
        return CliRunner().invoke(app, ["hub", *map(str, command)])

    folder = WORK / "by_command"
    result = run("export", "someone/model", folder, "--revision", "v1")
    assert result.exit_code == 0, result.output
    assert (folder / "README.md").read_text() == CARD
    assert (folder / "model.safetensors").exists()
    result = run("push", folder, "someone/by-command", "--tag", "first")
    assert result.exit_code == 0 and "someone/by-command" in result.output, result.output
    assert "modeling_earthformer.py" in HfApi().list_repo_files("someone/by-command", revision="first")

    for path in folder.glob("*.safetensors"):
        path.unlink()
    result = run("push", folder, "someone/card-only")
    assert result.exit_code == 0, result.output
    assert "README.md" in HfApi().list_repo_files("someone/card-only")
    result = run("push", folder, "someone/card-only", "--token", "hf_wrong")
    assert result.exit_code == 1 and "Invalid credentials" in result.output, result.output


# -- without it -------------------------------------------------------------------------------------------------------


def the_package_is_absent():
    raises(ModuleNotFoundError, lambda: __import__("earthformer_hf"), "blocked")


def from_places(name: str):
    """A hub id and a folder with the same content."""
    folder = WORK / f"disk-{name}"
    if not folder.exists():
        shutil.copytree(HfApi().snapshot_download(f"someone/{name}", revision="v1"), folder)
    return (f"someone/{name}", {"revision": "v1"}), (str(folder), {})


def model_by_its_own_code():
    for place, options in from_places("model"):
        options |= {"trust_remote_code": True}
        network = AutoModelForTimeSeriesPrediction.from_pretrained(place, **options)
        extractor = AutoFeatureExtractor.from_pretrained(place, **options)
        assert "transformers_modules" in type(network).__module__
        torch.testing.assert_close(forecast(network, extractor), kept("model"), rtol=0, atol=0)
        assert extractor.variable == "rain code"
        headless = AutoModel.from_pretrained(place, **options)
        assert type(headless).__name__ == "EarthformerModel"
        assert AutoConfig.from_pretrained(place, **options).prediction_length == 4


def extractor_by_its_own_code():
    extractor = AutoFeatureExtractor.from_pretrained("someone/extractor", revision="v1", trust_remote_code=True)
    assert extractor.valid_range == [0, 254]


def pushed_by_its_own_code():
    """As the library pushes: this package's folders need this package."""
    network = AutoModelForTimeSeriesPrediction.from_pretrained("someone/model", revision="v1", trust_remote_code=True)
    network.push_to_hub("someone/by-its-own-code")
    files = HfApi().list_repo_files("someone/by-its-own-code")
    assert {"README.md", "config.json", "model.safetensors", "modeling_earthformer.py"} <= {*files}, files
    pipe = DiffusionPipeline.from_pretrained("someone/pipeline", revision="v1", trust_remote_code=True)
    pipe.push_to_hub("someone/pipeline-by-its-own-code", "By its own code")
    assert "unet/diffusion_pytorch_model.safetensors" in HfApi().list_repo_files("someone/pipeline-by-its-own-code")


def pipeline_by_its_own_code():
    for place, options in from_places("pipeline"):
        options |= {"trust_remote_code": True}
        pipe = DiffusionPipeline.from_pretrained(place, **options)
        assert type(pipe).__name__ == "PreDiffPipeline" and "diffusers_modules" in type(pipe).__module__
        assert torch.equal(ensemble(pipe), kept("pipeline"))
        assert pipe.feature_extractor.variable == "rain code"
        name = "KnowledgeAlignmentCallback"
        guidance = get_class_from_dynamic_module(place, "guidance.py", class_name=name, **options)
        assert torch.equal(ensemble(pipe, guidance(0.9)), kept("guided"))
        raises(ValueError, lambda: pipe(context()[:, :2]), "past_values")  # noqa: B023


def without_trust_nothing_runs():
    for place, _ in (*from_places("model"), *from_places("pipeline")):
        kind = AutoModelForTimeSeriesPrediction if "model" in place else DiffusionPipeline
        raises(ValueError, lambda: kind.from_pretrained(place), "trust_remote_code")  # noqa: B023


GROUPS = {
    "with_package": [
        model, the_card_goes_first, pipeline, feature_extractor, interrupted_upload, refusals, pictures_of_a_card,
        command_line,
    ],
    "more": [half_precision, dataset, pull_request, variants],
    "without_package": [
        the_package_is_absent, without_trust_nothing_runs, model_by_its_own_code, extractor_by_its_own_code,
        pipeline_by_its_own_code, pushed_by_its_own_code,
    ],
}  # fmt: skip


def main():
    results = {}
    for check in GROUPS[GROUP]:
        try:
            check()
            results[check.__name__] = "passed"
        except BaseException:
            results[check.__name__] = traceback.format_exc()
    (WORK / f"{GROUP}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
