"""From the flags of ``outrider generate`` to the request that they ask for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from outrider.coordinator.cli.generate_flags import token_ids
from outrider.protos import generation_pb2 as pb
from outrider.shared.core import rules
from outrider.shared.core.errors import InvalidRequest
from outrider.shared.core.types import PARAMETERS


def request_of(args: argparse.Namespace, prompt: str) -> pb.GenerateRequest:
    """The request that the flags ask for; what they do not say stays unset.

    ``prompt`` is PROMPT, read. Raises ``InvalidRequest`` with the flag's name.
    """
    sampling = pb.SamplingParameters(
        **{
            name: one.kind.write(value)
            for name, one in PARAMETERS.items()
            if (value := getattr(args, name)) is not None
        }
    )
    stopping = pb.StopConditions(
        stop=args.stop or (), stop_token_ids=args.stop_token or (), ignore_eos=args.ignore_eos
    )
    if args.max_new_tokens is not None:
        stopping.max_new_tokens = args.max_new_tokens
    rule: Any = rules.number_of(args.rule)
    speculation = pb.SpeculationParameters(rule=rule)
    if args.k is not None or args.no_draft:
        speculation.k = 0 if args.no_draft else args.k
    request = pb.GenerateRequest(
        sampling=sampling,
        stopping=stopping,
        speculation=speculation,
        output=pb.OutputOptions(echo=args.echo, logprobs=args.logprobs, num_samples=args.n),
        cache_salt=args.cache_salt,
    )
    request.resume_token_ids.ids.extend(args.resume or ())
    _set_input(request, args, prompt)
    return request


def _set_input(request: pb.GenerateRequest, args: argparse.Namespace, prompt: str) -> None:
    if args.messages is not None:
        request.conversation.messages.extend(_messages(args.messages))
    elif args.chat:
        request.conversation.messages.add(role="user", content=prompt)
    elif args.token_ids:
        try:
            request.prompt_token_ids.ids.extend(token_ids(prompt))
        except argparse.ArgumentTypeError as error:
            raise InvalidRequest("PROMPT", prompt, "token ids, as 5,17,3") from error
    else:
        request.prompt = prompt


def _messages(path: Path) -> list[pb.ChatMessage]:
    """The conversation in ``path``."""
    allowed = 'a file with a JSON list of {"role": "...", "content": "..."}'
    try:
        made = [
            pb.ChatMessage(role=one["role"], content=one["content"])
            for one in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidRequest("--messages", f"{path} ({error})", allowed) from None
    if not made:
        raise InvalidRequest("--messages", str(path), allowed)
    return made
