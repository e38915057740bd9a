"""The file of requests that TF Serving sends a model before anybody else does. Not public.

TF Serving reads `assets.extra/tf_serving_warmup_requests`, records of `PredictionLog`. That message
is defined in `tensorflow-serving-api`, which brings gRPC along; the few fields that are needed are
written here, and a test reads them with that package.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

FILE = "assets.extra/tf_serving_warmup_requests"


def write(folder: pathlib.Path, name: str, requests: Mapping[str, list[Mapping[str, Any]]]) -> None:
    """Write warm-up requests.

    Args:
        folder: a version's folder.
        name: the model's name, as it is served.
        requests: for each signature, dicts of inputs that `tf.constant` takes.
    """
    import tensorflow as tf

    path = folder / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, inputs in requests.items():
            for one in inputs:
                protos = {
                    key: tf.make_tensor_proto(tf.constant(value)).SerializeToString()
                    for key, value in one.items()
                }
                writer.write(prediction_log(name, signature, protos))


def prediction_log(name: str, signature: str, inputs: Mapping[str, bytes]) -> bytes:
    """A `tensorflow.serving.PredictionLog` with one `PredictRequest`.

    Args:
        name: the model's name.
        signature: the signature that is asked.
        inputs: serialised `TensorProto`s by input.
    """
    spec = _field(1, name.encode()) + _field(3, signature.encode())  # ModelSpec
    request = _field(1, spec)  # PredictRequest
    for key, proto in inputs.items():
        request += _field(2, _field(1, key.encode()) + _field(2, proto))  # an entry of a map
    return _field(6, _field(1, request))  # PredictionLog.predict_log, PredictLog.request


def _field(number, value):
    """A length-delimited field of protocol buffers' wire format."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value):
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])
