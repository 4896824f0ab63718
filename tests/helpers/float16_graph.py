"""Runs an ONNX graph as an engine with float16 arithmetic: the result of every node is rounded.

ONNX Runtime's CPU kernels compute float16 in float32 and convert between nodes only, or not even
there, so they hide what overflows elsewhere. Within one node, sums are exact here.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

OPERATORS: dict[str, Callable[..., np.ndarray]] = {
    "Abs": np.abs,
    "Add": np.add,
    "Cast": lambda x, to: x.astype(helper.tensor_dtype_to_np_dtype(to)),
    "Clip": lambda x, low, high=None: np.clip(x, low, high),
    "Constant": numpy_helper.to_array,
    "Div": np.divide,
    "Gather": lambda x, indices, axis: np.asarray(x[indices]),
    "Greater": np.greater,
    "Mul": np.multiply,
    "ReduceMean": lambda x, axes, keepdims: x.mean(tuple(axes), keepdims=bool(keepdims)),
    "ReduceSum": lambda x, axes, keepdims: x.sum(tuple(axes), keepdims=bool(keepdims)),
    "Shape": lambda x: np.array(x.shape),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Sub": np.subtract,
}


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    values: dict[str, Any] = {"": None, model.graph.input[0].name: x}
    values |= {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        attributes = [helper.get_attribute_value(a) for a in node.attribute]
        names = [a.name for a in node.attribute]
        inputs = [_widen(values[name]) for name in node.input]
        if node.op_type == "Constant":
            inputs, names, attributes = attributes, [], []
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            result = OPERATORS[node.op_type](*inputs, **dict(zip(names, attributes, strict=True)))
            is_float = np.issubdtype(result.dtype, np.floating)
            values[node.output[0]] = result.astype(np.float16) if is_float else result
    return values[model.graph.output[0].name]


def _widen(value: Any) -> Any:
    return value.astype(np.float64) if getattr(value, "dtype", None) == np.float16 else value
