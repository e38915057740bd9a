"""Ask a model that TensorFlow Serving serves, over REST or gRPC.

    python examples/serve/client.py "Kenya'nın para birimi nedir?"
    python examples/serve/client.py --grpc "Kenya'nın para birimi nedir?" "What is 2 + 2?"

The README beside this file tells how the model gets there. Exit status: 0, or 1 where a prompt was
refused, or 2 where there was no answer at all.
"""

import dataclasses
import http.client
import json
import os
import sys
import urllib.error
import urllib.request

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tyro

REST_PORT, GRPC_PORT = 8501, 8500


@dataclasses.dataclass
class Arguments:
    """Ask a served model."""

    prompts: tyro.conf.Positional[tuple[str, ...]]
    """Prompts, in one request."""
    host: str = "127.0.0.1"
    """The server's host."""
    port: int | None = None
    """The server's port; default: 8501, and 8500 with --grpc."""
    model: str = "my_model"
    """The name that the model is served by."""
    version: int | None = None
    """The model's version; default: the latest."""
    grpc: bool = False
    """Ask over gRPC, which needs tensorflow-serving-api."""
    max_length: int | None = None
    """Tokens of prompt and answer, for models exported with --max-length-argument."""
    timeout: float = 120.0
    """Seconds to wait for the answer."""


class NoAnswer(RuntimeError):
    """The server did not answer the request: one line that says what to do."""


def ask_rest(
    prompts,
    host="127.0.0.1",
    port=REST_PORT,
    model="my_model",
    *,
    version=None,
    max_length=None,
    timeout=120.0,
):
    """Ask over REST; returns a list of (text, error), one of them empty.

    Raises:
        NoAnswer: if the server is not there, or answers with an HTTP error.
    """
    server, inputs = f"http://{host}:{port}", {"prompts": list(prompts)}
    if max_length is not None:
        inputs["max_length"] = max_length
    place = model if version is None else f"{model}/versions/{version}"
    # In columns: a scalar, as max_length is, has no place in rows ("instances").
    body = json.dumps({"signature_name": "generate", "inputs": inputs}).encode()
    request = urllib.request.Request(
        f"{server}/v1/models/{place}:predict", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            outputs = json.load(response)["outputs"]
            return list(zip(outputs["text"], outputs["error"], strict=True))
    except urllib.error.HTTPError as error:
        raise _refused(f"{error.code} {error.reason}", _message(error), server) from error
    except TimeoutError as error:
        raise _late(server, timeout) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise _late(server, timeout) from error
        raise _absent(server, error.reason) from error
    except (OSError, http.client.HTTPException) as error:
        raise _absent(server, error) from error
    except (ValueError, TypeError, KeyError) as error:
        raise NoAnswer(
            f"{server} answered, but not with `text` and `error` of a model that keras_cc "
            "exported: look at --host, --port and --model."
        ) from error


def ask_grpc(
    prompts,
    host="127.0.0.1",
    port=GRPC_PORT,
    model="my_model",
    *,
    version=None,
    max_length=None,
    timeout=120.0,
):
    """Ask over gRPC; returns a list of (text, error), one of them empty.

    Raises:
        NoAnswer: if the server is not there, or answers with an error.
        ImportError: without `tensorflow-serving-api`.
    """
    try:
        import grpc
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
    except ImportError as error:
        raise ImportError(
            f"gRPC needs `pip install tensorflow-serving-api`; REST needs nothing. ({error})"
        ) from error

    server, request = f"{host}:{port}", predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = "generate"
    if version is not None:
        request.model_spec.version.value = version
    inputs = {"prompts": tf.make_tensor_proto(list(prompts), tf.string)}
    if max_length is not None:
        inputs["max_length"] = tf.make_tensor_proto(max_length, tf.int32)
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(value)
    try:
        with grpc.insecure_channel(server) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            outputs = stub.Predict(request, timeout=timeout).outputs
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            raise _absent(server, error.details()) from error
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise _late(server, timeout) from error
        raise _refused(error.code().name, error.details(), server) from error
    columns = [tf.make_ndarray(outputs[name]).tolist() for name in ("text", "error")]
    return [(text.decode(), error.decode()) for text, error in zip(*columns, strict=True)]


def _message(error):
    """What TensorFlow Serving says beside an HTTP error: {"error": ...}."""
    body = error.read().decode(errors="replace")
    try:
        return json.loads(body)["error"]
    except (ValueError, TypeError, KeyError):
        return body


def _absent(server, why):
    return NoAnswer(
        f"No server answers at {server} ({_line(why)}): start one with `docker compose -f "
        "examples/serve/docker-compose.yml up -d`, or say where it is with --host and --port."
    )


def _late(server, timeout):
    return NoAnswer(
        f"{server} did not answer within {timeout:g} s: give a longer --timeout, or fewer prompts."
    )


def _refused(status, message, server):
    return NoAnswer(
        f"{server} answered {status}: {_line(message)} -- look at --model, --version and "
        "--max-length, and at the server's log."
    )


def _line(message):
    return " ".join(str(message).split())


def main(args):
    """Ask, and print; returns the exit status."""
    if not args.prompts:
        print("Nothing to ask: give a prompt, or several.", file=sys.stderr)
        return 2
    ask, default_port = (ask_grpc, GRPC_PORT) if args.grpc else (ask_rest, REST_PORT)
    port = default_port if args.port is None else args.port
    options = {name: getattr(args, name) for name in ("version", "max_length", "timeout")}
    try:
        answers = ask(args.prompts, args.host, port, args.model, **options)
    except (NoAnswer, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    for prompt, (text, error) in zip(args.prompts, answers, strict=True):
        print(f"{prompt}  ->  {'refused: ' + error if error else text}")
    return 1 if any(error for _, error in answers) else 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Arguments)))
