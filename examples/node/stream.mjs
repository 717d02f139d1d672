// Streams a generation from a running coordinator. The .proto is loaded at run time.
//
//   npm install
//   node stream.mjs localhost:50051 "def fibonacci(n):"
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [target, prompt] = process.argv.slice(2);
if (!target || prompt === undefined) {
  console.error("usage: node stream.mjs TARGET PROMPT");
  process.exit(2);
}

const proto = fileURLToPath(new URL("../../protos/generation.proto", import.meta.url));
const definition = protoLoader.loadSync(proto, {
  keepCase: true,
  longs: String,
  enums: String,
  oneofs: true,
});
const { outrider } = grpc.loadPackageDefinition(definition);
const client = new outrider.v1.Generation(target, grpc.credentials.createInsecure());

const call = client.Generate(
  { prompt, sampling: { temperature: 0 }, stopping: { max_new_tokens: 64 } },
  { deadline: Date.now() + 60_000 },
);
call.on("data", (message) => {
  if (message.event === "delta") {
    process.stdout.write(message.delta.text);
  } else if (message.event === "finished") {
    const { usage, speculation, reason } = message.finished;
    console.log(
      `\n[${usage.completion_tokens} tokens in ${speculation.rounds} rounds, ` +
        `acceptance rate ${speculation.acceptance_rate.toFixed(2)}, ${reason}]`,
    );
  }
});
call.on("error", (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
call.on("end", () => client.close());
