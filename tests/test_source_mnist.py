"""N-body MNIST and MovingMNIST."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import DATA, ROOT

from earthformer_hf.data import load_dataset, moving_mnist, nbody_mnist, windows
from earthformer_hf.data.nbody_mnist import n_body_energy
from earthformer_hf.feature_extraction_earthformer import EarthformerFeatureExtractor


sys.path.append(str(ROOT / "benchmarks"))
from nbody_loop import draw, nbody_loop  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random "digits" of many sizes, in the layouts of the open and of the published file."""
    folder = tmp_path_factory.mktemp("digits")
    random = np.random.default_rng(0)
    images = np.zeros((50, 28, 28), "uint8")
    for image in images:
        (top, left), (height, width) = random.integers(0, 8, 2), random.integers(8, 20, 2)
        image[top : top + height, left : left + width] = random.integers(1, 256, (height, width))
    split = np.where(np.arange(50) < 30, "train", np.where(np.arange(50) < 40, "val", "test"))
    np.savez(folder / "digits.npz", images=images, split=split)
    np.savez(folder / "mnist.npz", X=images.reshape(50, 784), Y=np.zeros(50))
    np.save(folder / "digits.npy", images)
    return folder


def nbody(folder, cache, split, digits="digits.npz", sizes=(6, 4, 3), **options):
    options |= {"digits": digits, "sizes": sizes, "data_dir": folder, "cache_dir": cache, "streaming": True}
    return list(load_dataset("nbody-mnist", split=split, **options))


# -- N-body MNIST -----------------------------------------------------------------------------------------------------


def test_sequences_are_those_of_a_plain_loop(folder, tmp_path):
    images = np.load(folder / "digits.npy")
    for event in nbody(folder, tmp_path, "train"):
        crops, _ = nbody_mnist.load_digits(str(folder / "digits.npz"))
        number = int(event["id"].split(":")[1])
        (chosen,), _, _, _ = nbody_mnist._random_motions(0, "train", range(number, number + 1), 50)
        digits = [images[i][np.ix_(images[i].any(1), images[i].any(0))].astype("float32") for i in chosen]
        positions, velocities = event["series"]["positions"], event["series"]["velocities"]
        frames, expected_positions, expected_velocities = nbody_loop(digits, positions[0], velocities[0])
        np.testing.assert_allclose(positions, expected_positions, atol=1e-3)
        np.testing.assert_allclose(velocities, expected_velocities, atol=1e-4)
        drawn = nbody_mnist.render(crops[chosen], expected_positions)  # a rounding error may move a place by 1/32
        np.testing.assert_allclose(drawn, frames, atol=1e-2)
        np.testing.assert_array_equal(nbody_mnist.render(crops[chosen], positions), event["values"][:])
        assert event["values"].shape == (20, 64, 64) and event["values"].dtype == "float32"
        assert 0 <= drawn.min() and 100 < drawn.max() <= 255
        np.testing.assert_array_equal(event["values"][3:9:2], event["values"][:][3:9:2])


def test_a_digit_is_blended_at_the_nearest_thirty_second_of_a_pixel():
    """OpenCV 4.10's warpAffine moved this image by these numbers; each value is a mean of four neighbours."""
    image = np.zeros((1, 28, 28), "float32")
    image[0, 0, 0] = 128
    raw = draw([image[0, :1, :1]], [np.array([40.26, 30.5], "float32")])
    full = nbody_mnist.render(image, np.array([[[40.26, 30.5]]], "float32"))[0]
    np.testing.assert_allclose(full, raw, atol=1e-4)
    exact = nbody_mnist.render(image, np.array([[[40.25, 30.5]]], "float32"))[0]
    np.testing.assert_array_equal(full, exact)
    other = nbody_mnist.render(image, np.array([[[40.27, 30.5]]], "float32"))[0]
    assert not np.array_equal(other, exact)


