"""``outrider generate``: streams one continuation from a coordinator, its own or a running one."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TextIO

import grpc
from outrider.coordinator import display
from outrider.coordinator.private import deployment
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as stubs
from outrider.shared.config import Config, colors_wanted
from outrider.shared.errors import InvalidRequest
from outrider.shared.rpc import authorization, channel_credentials, client_options
from outrider.shared.status import message_of

if TYPE_CHECKING:
    from outrider.coordinator.profile import Collector

RULES = {
    "auto": pb.ACCEPTANCE_RULE_UNSPECIFIED,
    "greedy": pb.ACCEPTANCE_RULE_GREEDY,
    "coupled": pb.ACCEPTANCE_RULE_COUPLED,
    "rejection": pb.ACCEPTANCE_RULE_REJECTION,
}


def run(args: argparse.Namespace, config: Config) -> int:
    """Runs the command; returns the exit status."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise InvalidRequest("PROMPT", prompt, "text of at least one character")
    if args.target is None and args.k is not None and args.k > config.coordinator.max_k:
        raise InvalidRequest("--k", args.k, f"a whole number from 0 to {config.coordinator.max_k}")
    request = request_of(args, prompt)
    collector = None
    if args.profile is not None:
        from outrider.coordinator.profile import Collector

        collector = Collector(args.profile, prompt)
    progress = display.Progress(sys.stderr)
    try:
        where: Any = nullcontext(args.target)
        if args.target is None:
            where = deployment(config, progress, sys.stderr if args.verbose else None)
        with where as target:
            progress.clear()
            return _stream(args, config, request, target, collector)
    finally:
        progress.clear()


def request_of(args: argparse.Namespace, prompt: str) -> pb.GenerateRequest:
    """The request that the flags ask for; what they do not say stays unset."""
    sampling = pb.SamplingParameters()
    for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
        if (value := getattr(args, name)) is not None:
            setattr(sampling, name, value)
    stopping = pb.StopConditions(stop=args.stop or (), ignore_eos=args.ignore_eos)
    if args.max_new_tokens is not None:
        stopping.max_new_tokens = args.max_new_tokens
    speculation = pb.SpeculationParameters(rule=RULES[args.rule])
    if args.k is not None or args.no_draft:
        speculation.k = 0 if args.no_draft else args.k
    request = pb.GenerateRequest(
        sampling=sampling,
        stopping=stopping,
        speculation=speculation,
        output=pb.OutputOptions(echo=args.echo),
    )
    if args.chat:
        request.conversation.messages.append(pb.ChatMessage(role="user", content=prompt))
    else:
        request.prompt = prompt
    return request


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
        stub: Any = stubs.GenerationStub(channel)  # type: ignore[no-untyped-call]
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
    texts: list[str] = []
    tokens: list[int] = []
    origins: list[int] = []
    finished: pb.Finished | None = None
    painter = _painter(args, config, sys.stdout)
    for response in call:
        kind = response.WhichOneof("event")
        if kind == "delta":
            delta = response.delta
            texts.append(delta.text)
            tokens.extend(delta.token_ids)
            origins.extend(delta.origins)
            if not args.json:
                sys.stdout.write(painter.paint(delta) if painter else delta.text)
                sys.stdout.flush()
        elif kind == "finished":
            finished = response.finished
    if finished is None:
        raise ConnectionError("the stream ended without its last message")
    if args.json:
        json.dump(display.as_json("".join(texts), tokens, finished), sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")
    sys.stdout.flush()
    if args.stats:
        if painter:
            print(display.legend(), file=sys.stderr)
        print(display.statistics(finished, origins), file=sys.stderr)
    return 0


def _pieces(config: Config) -> Any:
    """Token ids to one text each, when the tokenizer is at hand."""
    from outrider.coordinator.detokenize import Detokenizer
    from outrider.coordinator.tokenizer import load
    from outrider.shared.errors import OutriderError

    try:
        push = Detokenizer(load(config.coordinator.tokenizer)).push
    except (OutriderError, OSError):
        return None
    return lambda ids: [push((token,)) for token in ids]


def _painter(args: argparse.Namespace, config: Config, out: TextIO) -> display.Painter | None:
    """Colours for a terminal, when the tokenizer is at hand."""
    if args.json or args.no_draft or not colors_wanted(out.isatty()):
        return None
    from outrider.coordinator.detokenize import Detokenizer
    from outrider.coordinator.tokenizer import load
    from outrider.shared.errors import OutriderError

    try:
        tokenizer = load(config.coordinator.tokenizer)
    except (OutriderError, OSError):
        return None
    push = Detokenizer(tokenizer).push
    return display.Painter(lambda ids: push(ids))
