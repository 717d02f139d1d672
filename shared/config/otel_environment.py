"""The standard ``OTEL_*`` variables as settings of ``[telemetry]``; pure, given the variables.

Only what decides whether and where telemetry goes is mapped. Endpoints, headers,
certificates, samplers and resource attributes are read by OpenTelemetry itself.
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from outrider.shared.config.setting import Setting


def settings(env: Mapping[str, str]) -> Iterator[Setting]:
    """The settings that ``env`` asks for; nothing is on unless a variable asks for it."""

    def made(key: str, value: object, variable: str) -> Setting:
        return Setting("telemetry", key, str(value), f"environment variable {variable}", text=True)

    if env.get("OTEL_SERVICE_NAME"):
        yield made("service_name", env["OTEL_SERVICE_NAME"], "OTEL_SERVICE_NAME")
    if env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return
    for signal in ("TRACES", "METRICS"):
        variable = f"OTEL_{signal}_EXPORTER"
        wanted = env.get(variable, "").strip().lower()
        if not wanted:
            # The specification's default is "otlp"; here naming a collector is what asks for it.
            own = f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT"
            variable = own if env.get(own) else "OTEL_EXPORTER_OTLP_ENDPOINT"
            wanted = "otlp" if env.get(variable) else ""
        kinds = []
        for kind in filter(None, (part.strip() for part in wanted.split(","))):
            if kind == "prometheus" and signal == "METRICS":
                yield from _prometheus(env)
            else:
                kinds.append(_protocol(env, signal) if kind == "otlp" else kind)
        if kinds:
            yield made(signal.lower(), ",".join(kinds), variable)


def _protocol(env: Mapping[str, str], signal: str) -> str:
    protocol = env.get(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL") or env.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"
    )
    return "otlp-grpc" if protocol == "grpc" else "otlp-http"


def _prometheus(env: Mapping[str, str]) -> Iterator[Setting]:
    # Three processes can't share a port: each takes the next one.
    variable = "OTEL_EXPORTER_PROMETHEUS_PORT"
    first = env.get(variable) or "9464"
    for offset, role in enumerate(("coordinator", "base", "draft")):
        port = str(int(first) + offset) if first.isdecimal() else first
        source = f"environment variable {variable}"
        yield Setting("telemetry", f"prometheus_{role}", port, source, text=True)
    host = env.get("OTEL_EXPORTER_PROMETHEUS_HOST")
    if host:
        source = "environment variable OTEL_EXPORTER_PROMETHEUS_HOST"
        yield Setting("telemetry", "prometheus_host", host, source, text=True)
