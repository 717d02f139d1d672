"""``outrider generate``: streams one continuation from a coordinator, its own or a running one."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TextIO

import grpc

from outrider.coordinator.cli import display
from outrider.coordinator.cli.generate_request import request_of
from outrider.coordinator.local.cuda_mps import daemon
from outrider.coordinator.local.private_stack import deployment
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as stubs
from outrider.shared.config.schema import Config, colors_wanted
from outrider.shared.core.errors import InvalidRequest
from outrider.shared.process.grpc_server import authorization, channel_credentials, client_options
from outrider.shared.process.grpc_status import message_of

if TYPE_CHECKING:
    from outrider.coordinator.profile.collector import Collector


def run(args: argparse.Namespace, config: Config) -> int:
    """Runs the command; returns the exit status."""
    prompt = (sys.stdin.read() if args.prompt == "-" else args.prompt) or ""
    if bool(prompt) == (args.messages is not None):
        raise InvalidRequest("PROMPT", prompt, "text of at least one character, or --messages")
    if args.logprobs is not None and not args.json:
        raise InvalidRequest("--logprobs", args.logprobs, "given with --json")
    if args.target is None and args.k is not None and args.k > config.coordinator.max_k:
        raise InvalidRequest("--k", args.k, f"a whole number from 0 to {config.coordinator.max_k}")
    request = request_of(args, prompt)
    collector = None
    if args.profile is not None:
        from outrider.coordinator.profile.collector import Collector

        collector = Collector(args.profile, prompt)
    progress = display.Progress(sys.stderr)
    try:
        own = args.target is None
        with daemon(own and args.cuda_mps) as environment, ExitStack() as stack:
            target = args.target
            if own:
                log = sys.stderr if args.verbose else None
                target = stack.enter_context(deployment(config, progress, log, environment))
            progress.clear()
            return _stream(args, config, request, target, collector)
    finally:
        progress.clear()


def open_channel(target: str, ca: str | None = None) -> grpc.Channel:
    """A channel to a coordinator; ``ca``: PEM file of its CA, which turns TLS on."""
    credentials = channel_credentials(ca)
    if credentials is not None:
        return grpc.secure_channel(target, credentials, client_options())
    return grpc.insecure_channel(target, client_options())


def _stream(
    args: argparse.Namespace,
    config: Config,
    request: pb.GenerateRequest,
    target: str,
    collector: Collector | None,
) -> int:
    with open_channel(target, args.ca) as channel:
        metadata = authorization(config.coordinator.token) if args.target else ()
        stub = stubs.GenerationStub(channel)
        call = stub.Generate(request, metadata=metadata)
        try:
            if collector is None:
                return _show(args, config, call)
            status = _show(args, config, collector.watch(call))
            collector.write(channel, metadata, _pieces(config))
            return status
        except grpc.RpcError as error:
            sys.stdout.flush()
            print(f"outrider: error: {message_of(error)}", file=sys.stderr)
            return 2 if error.code() is grpc.StatusCode.INVALID_ARGUMENT else 1
        finally:
            call.cancel()


def _show(args: argparse.Namespace, config: Config, call: Any) -> int:
    samples = [display.Sample() for _ in range(args.n or 1)]
    # Samples come side by side: only one alone can be shown as it comes.
    live = len(samples) == 1 and not args.json
    painter = _painter(args, config, sys.stdout) if live else None
    for response in call:
        kind = response.WhichOneof("event")
        if kind == "delta":
            samples[response.sample_index].add(response.delta)
            if live:
                sys.stdout.write(painter.paint(response.delta) if painter else response.delta.text)
                sys.stdout.flush()
        elif kind == "finished":
            samples[response.sample_index].finished = response.finished
    if any(sample.finished is None for sample in samples):
        raise ConnectionError("the stream ended without its last message")
    if args.json:
        objects = [sample.as_json() for sample in samples]
        whole = objects[0] if len(objects) == 1 else {"samples": objects}
        json.dump(whole, sys.stdout, ensure_ascii=False)
    elif not live:
        sys.stdout.write("\n".join(sample.headed(i) for i, sample in enumerate(samples)))
    sys.stdout.write("\n")
    sys.stdout.flush()
    if args.stats:
        if painter:
            print(display.legend(), file=sys.stderr)
        for sample in samples:
            print(sample.statistics(), file=sys.stderr)
    return 0


def _pieces(config: Config) -> Any:
    """Token ids to one text each, when the tokenizer is at hand."""
    from outrider.coordinator.requests.text.detokenize import Detokenizer
    from outrider.coordinator.requests.text.tokenizer import load_tokenizer
    from outrider.shared.core.errors import OutriderError

    try:
        push = Detokenizer(load_tokenizer(config.coordinator.tokenizer)).push
    except (OutriderError, OSError):
        return None
    return lambda ids: [push((token,)) for token in ids]


def _painter(args: argparse.Namespace, config: Config, out: TextIO) -> display.Painter | None:
    """Colours for a terminal, when the tokenizer is at hand."""
    if args.json or args.no_draft or not colors_wanted(out.isatty()):
        return None
    from outrider.coordinator.requests.text.detokenize import Detokenizer
    from outrider.coordinator.requests.text.tokenizer import load_tokenizer
    from outrider.shared.core.errors import OutriderError

    try:
        tokenizer = load_tokenizer(config.coordinator.tokenizer)
    except (OutriderError, OSError):
        return None
    return display.Painter(Detokenizer(tokenizer).push)
