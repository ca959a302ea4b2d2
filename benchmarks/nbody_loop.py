"""N-body MNIST by a plain loop over frames and digits: what `earthformer_hf.data.nbody_mnist` is compared with.

Source: facts of the published data set, see there. Only the frames that are kept are drawn.
"""

import math

import numpy as np
import torch


def nbody_loop(digits: list[np.ndarray], positions: np.ndarray, velocities: np.ndarray, frames: int = 20):
    """One sequence.

    Args:
        digits: images (h, w) in 0..255, cropped to their ink.
        positions: of their upper left corners at the start, (bodies, 2), x and y in raw pixels.
        velocities: at the start, (bodies, 2), in raw pixels a step.

    Returns:
        Frames (frames, 64, 64) float32 in 0..255, positions and velocities (frames, bodies, 2).
    """
    positions = [np.array(position, "float32") for position in positions]
    velocities = [np.array(velocity, "float32") for velocity in velocities]
    images, places, speeds = [], [], []
    for step in range(5 * (frames - 1) + 1):
        if step % 5 == 0:
            images.append(draw(digits, positions))
            places.append(np.array(positions))
            speeds.append(np.array(velocities))
        pulls = [np.zeros(2) for _ in digits]
        for i in range(len(digits)):
            for j in range(len(digits)):
                apart = positions[j] - positions[i]
                pulls[i] += 0.05 * apart / np.sqrt(np.dot(apart, apart) + np.float32(100))
        for i, digit in enumerate(digits):
            velocities[i] = np.clip(velocities[i] + pulls[i], -2, 2).astype("float32")
            positions[i] = positions[i] + velocities[i]
            for axis in range(2):
                half = digit.shape[1 - axis] / 2
                for outside, border in (
                    (positions[i][axis] + half < 10, 10),
                    (positions[i][axis] + half > 118, 118),
                ):
                    if outside:
                        velocities[i][axis] = -velocities[i][axis]
                        positions[i][axis] = border - half
    return np.stack(images), np.stack(places), np.stack(speeds)


def draw(digits: list[np.ndarray], positions: list[np.ndarray]) -> np.ndarray:
    """One frame (64, 64) of digits at their corners."""
    canvas = np.zeros((128, 128), "float32")
    for digit, position in zip(digits, positions):
        x, y = (math.ceil((np.rint(1024 * float(place)) - 16) / 32) / 32 for place in position)
        left, top = math.floor(x), math.floor(y)
        right, bottom = np.float32(x - left), np.float32(y - top)  # shares of the pixels to the right and below
        patch = np.zeros((digit.shape[0] + 1, digit.shape[1] + 1), "float32")
        patch[:-1, :-1] += (1 - right) * (1 - bottom) * digit
        patch[:-1, 1:] += right * (1 - bottom) * digit
        patch[1:, :-1] += (1 - right) * bottom * digit
        patch[1:, 1:] += right * bottom * digit
        rows = slice(max(top, 0), min(top + len(patch), 128))
        columns = slice(max(left, 0), min(left + patch.shape[1], 128))
        part = patch[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        canvas[rows, columns] = np.maximum(canvas[rows, columns], part)
    small = torch.nn.functional.interpolate(
        torch.from_numpy(canvas)[None, None], size=(64, 64), mode="bicubic", align_corners=False
    )
    return small[0, 0].clamp(0, 255).numpy()
