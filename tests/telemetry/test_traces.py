"""Traces across three processes, as a collector gets them."""

from __future__ import annotations

import itertools
import secrets
import statistics
import threading
from typing import Any

import pytest

from outrider.coordinator.telemetry.attributes import ATTRIBUTES
from outrider_testing.waiting import soon

ROOT = "text_completion"


def traceparent(sampled: bool = True) -> tuple[str, str, list[tuple[str, str]]]:
    """Trace id, the client's span id, and the metadata that carries them."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    return trace, span, [("traceparent", f"00-{trace}-{span}-{'01' if sampled else '00'}")]


def root_of(spans: list[Any]) -> Any:
    (root,) = [one for one in spans if one.name.startswith(ROOT)]
    return root


def named(spans: list[Any], name: str) -> list[Any]:
    return sorted((one for one in spans if one.name == name), key=lambda one: one.start)


def check_tree(spans: list[Any], root: Any) -> None:
    """Ids are unique, and everything hangs under the root."""
    by_id = {one.id: one for one in spans}
    assert len(by_id) == len(spans)
    for one in spans:
        seen = {one.id}
        while one is not root:
            one = by_id[one.parent]
            assert one.id not in seen
            seen.add(one.id)


@pytest.fixture(scope="module")
def traced(cluster: Any) -> Any:
    """One request of several prefill chunks: client's span id, spans, and the last message."""
    trace, parent, metadata = traceparent()
    prompt = "def add(left, right):\n    return left + right\n" * 2
    ids, finished, _ = cluster.generate(prompt, drawn=True, metadata=metadata)
    return parent, cluster.trace(trace), finished, ids


def test_trace_is_one_tree_over_three_processes(traced: Any) -> None:
    parent, spans, _, _ = traced
    root = root_of(spans)
    assert root.parent == parent
    check_tree(spans, root)
    assert {one.service for one in spans} == {
        "outrider-coordinator",
        "outrider-draft",
        "outrider-verify",
    }
    by_id = {one.id: one for one in spans}
    for name, service, under in [
        ("queue", "outrider-coordinator", {ROOT}),
        ("prefill", "outrider-coordinator", {ROOT}),
        ("round", "outrider-coordinator", {ROOT, "prefill"}),
        ("accept", "outrider-coordinator", {"round"}),
        ("draft", "outrider-draft", {"round"}),
        ("catch_up", "outrider-draft", {"round"}),
        ("verify", "outrider-verify", {"round"}),
    ]:
        found = named(spans, name)
        assert found, name
        for one in found:
            assert one.service == service
            assert by_id[one.parent].name.split()[0] in under


def test_trace_has_one_verify_a_round_within_it(traced: Any) -> None:
    _, spans, _, _ = traced
    rounds = named(spans, "round")
    outside = []
    for one in rounds:
        (verify,) = [each for each in named(spans, "verify") if each.parent == one.id]
        drafts = [each for each in named(spans, "draft") if each.parent == one.id]
        assert len(drafts) == (1 if one.attributes["outrider.proposed"] else 0)
        for service in (verify, *drafts):
            assert service.start < service.end
            outside.append(max(one.start - service.start, service.end - one.end) / 1e9)
    # Two processes' clocks are set side by side by way of the system's, and a service may have
    # to wait for a core between its two looks: now and then, on a busy machine.
    assert statistics.quantiles(outside, n=10)[-2] < 0.01 and max(outside) < 1.0
    for before, after in itertools.pairwise(rounds):
        assert before.end <= after.start


