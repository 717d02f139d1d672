"""The report page, opened in a headless browser and compared with its record."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from outrider.coordinator.profile.file import PHASES
from outrider.coordinator.profile.html import page, rounds_of_tokens
from outrider.coordinator.profile.record import spread

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def record() -> dict[str, Any]:
    """A record made by hand: two prefill rounds, then a few of every kind."""
    rounds: list[dict[str, Any]] = []
    shapes = [(0, 0, 0, 8), (0, 0, 1, 8), (3, 3, 4, 4), (3, 1, 2, 4), (2, 0, 1, 3), (0, 0, 1, 1)]
    for index, (proposed, accepted, emitted, rows) in enumerate(shapes):
        at = 0.01 * index
        sides: dict[str, Any] = {
            "verify": {"sent_at": at + 0.004, "answered_at": at + 0.009, "served_at": at + 0.0045,
                       "service_seconds": 0.004, "model_seconds": 0.0039, "rows": rows},
            "draft": {"sent_at": at + 0.001, "answered_at": at + 0.0035, "served_at": at + 0.0012,
                      "service_seconds": 0.002, "model_seconds": 0.0019, "rows": proposed},
        }  # fmt: skip
        mode = "speculative" if proposed else "prefill" if rows > 1 else "plain"
        rounds.append(
            {
                "round": index + 1, "mode": mode, "at": at, "seconds": 0.0099, "k": proposed,
                "proposed": proposed, "accepted": accepted, "emitted": emitted, "rows": rows,
                "rollback": proposed - accepted, "committed_len": 10, "batch_size": 1,
                "verify_epoch": 1, "draft_epoch": 1, "lost": "", "hidden": 0.0,
                "phases": {"draft": 0.0019 if proposed else 0.0, "verify": 0.0039, "cache": 0.0002,
                           "link": 0.001, "accept": 0.0001, "schedule": 0.001, "idle": 0.0001},
                "verify": sides["verify"], "draft": sides["draft"] if proposed else None,
            }
        )  # fmt: skip
    origins = ["base", "accepted", "accepted", "accepted", "bonus", "accepted", "corrected",
               "corrected", "base"]  # fmt: skip
    pieces = ["def", " f", "(", "</script>", "&amp;", " <b>", "é", "\n", "end"]
    return {
        "format": "outrider-profile", "version": 1, "trace_id": "ab" * 16, "link": "grpc",
        "request": {
            "prompt": "<!-- a \"prompt\" -->\n", "text": "".join(pieces), "pieces": pieces,
            "token_ids": list(range(9)), "origins": origins, "deltas": [], "seed": 7,
            "prompt_tokens": 16, "finish_reason": "max_tokens", "request_id": "r",
        },
        "models": {
            role: {"name": role, "architecture": "X", "parameters": 10**6, "device": "cpu",
                   "weight_bytes": 4 * 10**6, "dtype": "float32"} for role in ("base", "draft")
        },
        "seconds": {"total": 0.06, "queue": 0.0, "prefill": 0.02, "first_token": 0.0201,
                    "decode": 0.04, "tokens_per_second": 199.96},
        "phases": {name: spread([one["phases"][name] for one in rounds])
                   for name in PHASES},
        "round_seconds": spread([one["seconds"] for one in rounds]),
        "speculation": {"rounds": 5, "proposed": 8, "accepted": 4, "wasted": 4,
                        "acceptance_rate": 0.5, "mean_accepted_length": 1.8, "mean_k": 1.6,
                        "proposed_by_position": [3, 3, 2], "accepted_by_position": [2, 1, 1]},
        "memory": {"coordinator": {"resident_bytes": 50 << 20},
                   "base": {"resident_bytes": 100 << 20, "arena_tokens": 1000,
                            "arena_tokens_used": 10, "arena_tokens_largest_free": 990}},
        "ceiling": {"memory_bandwidth": 1e10, "tokens_per_second": 800.0,
                    "base_alone_tokens_per_second": 500.0, "measured_tokens_per_second": 200.0,
                    "share": 0.25},
        "rounds": rounds,
    }  # fmt: skip


class Document(HTMLParser):
    """Texts by id, and attributes of every element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, str] = {}
        self._open: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = {key: value or "" for key, value in attrs}
        self.elements.append((tag, about))
        if tag not in ("meta", "link", "br", "input", "line", "img"):
            self._open.append((tag, about.get("id", "")))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for _, key in self._open:
            if key:
                self.texts[key] = self.texts.get(key, "") + data

    def number(self, key: str) -> float:
        found = re.search(r"-?[\d.]+", self.texts[key])
        assert found is not None
        return float(found[0])

    def of(self, tag: str, word: str) -> list[dict[str, str]]:
        return [about for name, about in self.elements
                if name == tag and word in about.get("class", "").split()]  # fmt: skip


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Document:
    """The page as the browser has it after its scripts ran."""
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    folder: Path = tmp_path_factory.mktemp("report")
    (folder / "report.html").write_text(page(record()), "utf-8")
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={folder}/profile", "--virtual-time-budget=5000",
         "--dump-dom", f"file://{folder}/report.html"],
        capture_output=True, timeout=120, check=True, text=True,
    )  # fmt: skip
    return Document(done.stdout)


