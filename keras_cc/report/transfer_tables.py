"""What crossed, as tables: a metric each, and what there was to borrow."""

from typing import Any

from keras_cc.report.entries import MISSING, Entry, Table, bracketed, nats, number, points
from keras_cc.report.summary import verdict
from keras_cc.report.transfer import MEASURES, PARTS

_PLACES = {
    **PARTS,
    **{f"{part} unseen": f"{name}, languages never seen" for part, name in PARTS.items()},
}


def transfer_tables(summary: dict[str, Any]) -> list[Table]:
    """A table a metric, and one of what English at hand gives.

    Args:
        summary: of `keras_cc.report.transfer.summarise`.
    """
    methods = summary["methods"]
    measured = [m for m in MEASURES if any(m in found for found in methods.values())]
    return [*(_measure(summary, metric) for metric in measured), _borrowed(summary)]


def _measure(summary, metric):
    write, better = (nats, -1) if metric == "nll" else (points, 1)
    baseline, places = summary["baseline"], summary["places"]
    methods = {name: m for name, m in summary["methods"].items() if metric in m}
    header = ["Method", "English"]
    for place in places:
        header.append(f"Others, {_PLACES[place]}")
        header += [f"Difference to {baseline}"] if baseline else []
        header.append("Crossing")
    best = {place: _best(methods, metric, place, better) for place in places}
    rows = []
    for name, method in methods.items():
        found = method[metric]
        english = sum(one["english"] for one in found.values()) / len(found)
        row = [Entry(name), Entry(write(english))]
        for place in places:
            one = found[place]
            row.append(Entry(write(one["mean"]), bracketed(one, write), best[place] == name))
            if baseline:
                row.append(_difference(one["difference"], write))
            row.append(_share(one["crossing"]))
        rows.append(row)
    return Table(f"What crosses: {MEASURES[metric]}", header, rows)


def _best(methods, metric, place, better):
    """The best method, where it beats the baseline beyond chance; what bounds them is none."""
    bounds = ("ceiling", "floor")
    some = {n: m[metric][place] for n, m in methods.items() if not n.startswith(bounds)}
    if not some:
        return None
    top = max(some, key=lambda name: better * some[name]["mean"])
    return top if better * verdict(some[top]["difference"]) > 0 else None


def _difference(found, write):
    if found is None:
        return Entry(MISSING)
    return Entry(write(found["mean"], signed=True), bracketed(found, write, signed=True))


def _share(found):
    """Per cent of what English learnt."""
    if found is None or found["mean"] is None:
        return Entry(MISSING)
    return Entry(f"{points(found['mean'])} %", bracketed(found, points))


def _borrowed(summary):
    places = summary["places"]
    header = ["Method"]
    for place in places:
        header += [
            f"Alone, {_PLACES[place]}",
            "Connected to the English prompt",
            "English prompt and answer in the context",
            "English itself",
            "Wrong language",
        ]
    header.append("Training (s)")
    rows = []
    for name, method in summary["methods"].items():
        row = [Entry(name)]
        for place in places:
            own, borrowed = method["nll"][place], method["borrowed"]
            row += [
                Entry(nats(own["mean"])),
                *(
                    Entry(nats(borrowed[path][place] if path in borrowed else None))
                    for path in ("connected", "in_context")
                ),
                Entry(nats(own["english"])),
                Entry(points(method["wrong_language"][place])),
            ]
        rows.append([*row, Entry(number(method["seconds"], 0))])
    return Table("What there was to borrow: nats a token with English at hand", header, rows)