def test_trace_agrees_with_what_the_client_was_told(traced: Any) -> None:
    _, spans, finished, ids = traced
    root, rounds = root_of(spans), named(spans, "round")
    figures = finished.speculation
    for key, value in [
        ("gen_ai.usage.output_tokens", len(ids)),
        ("gen_ai.usage.input_tokens", finished.usage.prompt_tokens),
        ("outrider.rounds", figures.rounds),
        ("outrider.proposed", figures.proposed),
        ("outrider.accepted", figures.accepted),
        ("gen_ai.response.finish_reasons", ("max_tokens",)),
        ("gen_ai.request.seed", 1),
    ]:
        assert root.attributes[key] == value, key
    for key in ("proposed", "accepted"):
        total = sum(one.attributes[f"outrider.{key}"] for one in rounds)
        assert total == root.attributes[f"outrider.{key}"]
    assert sum(one.attributes["outrider.emitted"] for one in rounds) == len(ids)
    for one in rounds:
        rejected = one.attributes["outrider.proposed"] - one.attributes["outrider.accepted"]
        assert one.attributes["outrider.rollback"] == rejected
    assert figures.accepted > 0


def test_trace_shows_prefill_before_the_rounds(traced: Any) -> None:
    _, spans, _, _ = traced
    root = root_of(spans)
    (prefill,) = named(spans, "prefill")
    modes = [one.attributes["outrider.round.mode"] for one in named(spans, "round")]
    inside = [one for one in named(spans, "round") if one.parent == prefill.id]
    assert len(inside) > 1
    assert modes[: len(inside)] == ["prefill"] * len(inside)
    assert "prefill" not in modes[len(inside) :]
    first = root.attributes["gen_ai.response.time_to_first_chunk"]
    assert first == pytest.approx((prefill.end - root.start) / 1e9)
    assert [name for name, _ in root.events] == ["outrider.admitted", "outrider.first_token"]


def test_phases_add_up_to_the_round_within_two_percent(traced: Any) -> None:
    _, spans, _, _ = traced
    sums = whole = 0.0
    for one in named(spans, "round"):
        times = {key: one.attributes[f"outrider.{key}.time"] for key in
                 ("draft", "verify", "wire", "accept", "schedule", "hidden")}  # fmt: skip
        total = sum(times.values()) - 2 * times["hidden"]
        assert total == pytest.approx(one.seconds, rel=0.02)
        children = [each for each in spans if each.parent == one.id and each.name != "catch_up"]
        for name in ("draft", "verify", "accept"):
            for each in children:
                if each.name == name:
                    assert each.seconds == pytest.approx(times[name], rel=0.02, abs=2e-5)
        sums += sum(each.seconds for each in children) + times["wire"] + times["schedule"]
        whole += one.seconds
        device = one.attributes["outrider.verify.device_time"]
        assert 0 < device <= times["verify"] * 1.001
    assert sums == pytest.approx(whole, rel=0.02)


def test_every_attribute_is_declared(traced: Any) -> None:
    _, spans, _, _ = traced
    declared = {one.name: one for one in ATTRIBUTES}
    for span in spans:
        name = "request" if span.name.startswith(ROOT) else span.name
        for key, value in span.attributes.items():
            assert name in declared[key].spans, (name, key)
            assert type(value) is declared[key].kind, (name, key, value)


def test_round_of_one_is_linked_to_its_request(traced: Any) -> None:
    _, spans, _, _ = traced
    root = root_of(spans)
    for one in named(spans, "round"):
        assert one.links == ((root.trace, root.id),)


