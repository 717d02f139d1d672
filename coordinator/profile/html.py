"""One self-contained HTML page of a profile: readable offline, in light and dark, by keyboard.

The text, the figures and the tables are in the page as it is written; the charts are drawn
from the embedded record when it is opened. Nothing is loaded from anywhere, and the page's
own content policy forbids it.
"""

from __future__ import annotations

import json
from html import escape
from importlib import resources
from typing import Any

from outrider.coordinator.profile.file import PHASES

_ORIGINS = {
    "accepted": "accepted from the draft",
    "corrected": "corrected by the base",
    "bonus": "added by the base after a whole proposal",
    "base": "written by the base, nothing was proposed",
}


def page(record: dict[str, Any]) -> str:
    """The page as text; ``record`` is what ``file.read`` gives."""
    files = resources.files("outrider.coordinator.profile").joinpath("report_page")

    def part(name: str) -> str:
        return files.joinpath(name).read_text("utf-8")

    filled = {
        "STYLE": part("style.css"),
        "SCRIPT": part("charts.js") + part("timeline.js"),
        "RECORD": _embedded(record),
        "TITLE": escape(_title(record)),
        "SUBTITLE": _subtitle(record),
        "TILES": _tiles(record),
        "LEGEND": _legend(record),
        "TEXT": _text(record),
        "PHASES": _phases(record),
        "MEMORY": _memory(record),
        "ROUNDS": _rounds(record),
    }
    # One pass over the template: what is filled in is never looked at again.
    pieces = part("page.html").split("{{")
    out = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        out += filled[name], rest
    return "".join(out)


def rounds_of_tokens(record: dict[str, Any]) -> list[int]:
    """For each token the index of its round in ``rounds``; -1 where that is not known."""
    made: list[int] = []
    for index, one in enumerate(record["rounds"]):
        made += [index] * one["emitted"]
    count = len(record["request"]["token_ids"])
    return (made + [-1] * count)[:count]


def _embedded(record: dict[str, Any]) -> str:
    # "<" can't end the script element early when it is written as an escape.
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _title(record: dict[str, Any]) -> str:
    models = record["models"]
    names = [models[role]["name"] for role in ("base", "draft") if role in models]
    return " + ".join(names)


def _subtitle(record: dict[str, Any]) -> str:
    made = []
    for role, model in record["models"].items():
        made.append(
            f"{role}: <b>{escape(model['name'])}</b>, "
            f"{model['parameters'] / 1e6:.1f} M parameters, "
            f"{escape(model['dtype'])} on {escape(model['device'])}"
        )
    made.append(f"link: <b>{escape(record['link'])}</b>")
    made.append(f"seed {record['request']['seed']}")
    made.append(f"trace <code>{escape(record['trace_id'])}</code>")
    return "".join(f"<li>{one}</li>" for one in made)


def _tiles(record: dict[str, Any]) -> str:
    speculation, seconds = record["speculation"], record["seconds"]
    origins = record["request"]["origins"]
    share = origins.count("accepted") / len(origins) if origins else 0.0
    tiles = [
        ("Tokens per second", "tokens-per-second", f"{seconds['tokens_per_second']:.1f}",
         "after the first token"),
        ("Acceptance rate", "acceptance-rate", _percent(speculation["acceptance_rate"]),
         f"{speculation['accepted']} of {speculation['proposed']} proposed"),
        ("Tokens per round", "mean-accepted-length", f"{speculation['mean_accepted_length']:.2f}",
         f"mean K {speculation['mean_k']:.2f}"),
        ("Written by the draft", "draft-share", _percent(share), f"of {len(origins)} tokens"),
        ("First token", "first-token", f"{1e3 * seconds['first_token']:.1f} ms",
         f"{record['request']['prompt_tokens']} prompt tokens"),
        ("Round, median", "round-median", f"{1e3 * record['round_seconds']['median']:.2f} ms",
         f"p99 {1e3 * record['round_seconds']['p99']:.2f} ms, {len(record['rounds'])} rounds"),
    ]  # fmt: skip
    ceiling = record["ceiling"]
    if ceiling is not None:
        tiles.append(
            ("Share of ceiling", "ceiling-share", _percent(ceiling["share"]),
             f"of {ceiling['tokens_per_second']:.0f} tokens/s")
        )  # fmt: skip
    return "".join(
        f'<div class="tile"><dt>{name}</dt><dd id="{key}">{value}</dd>'
        f'<dd class="note">{escape(note)}</dd></div>'
        for name, key, value, note in tiles
    )


