"""Draws the figures of "How Earthformer and PreDiff work".

python docs/hooks/figures.py
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from earthformer_hf.plotting import plot_cuboids


IMAGES = Path(__file__).resolve().parents[1] / "images"
DATA, NETWORK = "#dbe9f6", "#fde3c8"
WIDTH, HEIGHT = 1.7, 0.75  # of a box


class Flow:
    """Boxes on a grid of columns and rows, and arrows between them."""

    def __init__(self, columns: int, rows: int):
        self.figure = Figure(figsize=(2.1 * columns, 1.25 * rows), layout="constrained")
        self.axis = self.figure.add_subplot()
        self.axis.set(xlim=(-0.15, 2.1 * columns - 0.25), ylim=(-1.25 * rows + 0.95, 0.9), aspect="equal")
        self.axis.set_axis_off()
        self.places = {}

    def box(self, name: str, column: float, row: float, detail: str = "", network: bool = True):
        x, y = 2.1 * column, -1.25 * row
        style = {"boxstyle": "round,pad=0.02,rounding_size=0.12", "fc": NETWORK if network else DATA, "ec": "0.35"}
        self.axis.add_patch(FancyBboxPatch((x, y), WIDTH, HEIGHT, **style))
        self.axis.text(
            x + WIDTH / 2, y + HEIGHT / 2 + (0.13 if detail else 0), name, ha="center", va="center", fontsize=10
        )
        self.axis.text(
            x + WIDTH / 2, y + HEIGHT / 2 - 0.17, detail, ha="center", va="center", fontsize=7.5, color="0.25"
        )
        self.places[name] = x, y

    def arrow(self, first: str, second: str, label: str = "", style: str = "-|>"):
        """From the edge of a box to the facing edge of another, which lies beside it, above or below."""
        (x0, y0), (x1, y1) = self.places[first], self.places[second]
        if y0 == y1:
            right = x1 > x0
            ends = (x0 + WIDTH * right, y0 + HEIGHT / 2), (x1 + WIDTH * (not right), y1 + HEIGHT / 2)
        else:
            down = y1 < y0
            ends = (x0 + WIDTH / 2, y0 + HEIGHT * (not down)), (x1 + WIDTH / 2, y1 + HEIGHT * down)
        self.axis.add_patch(FancyArrowPatch(*ends, arrowstyle=style, mutation_scale=12, color="0.2"))
        (x0, y0), (x1, y1) = ends
        self.axis.text((x0 + x1) / 2 + 0.06, (y0 + y1) / 2, label, fontsize=7.5, color="0.25", va="center")


def earthformer() -> Figure:
    flow = Flow(5, 2)
    flow.box("context", 0, 0, "T_in maps, mm/h", network=False)
    flow.box("extractor", 1, 0, "to the model's range")
    flow.box("stem", 2, 0, "coarser maps")
    flow.box("encoder", 3, 0, "cuboid attention")
    flow.box("global vectors", 4, 0, "a summary", network=False)
    flow.box("prediction", 0, 1, "T_out maps, mm/h", network=False)
    flow.box("extractor ", 1, 1, "back to mm/h")
    flow.box("head", 2, 1, "full size")
    flow.box("decoder", 3, 1, "cross-attention")
    flow.box("empty future", 4, 1, "T_out blank maps", network=False)
    for first, second in zip(["context", "extractor", "stem"], ["extractor", "stem", "encoder"]):
        flow.arrow(first, second)
    flow.arrow("encoder", "global vectors", style="<|-|>")
    flow.arrow("encoder", "decoder", "what was seen")
    steps = ["empty future", "decoder", "head", "extractor ", "prediction"]
    for first, second in zip(steps, steps[1:]):
        flow.arrow(first, second)
    return flow.figure


def prediff() -> Figure:
    flow = Flow(5, 3)
    flow.box("context", 0, 0, "T_in maps", network=False)
    flow.box("encoder", 1, 0, "of the autoencoder, once")
    flow.box("context latents", 2, 0, "small maps", network=False)
    flow.box("noise", 0, 1, "one per member", network=False)
    flow.box("noisy future", 1, 1, "latents", network=False)
    flow.box("denoiser", 2, 1, "10 to 1000 steps")
    flow.box("decoder", 3, 1, "of the autoencoder")
    flow.box("members", 4, 1, "E x T_out maps", network=False)
    flow.box("alignment", 2, 2, "pulls to a target")
    for first, second in zip(["context", "encoder", "noise"], ["encoder", "context latents", "noisy future"]):
        flow.arrow(first, second)
    flow.arrow("context latents", "denoiser", "looks at")
    flow.arrow("noisy future", "denoiser", style="<|-|>")
    flow.arrow("alignment", "denoiser", "if asked")
    flow.arrow("denoiser", "decoder")
    flow.arrow("decoder", "members")
    return flow.figure


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, figure in (("cuboids", plot_cuboids()), ("earthformer", earthformer()), ("prediff", prediff())):
        figure.savefig(IMAGES / f"{name}.png", dpi=90)