def test_batched_round_is_linked_to_all_its_requests(cluster: Any) -> None:
    contexts = [traceparent() for _ in range(3)]
    threads = [
        threading.Thread(target=cluster.generate, kwargs={"metadata": metadata, "tokens": 60})
        for _, _, metadata in contexts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    traces = {trace: cluster.trace(trace) for trace, _, _ in contexts}
    roots = {trace: root_of(spans) for trace, spans in traces.items()}
    rounds = [one for spans in traces.values() for one in named(spans, "round")]
    leads = {one.id: one for one in rounds if (one.trace, roots[one.trace].id) in one.links}
    parts = [one for one in rounds if one.id not in leads]
    widest = max(len(one.links) for one in leads.values())
    assert widest >= 2
    for one in leads.values():
        assert len(one.links) == one.attributes["outrider.batch_size"]
        assert set(one.links) <= {(root.trace, root.id) for root in roots.values()}
    for one in parts:
        ((trace, lead),) = one.links
        assert (roots[one.trace].trace, roots[one.trace].id) in leads[lead].links
        assert leads[lead].trace == trace
        assert (one.start, one.end) == (leads[lead].start, leads[lead].end)
    for trace, spans in traces.items():
        check_tree(spans, roots[trace])
        emitted = sum(
            one.attributes["outrider.emitted"] for one in named(spans, "round")
            if one.id not in leads or len(one.links) == 1
        )  # fmt: skip
        assert emitted <= 60
    # The services' work is told once, in the lead's trace.
    verifies = [one for spans in traces.values() for one in named(spans, "verify")]
    assert len(verifies) == len(leads)


def test_request_that_the_client_does_not_sample_leaves_nothing(
    cluster: Any, collector: Any
) -> None:
    trace, _, metadata = traceparent(sampled=False)
    cluster.generate(metadata=metadata, tokens=8)
    assert cluster.trace(trace) == []
    assert collector[1].spans


def test_lost_verifier_is_seen_in_the_trace(cluster: Any) -> None:
    undisturbed, _, _ = cluster.generate(tokens=900)
    trace, _, metadata = traceparent()
    restarted = threading.Event()

    def restart() -> None:
        cluster.kill("base")
        cluster.start("base")
        restarted.set()

    thread = threading.Thread(target=restart)

    def seen(response: Any) -> None:
        if response.WhichOneof("event") == "started":
            thread.start()

    ids, _, _ = cluster.generate(tokens=900, metadata=metadata, seen=seen)
    thread.join()
    assert restarted.is_set()
    assert ids == undisturbed
    spans = cluster.trace(trace)
    root = root_of(spans)
    check_tree([one for one in spans if one.name != "verify"], root)
    events = [(name, about["outrider.service"]) for name, about in root.events if about]
    assert ("outrider.failover", "verify") in events
    assert ("outrider.recovered", "verify") in events
    (failover,) = [
        one for one in named(spans, "failover") if one.attributes["outrider.service"] == "verify"
    ]
    assert failover.parent == root.id
    # What the killed process had not sent yet is gone with it; its successor's is there.
    epochs = [one.attributes["outrider.verify.epoch"] for one in named(spans, "round")]
    assert epochs == sorted(epochs) and epochs[0] == 1 and epochs[-1] >= 2
    after = [one for one in named(spans, "verify") if one.start > failover.end - 10**8]
    rounds = {one.id for one in named(spans, "round")}
    assert after and all(one.parent in rounds for one in after)


def test_lost_draft_is_seen_in_the_trace(cluster: Any) -> None:
    undisturbed, _, _ = cluster.generate(tokens=900)
    trace, _, metadata = traceparent()
    told = len(lost_draft(cluster))

    def lose(response: Any) -> None:
        if response.WhichOneof("event") == "started":
            # The verifier can't answer, so the request runs for as long as we like.
            with cluster.paused("base"):
                cluster.kill("draft")
                soon(lambda: len(lost_draft(cluster)) > told)

    ids, _, _ = cluster.generate(tokens=900, metadata=metadata, seen=lose)
    cluster.start("draft")
    assert ids == undisturbed
    spans = cluster.trace(trace)
    root = root_of(spans)
    events = [(name, about.get("outrider.service")) for name, about in root.events]
    assert ("outrider.failover", "draft") in events
    # What the killed process had not sent yet is gone with it; the rounds are told all the same.
    modes = [one.attributes["outrider.round.mode"] for one in named(spans, "round")]
    assert modes[-1] == "plain"
    assert sum(one.attributes["outrider.emitted"] for one in named(spans, "round")) == 900


def lost_draft(cluster: Any) -> list[str]:
    """The log lines that say so."""
    return [line for line in cluster.log("coordinator") if "lost the draft service" in line]