def _legend(record: dict[str, Any]) -> str:
    origins = record["request"]["origins"]
    return "".join(
        f'<li><span class="tok {key}">{key}</span> {meaning}: '
        f'<b id="count-{key}">{origins.count(key)}</b></li>'
        for key, meaning in _ORIGINS.items()
        if key in origins
    )


def _text(record: dict[str, Any]) -> str:
    request = record["request"]
    rounds = rounds_of_tokens(record)
    made = [f'<span class="prompt">{escape(request["prompt"])}</span>']
    pieces = request.get("pieces")
    if pieces is None:
        # Without a tokenizer only the text of whole rounds is known.
        at = 0
        for delta in request["deltas"]:
            origin = max(delta["origins"], key=delta["origins"].count, default="base")
            made.append(_token(delta["text"], origin, rounds[at] if at < len(rounds) else -1))
            at += len(delta["token_ids"])
    else:
        for piece, origin, index in zip(pieces, request["origins"], rounds, strict=True):
            made.append(_token(piece, origin, index))
    return "".join(made)


def _token(piece: str, origin: str, index: int) -> str:
    where = f' data-round="{index}"' if index >= 0 else ""
    return f'<span class="tok {origin}"{where}>{escape(piece)}</span>'


def _phases(record: dict[str, Any]) -> str:
    whole = sum(record["phases"][name]["total"] for name in PHASES) or 1.0
    rows = []
    for name in (*PHASES, "round"):
        one = record["phases"][name] if name != "round" else record["round_seconds"]
        cells = "".join(f"<td>{1e3 * one[key]:.3f}</td>" for key in ("median", "p90", "p99", "max"))
        share = _percent(one["total"] / whole) if name != "round" else ""
        swatch = f'<span class="swatch {name}" aria-hidden="true"></span>' if share else ""
        rows.append(
            f'<tr id="phase-{name}"><th scope="row">{swatch}{name}</th>{cells}'
            f"<td>{one['total']:.3f}</td><td>{share}</td></tr>"
        )
    return "".join(rows)


def _memory(record: dict[str, Any]) -> str:
    rows = []
    for name, one in record["memory"].items():
        arena = ["", "", ""]
        if "arena_tokens" in one:
            keys = ("arena_tokens", "arena_tokens_used", "arena_tokens_largest_free")
            arena = [f"{one[key]:,}" for key in keys]
        cells = "".join(f"<td>{cell}</td>" for cell in arena)
        resident = f"{one['resident_bytes'] / 2**20:,.0f} MiB"
        rows.append(f'<tr><th scope="row">{name}</th><td>{resident}</td>{cells}</tr>')
    return "".join(rows)


def _rounds(record: dict[str, Any]) -> str:
    rows = []
    for index, one in enumerate(record["rounds"]):
        phases = one["phases"]
        times = [one["seconds"], phases["draft"], phases["verify"], phases["link"]]
        cells = [f"{1e3 * one['at']:.2f}", one["mode"], one["batch_size"], one["k"]]
        cells += [one["proposed"], one["accepted"], one["emitted"]]
        cells += [f"{1e3 * time:.3f}" for time in times]
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr data-round="{index}"><th scope="row">{one["round"]}</th>{body}</tr>')
    return "".join(rows)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
