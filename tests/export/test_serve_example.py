"""The example that asks TensorFlow Serving, against stand-ins and, where there is one, the real."""

import contextlib
import http.server
import importlib.util
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent import futures

import keras
import pytest

tyro = pytest.importorskip("tyro", reason="the examples parse their flags with tyro")

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "serve"
PROMPTS = ["Kenya'nın para birimi nedir?", "ما هي عملة كينيا؟", "👩🏽‍🚀 or\n\ttwo?"]
TOO_LONG = "this prompt has 99 tokens, which leaves no room within max_length=40"


@pytest.fixture(scope="module")
def client():
    spec = importlib.util.spec_from_file_location("serve_client", FOLDER / "client.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


def answer(prompt):
    """What the stand-ins' model says: `(text, error)`."""
    return ("", TOO_LONG) if "too long" in prompt else (prompt.upper() + " şilin", "")


class Rest(http.server.BaseHTTPRequestHandler):
    """TensorFlow Serving's REST interface, as it documents it, for a model `my_model`."""

    timeout = 10  # of a socket

    def do_GET(self):
        if self.path != "/v1/models/my_model":
            return self.reply(404, {"error": "Malformed request: GET " + self.path})
        state, code = self.server.state
        state = {"version": "1", "state": state, "status": {"error_code": code}}
        return self.reply(200, {"model_version_status": [state]})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, json.loads(body)))
        if self.server.reply is not None:
            return self.reply(*self.server.reply)
        request = json.loads(body)
        assert self.headers["Content-Type"] == "application/json"
        assert set(request) == {"signature_name", "inputs"}
        assert request["signature_name"] == "generate"
        texts, errors = zip(*map(answer, request["inputs"]["prompts"]), strict=True)
        return self.reply(200, {"outputs": {"text": texts, "error": errors}})

    def reply(self, status, body):
        # Letters as they are: TensorFlow Serving does not escape them.
        body = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def rest():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Rest) as server:
        server.seen, server.reply, server.state = [], None, ("AVAILABLE", "OK")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run(client, *arguments):
    """The exit status of a command line."""
    return client.main(tyro.cli(client.Arguments, args=[str(part) for part in arguments]))


def test_rest(client, rest, capsys):
    assert run(client, "--port", rest.server_port, *PROMPTS) == 0
    request = {"signature_name": "generate", "inputs": {"prompts": PROMPTS}}
    assert rest.seen == [("/v1/models/my_model:predict", request)]
    printed = capsys.readouterr()
    assert printed.out == "".join(f"{p}  ->  {p.upper()} şilin\n" for p in PROMPTS)
    assert printed.err == ""
    assert client.ask_rest(PROMPTS, port=rest.server_port) == [answer(p) for p in PROMPTS]


def test_rest_options(client, rest):
    arguments = ["--port", rest.server_port, "--model", "gemma", "--version", 3]
    assert run(client, *arguments, "--max-length", 40, "a") == 0
    inputs = {"prompts": ["a"], "max_length": 40}  # an int, which is a scalar to TensorFlow Serving
    request = {"signature_name": "generate", "inputs": inputs}
    assert rest.seen == [("/v1/models/gemma/versions/3:predict", request)]


def test_a_prompt_that_is_refused(client, rest, capsys):
    assert run(client, "--port", rest.server_port, "a", "too long", "b") == 1
    assert capsys.readouterr().out == f"a  ->  A şilin\ntoo long  ->  refused: {TOO_LONG}\n" + (
        "b  ->  B şilin\n"
    )


@pytest.mark.parametrize(
    "status, body, expected",
    [
        (400, {"error": "Missing named input:\n max_length"}, "Missing named input: max_length"),
        (404, {"error": "Servable not found for request: Latest(my_model)"}, "Servable not found"),
        (503, b"<html>a proxy\xff</html>", "<html>a proxy"),
    ],
)
def test_an_http_error(client, rest, capsys, status, body, expected):
    rest.reply = (status, body)
    assert run(client, "--port", rest.server_port, "a") == 2
    one_line(capsys, f"answered {status} ", expected, "--version")


