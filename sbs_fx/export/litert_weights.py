"""`four_bit_weights`: a LiteRT file whose weights of up to 4 bits take half a byte each.

In: the bytes of a file of int8 codes. Out: the same file with int4 tensors where all codes are -8 to 7. Holds: codes
stay as they were; only weights of operators whose kernels unpack int4 are changed, and only those that nothing else
reads.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from sbs_fx.export.runtime import require

# Operators whose kernels take int4 weights, and the version of each that does; 0: the plain kernels of depthwise
# convolutions compute it without being registered for that version (TensorFlow Lite, tools/versioning/op_version.cc).
_VERSIONS = {"CONV_2D": 7, "FULLY_CONNECTED": 10, "DEPTHWISE_CONV_2D": 0}
_LOWEST, _HIGHEST = -8, 7


def four_bit_weights(model: bytes) -> bytes:
    """Raises BackendError where ai-edge-litert is not installed.

    >>> len(four_bit_weights(model)) < len(model)
    True
    """
    schema, flatbuffers = require("ai_edge_litert.schema_py_generated", "flatbuffers")
    root = schema.ModelT.InitFromPackedBuf(model, 0)
    kinds = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    for graph in root.subgraphs:
        readers = Counter(int(index) for operator in graph.operators for index in operator.inputs)
        shared = Counter(tensor.buffer for tensor in graph.tensors)
        for operator in graph.operators:
            code = root.operatorCodes[operator.opcodeIndex]
            kind = kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]
            if kind not in _VERSIONS:
                continue
            weight = graph.tensors[operator.inputs[1]]
            buffer = root.buffers[weight.buffer]
            alone = readers[int(operator.inputs[1])] == shared[weight.buffer] == 1
            if weight.type == schema.TensorType.INT8 and buffer.data is not None and alone and _fits(buffer.data):
                buffer.data, weight.type = _packed(buffer.data), schema.TensorType.INT4
                code.version = max(code.version, _VERSIONS[kind])
    builder = flatbuffers.Builder(len(model))
    builder.Finish(root.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _fits(data: Any) -> bool:
    codes = _bytes(data).view(np.int8)
    return bool(codes.min() >= _LOWEST and codes.max() <= _HIGHEST)


def _packed(data: Any) -> Any:
    """Two codes a byte, the first in the lower half."""
    codes = _bytes(data) & 15
    codes = np.append(codes, np.zeros(len(codes) % 2, np.uint8))
    return codes[::2] | codes[1::2] << 4


def _bytes(data: Any) -> Any:
    return np.asarray(data, dtype=np.uint8)