def test_two_digits_circle_each_other():
    """The force of two masses 1 at distance d is G d / sqrt(d^2 + softening^2); on a circle it is v^2 / (d / 2)."""
    distance = 40.0
    force = 0.05 * distance / np.hypot(distance, 10)
    speed = np.sqrt(force * distance / 2)
    middle, arm = np.array([64.0, 64.0]), np.array([distance / 2, 0])
    start = np.stack([middle + arm, middle - arm])
    velocity = np.array([[0, speed], [0, -speed]])
    positions, velocities = nbody_mnist.motion(start, velocity, np.zeros((2, 2)), frames=101, steps=1)
    apart = positions[:, 0] - positions[:, 1]
    np.testing.assert_allclose(np.hypot(*apart.T), distance, rtol=0.05)
    np.testing.assert_allclose(positions.mean(1), np.broadcast_to(middle, (101, 2)), atol=1e-3)
    turned = np.unwrap(np.arctan2(apart[:, 1], apart[:, 0]))
    np.testing.assert_allclose(turned[-1], 100 * speed / (distance / 2), rtol=0.02)


def test_energy_changes_only_at_borders_and_the_speed_limit(folder):
    random = np.random.default_rng(3)
    sizes = random.uniform(8, 20, (200, 3, 2))
    start = random.uniform(30, 80, (200, 3, 2))
    velocity = random.uniform(-1, 1, (200, 3, 2))
    positions, velocities = nbody_mnist.motion(start, velocity, sizes, frames=100, steps=1)
    # velocities are known half a step before places: half a pull brings them together
    together = velocities + 0.5 * np.stack([nbody_mnist.pull(place) for place in positions])
    energy = n_body_energy(torch.from_numpy(positions), torch.from_numpy(together)).numpy()  # (100, 200)
    free = np.isclose(velocities[1:], velocities[:-1] + [nbody_mnist.pull(p) for p in positions[:-1]], atol=1e-5)
    free = free.all((2, 3))  # no border, no limit in this step
    change = np.abs(np.diff(energy, axis=0))
    assert free.mean() > 0.8 and (~free).sum() > 100
    assert change[free].max() < 0.005 * energy.mean()
    assert change[~free].max() > 0.03 * energy.mean()
    undisturbed = free.all(0)
    assert undisturbed.sum() > 5
    np.testing.assert_allclose(energy[-1, undisturbed], energy[0, undisturbed], rtol=0.01)


def test_the_energy_of_an_event_is_that_of_its_motion(folder, tmp_path):
    event = nbody(folder, tmp_path, "val")[1]
    series = event["series"]
    expected = n_body_energy(torch.tensor(series["positions"]), torch.tensor(series["velocities"]))
    np.testing.assert_allclose(series["energy"], expected)
    extractor = EarthformerFeatureExtractor(**nbody_mnist.NBodyMnist.FACTS.feature_extractor)
    item = windows([event], extractor.encode, 10, 10, series=["energy"])[0]
    assert item["past_values"].shape == (10, 64, 64, 1) and item["future_values"].max() <= 1
    torch.testing.assert_close(item["future_energy"], expected[10:].float())


def test_a_sequence_depends_on_seed_split_and_number_alone(folder, tmp_path):
    few, more = nbody(folder, tmp_path, "train"), nbody(folder, tmp_path, "train", sizes=(300, 0, 0))
    assert [len(few), len(more)] == [6, 300] and [len(nbody(folder, tmp_path, s)) for s in ("val", "test")] == [4, 3]
    np.testing.assert_array_equal(few[4]["values"][:], more[4]["values"][:])
    starts = [event["series"]["positions"][0].tobytes() for event in more + nbody(folder, tmp_path, "val")]
    starts.append(nbody(folder, tmp_path, "train", seed=1)[0]["series"]["positions"][0].tobytes())
    assert len(set(starts)) == 305  # all differ
    nbody_mnist._moved.cache_clear()
    np.testing.assert_array_equal(nbody(folder, tmp_path, "train", sizes=(5, 0, 0))[4]["values"][:], few[4]["values"])