@pytest.mark.parametrize(
    "body",
    [
        b"<html>another server</html>",
        {"outputs": {"logits": [[1.0]]}},
        {"outputs": ["a"]},
        {"predictions": [{"text": "a", "error": ""}]},
        {"outputs": {"text": ["a", "b"], "error": [""]}},
    ],
)
def test_another_answer(client, rest, capsys, body):
    rest.reply = (200, body)
    assert run(client, "--port", rest.server_port, "a") == 2
    one_line(capsys, "not with `text` and `error`", "--model")


@pytest.mark.parametrize("flags", [[], ["--grpc"]])
def test_nothing_listens(client, capsys, flags):
    if flags:
        pytest.importorskip("tensorflow_serving", reason="gRPC needs tensorflow-serving-api")
    port = free_port()
    assert run(client, *flags, "--port", port, "--timeout", 10, "a") == 2
    one_line(capsys, f"127.0.0.1:{port}", "docker compose -f examples/serve/docker-compose.yml up")


@pytest.mark.parametrize("flags", [[], ["--grpc"]])
def test_a_server_that_says_nothing(client, capsys, flags):
    if flags:
        pytest.importorskip("tensorflow_serving", reason="gRPC needs tensorflow-serving-api")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert run(client, *flags, "--port", port, "--timeout", 0.5, "a") == 2
    one_line(capsys, "within 0.5 s", "--timeout")