def test_page_shows_the_figures_of_the_record(opened: Document) -> None:
    made = record()
    assert opened.number("tokens-per-second") == pytest.approx(
        made["seconds"]["tokens_per_second"], abs=0.05
    )
    speculation = made["speculation"]
    assert opened.number("acceptance-rate") == pytest.approx(100 * speculation["acceptance_rate"])
    assert opened.number("mean-accepted-length") == speculation["mean_accepted_length"]
    assert opened.number("first-token") == pytest.approx(20.1)
    assert opened.number("ceiling-share") == pytest.approx(25.0)
    assert opened.number("round-median") == pytest.approx(9.90)
    origins = Counter(made["request"]["origins"])
    for origin, count in origins.items():
        assert opened.number(f"count-{origin}") == count
    for name in PHASES:
        cells = opened.texts[f"phase-{name}"].removeprefix(name)
        assert cells.startswith(f"{1e3 * made['phases'][name]['median']:.3f}")


def test_page_tells_the_tokens_apart(opened: Document) -> None:
    made = record()
    tokens = [about for about in opened.of("span", "tok") if "data-round" in about]
    assert [about["class"].split()[1] for about in tokens] == made["request"]["origins"]
    assert [int(about["data-round"]) for about in tokens] == rounds_of_tokens(made)
    text = made["request"]["prompt"] + made["request"]["text"]
    assert opened.texts["text"] == text


def test_page_draws_every_round_on_its_process(opened: Document) -> None:
    made = record()
    drawn = Counter(
        about["class"].split()[0] for name, about in opened.elements
        if name == "rect" and "data-round" in about
    )  # fmt: skip
    assert drawn["fill-round"] == len(made["rounds"])
    assert drawn["fill-verify"] == sum(one["verify"] is not None for one in made["rounds"])
    assert drawn["fill-draft"] == sum(one["draft"] is not None for one in made["rounds"])
    bars = [about for about in opened.of("rect", "bar") if "data-rate" in about]
    speculation = made["speculation"]
    assert [float(about["data-rate"]) for about in bars] == pytest.approx(
        [
            accepted / proposed
            for accepted, proposed in zip(
                speculation["accepted_by_position"],
                speculation["proposed_by_position"],
                strict=True,
            )
        ]
    )
    phases = {
        about["data-phase"]: float(about["data-seconds"])
        for _, about in opened.elements if "data-phase" in about
    }  # fmt: skip
    assert phases == pytest.approx({name: made["phases"][name]["total"] for name in PHASES})


def test_page_loads_nothing_and_is_reachable_by_keyboard(opened: Document) -> None:
    for name, about in opened.elements:
        assert name not in ("link", "img", "iframe")
        assert "src" not in about
        assert not about.get("href", "#").startswith(("http", "//"))
    text = page(record())
    assert "default-src 'none'" in text
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg|http-equiv", "", text)
    assert "prefers-color-scheme: dark" in text
    focusable = [about for name, about in opened.elements
                 if name in ("button", "summary", "a") or "tabindex" in about]  # fmt: skip
    assert len(focusable) >= 10
    assert all(about.get("tabindex", "0") == "0" for about in focusable)
    images = [about for name, about in opened.elements if name == "svg"]
    assert images and all(about.get("aria-label") for about in images)


def test_page_embeds_the_record_unharmed() -> None:
    made = record()
    text = page(made)
    start = text.index('id="record">') + len('id="record">')
    embedded = text[start : text.index("</script>", start)]
    assert json.loads(embedded) == made


def test_page_without_pieces_or_ceiling_still_reads() -> None:
    made = record()
    made["request"]["pieces"] = made["ceiling"] = None
    made["request"]["deltas"] = [
        {"text": "abc", "token_ids": [1, 2], "origins": ["accepted", "bonus"]}
    ]
    made["rounds"] = []
    text = page(made)
    assert '<span class="tok accepted">abc</span>' in text
    assert 'id="ceiling-share"' not in text
