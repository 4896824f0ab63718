"""Facts about where SimAM goes in models of other libraries, read from those libraries' code.

There is one file for each library in tests/borders/library_points:

    {
     "library": "segmentation-models-pytorch",        name of the distribution
     "version": "0.6.0",                              the version whose code was read
     "needs": ["segmentation_models_pytorch"],        modules to import
     "models": [
      {
       "name": "Unet, resnet18",
       "build": "import torch; torch.nn.Conv2d(3, 8, 3)",   statements, and the model at the end
       "example": {"args": [{"shape": [1, 3, 64, 64]}]},
       "points": ["encoder.layer1.0.conv2"],           every convolution that SimAM follows
       "none": {"decoder.*": "the skip sum of a U"},   other convolutions, by glob, and why not
       "note": "what was read"
      }
     ]
    }

A model may have "listed": true. Then SimAM cannot follow its points, and each block of a point, the
module that holds the convolution, is listed as not analysed.

An example has "args", a list, or "kwargs", an object. A tensor is {"shape": [1, 3, 64, 64]}, with
"dtype" if it is not float32, and holds random values, or zeros if it holds integers. Any other
argument is {"value": 10}, and a list of arguments {"list": [...]}.
"""

import ast
import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FACTS = Path(__file__).parents[1] / "borders" / "library_points"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LibraryModel(NamedTuple):
    """A model of a library, and where SimAM goes in it."""

    library: str
    version: str
    needs: list[str]
    name: str
    code: str
    arguments: dict[str, Any]
    points: list[str]
    none: dict[str, str]
    note: str
    listed: bool

    def build(self) -> nn.Module:
        """The model with random weights, in eval mode."""
        tree = ast.parse(self.code)
        last = tree.body.pop()
        if not isinstance(last, ast.Expr):
            raise ValueError(f"{self.name}: the code must end in an expression, the model")
        names: dict[str, Any] = {}
        torch.manual_seed(0)
        exec(compile(tree, self.name, "exec"), names)
        model = eval(compile(ast.Expression(last.value), self.name, "eval"), names)
        return model.eval()

    def example(self) -> Tensor | tuple[Any, ...] | dict[str, Any]:
        """What `plan(model, example=...)` takes: a tensor, or arguments by position or by name."""
        torch.manual_seed(0)
        if "kwargs" in self.arguments:
            return {name: _argument(of) for name, of in self.arguments["kwargs"].items()}
        args = tuple(_argument(of) for of in self.arguments["args"])
        return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args


def library_models() -> Iterator[LibraryModel]:
    """The models of all files."""
    for file in sorted(FACTS.glob("*.json")):
        facts = json.loads(file.read_text())
        for model in facts["models"]:
            yield LibraryModel(
                facts["library"],
                facts["version"],
                facts["needs"],
                model["name"],
                model["build"],
                model["example"],
                model["points"],
                model["none"],
                model["note"],
                model.get("listed", False),
            )


def run(model: nn.Module, example: Tensor | tuple[Any, ...] | dict[str, Any]) -> Any:
    """Call a model with an example."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def spatial_convolutions(model: nn.Module) -> list[str]:
    """Paths of the convolutions with a kernel larger than 1, transposed ones left out."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, CONVOLUTIONS) and max(module.kernel_size) > 1
    ]


def matching(paths: list[str], glob: str) -> list[str]:
    """The paths that a glob selects."""
    return [path for path in paths if fnmatchcase(path, glob)]


def _argument(of: dict[str, Any]) -> Any:
    if "list" in of:
        return [_argument(item) for item in of["list"]]
    if "shape" not in of:
        return of["value"]
    dtype = getattr(torch, of.get("dtype", "float32"))
    return (torch.rand if dtype.is_floating_point else torch.zeros)(of["shape"], dtype=dtype)