@pytest.mark.slow
def test_another_process_draws_the_same(folder, tmp_path):
    code = (
        "from earthformer_hf.data.nbody_mnist import NBodyMnist as N; import hashlib, sys\n"
        "r = {'digits': sys.argv[1], 'seed': 0, 'split': 'train', 'parameters': None, 'index': 4}\n"
        "sys.stdout.write(hashlib.sha256(N.read(r)['values'][:].tobytes()).hexdigest())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code, str(folder / "digits.npz")]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    ours = nbody(folder, tmp_path, "train")[4]["values"][:]
    assert other == hashlib.sha256(ours.tobytes()).hexdigest()


@pytest.mark.parametrize("digits", ["mnist.npz", "digits.npy"])
def test_any_file_of_digits(folder, tmp_path, digits):
    first, second = (nbody(folder, tmp_path, "test", digits=name)[2] for name in (digits, "digits.npz"))
    np.testing.assert_array_equal(first["values"][:], second["values"][:])


def published(folder, number=5, settings="", **changes):
    random = np.random.RandomState(7)
    drawn = {
        "digit_indices": random.randint(0, 50, (number, 3)),
        "appearance_mult": random.uniform(1, 1, number),
        "scale_variation": random.uniform(1, 1, (number, 3)),
        "base_rotation_angle": random.uniform(-0, 0, (number, 3)),
        "affine_transforms_multipliers": random.uniform(size=(number, 3, 2)),
        "init_velocity_angle": random.uniform(size=(number, 3)) * 2 * np.pi,
        "init_velocity_magnitude": random.uniform(0, 2, (number, 3)),
        "random_acceleration_angle": random.random(number) * 2 * np.pi,
        "random_acceleration_magnitude": random.uniform(0, 0, (number, 3)),
        "distractor_seeds": random.uniform(size=(number, 100, 0, 5)),
    } | changes
    folder.mkdir(exist_ok=True)
    np.savez(folder / "nbody_test.npz", **drawn)
    (folder / "nbody_dataset_cfg.yaml").write_text(settings or "nbody_G: 0.05\nnbody_acc_mode: r0\n")
    return drawn


def test_published_parameters(folder, tmp_path):
    drawn = published(folder / "paper")
    options = {"digits": "mnist.npz", "parameters": "paper"}
    events = nbody(folder, tmp_path, "test", **options)
    assert len(events) == 5
    _, sizes = nbody_mnist.load_digits(str(folder / "mnist.npz"))
    for event, indices, places, angle, speed in zip(
        events,
        drawn["digit_indices"],
        drawn["affine_transforms_multipliers"],
        drawn["init_velocity_angle"],
        drawn["init_velocity_magnitude"],
    ):
        corner, velocity = event["series"]["positions"][0], event["series"]["velocities"][0]
        np.testing.assert_allclose(corner, places * (128 - sizes[indices]), rtol=1e-6)
        np.testing.assert_allclose(velocity[:, 0], speed * np.cos(angle), atol=1e-6)
        np.testing.assert_allclose(velocity[:, 1], speed * np.sin(angle), atol=1e-6)
    for change, message in [
        ({"scale_variation": np.full((5, 3), 1.1)}, "'scale_variation' of .* must be 1"),
        ({"distractor_seeds": np.zeros((5, 100, 2, 5))}, r"\(5, 100, 0, 5\), got \(5, 100, 2, 5\)"),
        ({"digit_indices": np.full((5, 3), 50)}, "draws digit 50, .* holds 50"),
        ({"settings": "dataset:\n  nbody_acc_mode: r1\n"}, "nbody_acc_mode of .* must be r0, got r1"),
    ]:
        published(folder / "paper", **change)
        with pytest.raises(ValueError, match=message):
            nbody(folder, tmp_path, "test", **options)
    published(folder / "paper")
    with pytest.raises(ValueError, match="nbody_train.npz: does not exist"):
        nbody(folder, tmp_path, "train", **options)


def test_bad_digits_are_refused(folder, tmp_path):
    np.save(folder / "wide.npy", np.zeros((4, 28, 29), "uint8"))
    np.save(folder / "small.npy", np.random.default_rng(0).uniform(size=(4, 28, 28)))
    np.savez(folder / "none.npz", y=np.zeros(3))
    for name, message in [
        ("wide.npy", r"\(n, 28, 28\), got uint8 \(4, 28, 29\)"),
        ("small.npy", r"must hold 0..255"),
        ("none.npz", r"`images` or `X`, found \['y'\]"),
        ("absent.npz", "does not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            nbody(folder, tmp_path, "test", digits=name)


@pytest.mark.skipif(not (DATA / "mnist_10k.npz").exists(), reason="MNIST digits: set EARTHFORMER_HF_DATA")
def test_the_default_data_set_is_of_real_digits(tmp_path):
    (first,) = load_dataset("nbody-mnist", DATA, "test[:1]", cache_dir=tmp_path, sizes=(1, 1, 8))
    assert first["id"] == "test:0" and len(first["time"]) == 20
    values = first["values"][:]
    assert 0.02 < (values > 25).mean() < 0.25  # three digits of about 20 x 20 raw pixels, in outline


# -- MovingMNIST ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standard_file(tmp_path_factory):
    """The published file's shape, as a sparse file: only the first pixel of each sequence is written."""
    folder = tmp_path_factory.mktemp("moving")
    file = np.lib.format.open_memmap(folder / "mnist_test_seq.npy", "w+", "uint8", (20, 10_000, 64, 64))
    for number in (0, 4711, 8999, 9000, 9999):
        file[:, number, 0, 0] = number % 251
        file[:, number, 0, 1] = np.arange(20)
    file.flush()
    return folder


def test_published_split_of_moving_mnist(standard_file, tmp_path):
    numbers = {}
    for split, size in {"train": 8100, "val": 900, "test": 1000}.items():
        rows = load_dataset("moving-mnist", standard_file, split, cache_dir=tmp_path).with_format(None)
        numbers[split] = [int(name) for name in rows["id"]]
        assert len(numbers[split]) == size
    assert sorted(sum(numbers.values(), [])) == list(range(10_000))
    assert numbers["test"] == list(range(9_000, 10_000))
    # what scikit-learn 1.9.1 returns: train_test_split(range(9000), test_size=0.1, random_state=123)
    assert numbers["train"][:3] + numbers["train"][-1:] == [2007, 7973, 74, 3582]
    assert numbers["val"][:3] + numbers["val"][-1:] == [1603, 8472, 2213, 8642]
    table = load_dataset("moving-mnist", standard_file, "test", cache_dir=tmp_path)
    event = table[999]
    assert event["id"] == "9999" and event["values"].shape == (20, 64, 64)
    assert event["values"][:][:, 0, 0].tolist() == [9999 % 251] * 20
    assert event["values"][4:9:2][:, 0, 1].tolist() == [4, 6, 8]


def test_drawn_digits_go_straight_and_bounce(folder, tmp_path):
    options = {"digits": "digits.npz", "sizes": (40, 5, 5), "streaming": True, "cache_dir": tmp_path}
    events = list(load_dataset("moving-mnist", folder, "train", **options))
    assert len(events) == 40 and all(event["values"].dtype == "uint8" for event in events)
    again = list(load_dataset("moving-mnist", folder, "train", **options | {"sizes": (3, 0, 0)}))
    np.testing.assert_array_equal(events[2]["values"][:], again[2]["values"][:])
    frames = np.stack([event["values"][:] for event in events])
    assert len(np.unique(frames.reshape(40, -1), axis=0)) == 40
    # one bright pixel in the middle of each "digit" shows the way
    pixel = np.zeros((1, 28, 28), "uint8")
    pixel[0, 14, 14] = 200
    for seed in range(20):
        moved = moving_mnist.drawn(pixel, np.random.default_rng(seed))
        random = np.random.default_rng(seed)
        random.integers(1, size=2)
        place, angle = random.uniform(size=(2, 2)), random.uniform(0, 2 * np.pi, 2)
        for frame in range(20):
            expected = set()
            for digit in range(2):
                velocity = (np.sin(angle[digit]), np.cos(angle[digit]))
                where = []
                for axis in range(2):
                    where.append(14 + int(36 * bounced(place[digit, axis], 0.1 * velocity[axis], frame + 1)))
                expected.add(tuple(where))
            assert set(zip(*np.nonzero(moved[frame]))) == expected


def bounced(place, step, steps):
    """Where a point is after so many steps in 0..1, if it stops at the end before it turns round."""
    for _ in range(steps):
        place += step
        if place < 0 or place > 1:
            place, step = float(place > 1), -step
    return place


def test_splits_share_no_digit_where_the_file_tells_them_apart(folder):
    parts = {split: moving_mnist._digits(str(folder / "digits.npz"), split, 0) for split in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [30, 10, 10]
    np.testing.assert_array_equal(np.concatenate(list(parts.values())), np.load(folder / "digits.npy"))


def test_bad_files_of_moving_mnist_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="does not exist; give `digits`"):
        load_dataset("moving-mnist", folder, "test", cache_dir=tmp_path)
    np.save(tmp_path / "mnist_test_seq.npy", np.zeros((20, 3, 64, 64), "uint8"))
    with pytest.raises(ValueError, match=r"must hold uint8 \(20, 10000, 64, 64\), got uint8 \(20, 3, 64, 64\)"):
        load_dataset("moving-mnist", tmp_path, "test", cache_dir=tmp_path / "cache")
