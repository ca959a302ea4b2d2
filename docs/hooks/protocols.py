"""The table of named protocols, from their fields."""

from earthformer_hf.evaluation.protocols import PROTOCOLS, Protocol


def protocol_table() -> str:
    """A section for each protocol: what is forecast, what is counted, and what others published for it."""
    return "\n\n".join(map(_section, PROTOCOLS.values()))


def _section(protocol: Protocol) -> str:
    frames = f"{protocol.context_length} -> {protocol.prediction_length} frames"
    if protocol.frame_stride > 1:
        frames += f", every {protocol.frame_stride}nd of the data's"
    rows = {
        "data": f"`{protocol.dataset}`, split `{protocol.split}`; {frames}; a window every {protocol.window_stride}",
        "scores": ", ".join(protocol.scores),
        "thresholds": ", ".join(f"{value:g}" for value in protocol.thresholds),
        "mean": protocol.average + (", of the ensemble's mean" if "ensemble" in protocol.scores else ""),
        "missing": protocol.missing,
        "beside": ", ".join(protocol.baselines),
        "from": protocol.source,
        "published": protocol.published,
        "hash": f"`{protocol.hash[:12]}`",
    }
    lines = [f"## {protocol.name}", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items() if value)])


__all__ = ["protocol_table"]