def test_a_server_of_another_protocol(client, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(10)

        def speak():
            with contextlib.closing(other.accept()[0]) as one:
                one.recv(65536)
                one.sendall(b"\0\0\x12\x04 this is no HTTP\r\n")

        thread = threading.Thread(target=speak)
        thread.start()
        assert run(client, "--port", other.getsockname()[1], "--timeout", 10, "a") == 2
        thread.join(10)
    one_line(capsys, "No server answers", "--port")


def test_no_prompt(client, capsys):
    assert run(client) == 2
    one_line(capsys, "give a prompt")


def test_the_script(rest):
    """As a process: nothing but the line, and its exit status."""
    command = [sys.executable, str(FOLDER / "client.py"), "--port"]
    done = subprocess.run(
        [*command, str(rest.server_port), "a"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"a  ->  {answer('a')[0]}\n", "")
    done = subprocess.run(
        [*command, str(free_port()), "a"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("No server answers") and done.stderr.count("\n") == 1


def one_line(capsys, *parts):
    """Nothing was printed but one line of errors, with these parts."""
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith("\n") and printed.err.count("\n") == 1
    assert [part for part in parts if part not in printed.err] == [], printed.err


@pytest.fixture
def grpc_server():
    """A gRPC server with TensorFlow Serving's generated service; its port and its requests."""
    pytest.importorskip("tensorflow_serving", reason="gRPC needs tensorflow-serving-api")
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):
            seen.append(request)
            if request.model_spec.name != "my_model":
                context.abort(grpc.StatusCode.NOT_FOUND, "Servable not found for request:\n Latest")
            assert request.model_spec.signature_name == "generate"
            prompts = tf.make_ndarray(request.inputs["prompts"])
            assert prompts.ndim == 1
            texts, errors = zip(*(answer(prompt.decode()) for prompt in prompts), strict=True)
            reply = predict_pb2.PredictResponse()
            for name, values in {"text": texts, "error": errors}.items():
                reply.outputs[name].CopyFrom(tf.make_tensor_proto(list(values)))
            return reply

    seen, server = [], grpc.server(futures.ThreadPoolExecutor(2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port, seen
    server.stop(None).wait(10)


def test_grpc(client, grpc_server, capsys):
    port, seen = grpc_server
    assert client.ask_grpc(PROMPTS, port=port) == [answer(prompt) for prompt in PROMPTS]
    assert run(client, "--grpc", "--port", port, "a", "too long") == 1
    printed = capsys.readouterr().out
    assert printed == f"a  ->  A şilin\ntoo long  ->  refused: {TOO_LONG}\n"
    for request in seen:
        assert set(request.inputs) == {"prompts"}
        assert not request.model_spec.HasField("version")


def test_grpc_options(client, grpc_server):
    import tensorflow as tf

    port, seen = grpc_server
    assert run(client, "--grpc", "--port", port, "--version", 3, "--max-length", 40, "a") == 0
    assert seen[0].model_spec.version.value == 3
    length = tf.make_ndarray(seen[0].inputs["max_length"])
    assert (length.shape, length.dtype, int(length)) == ((), "int32", 40)


def test_a_grpc_error(client, grpc_server, capsys):
    assert run(client, "--grpc", "--port", grpc_server[0], "--model", "gemma", "a") == 2
    one_line(capsys, "answered NOT_FOUND: Servable not found for request: Latest", "--model")


def test_grpc_without_its_package(client, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow_serving", None)
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    assert run(client, "--grpc", "a") == 2
    one_line(capsys, "pip install tensorflow-serving-api")


@pytest.fixture(scope="module")
def service():
    yaml = pytest.importorskip("yaml", reason="reads docker-compose.yml with PyYAML")
    text = (FOLDER / "docker-compose.yml").read_text(encoding="utf-8")
    return yaml.safe_load(text)["services"]["serving"]


def test_compose_is_as_the_clients_defaults(client, service):
    defaults = client.Arguments(())
    assert service["environment"] == {"MODEL_NAME": defaults.model}
    (volume,) = service["volumes"]
    assert volume["target"] == f"/models/{defaults.model}"
    assert volume["source"] == f"./served/${{MODEL:-{defaults.model}}}"
    assert volume["read_only"] is True
    ports = [f"{defaults.host}:{port}:{port}" for port in (client.GRPC_PORT, client.REST_PORT)]
    assert service["ports"] == ports
    assert service["image"].startswith("tensorflow/serving:2.")


@pytest.mark.skipif(shutil.which("bash") is None, reason="the health check is bash's")
def test_the_health_check(rest, service):
    def status():
        kind, *command = [part.replace("8501", str(rest.server_port)) for part in check["test"]]
        assert kind == "CMD"
        return subprocess.run(command, capture_output=True, timeout=30).returncode

    check = service["healthcheck"]
    assert status() == 0
    for rest.state in (("LOADING", "OK"), ("END", "UNAVAILABLE")):
        assert status() != 0
    rest.server_port = free_port()
    assert status() != 0


@pytest.mark.skipif(
    shutil.which("tensorflow_model_server") is None, reason="no tensorflow_model_server on PATH"
)
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="one backend exports it")
def test_the_real_server(client, tmp_path):
    import connected

    import keras_cc

    model = connected.text_model("llama3")
    connected.train_connection(model)
    model.compile(sampler="greedy")
    keras_cc.export_saved_model(model, tmp_path / "my_model", max_length=40)
    prompts = ["the quick fox", "Kenya'nın para birimi nedir?"]
    expected = model.generate(prompts, max_length=40, strip_prompt=True)
    with real_server(tmp_path / "my_model", tmp_path / "log.txt") as ports:
        asked = {"rest": client.ask_rest(prompts, port=ports["rest"], timeout=60)}
        if importlib.util.find_spec("tensorflow_serving"):
            asked["grpc"] = client.ask_grpc(prompts, port=ports["grpc"], timeout=60)
    assert asked == {way: [(text, "") for text in expected] for way in asked}


@contextlib.contextmanager
def real_server(model, log, timeout=120):
    """A `tensorflow_model_server` that has loaded the model; gives its ports."""
    ports = {"rest": free_port(), "grpc": free_port()}
    command = ["tensorflow_model_server", f"--model_name={model.name}"]
    command += [f"--model_base_path={model}", f"--rest_api_port={ports['rest']}"]
    with log.open("wb") as file:
        server = subprocess.Popen(
            [*command, f"--port={ports['grpc']}"], stdout=file, stderr=subprocess.STDOUT
        )
        try:
            until = time.monotonic() + timeout
            while not is_available(f"http://127.0.0.1:{ports['rest']}/v1/models/{model.name}"):
                said = log.read_text(errors="replace")[-4000:]
                assert server.poll() is None and time.monotonic() < until, said
                time.sleep(0.2)
            yield ports
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait(30)


def is_available(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            versions = json.load(response)["model_version_status"]
    except (urllib.error.URLError, OSError):
        return False
    return any(version["state"] == "AVAILABLE" for version in versions)
