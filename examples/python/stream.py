"""Streams a generation from a running coordinator.

    python stream.py localhost:50051 "def fibonacci(n):"

Needs `outrider` installed for its stubs; or make your own from protos/generation.proto.
"""

from __future__ import annotations

import sys

import grpc

from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as rpc


def main() -> int:
    """Runs the program; returns its exit status."""
    if len(sys.argv) != 3:
        print("usage: stream.py TARGET PROMPT", file=sys.stderr)
        return 2
    target, prompt = sys.argv[1:]
    request = pb.GenerateRequest(
        prompt=prompt,
        sampling=pb.SamplingParameters(temperature=0.0),
        stopping=pb.StopConditions(max_new_tokens=64),
    )
    with grpc.insecure_channel(target) as channel:
        try:
            for message in rpc.GenerationStub(channel).Generate(request, timeout=60):
                match message.WhichOneof("event"):
                    case "delta":
                        print(message.delta.text, end="", flush=True)
                    case "finished":
                        stats = message.finished.speculation
                        print(
                            f"\n[{message.finished.usage.completion_tokens} tokens in "
                            f"{stats.rounds} rounds, acceptance rate {stats.acceptance_rate:.2f}]"
                        )
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
