"""Head maps that come with the package: one for each model whose heads have been found."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from trt_razor.headmap import HeadMap
from trt_razor.models.spec import ModelSpec

RECIPES_ENV = "TRT_RAZOR_RECIPES"


def recipe_heads(spec: ModelSpec) -> tuple[Path, HeadMap] | None:
    """The head map shipped for a model, found by its fingerprint, whatever its folder is called.

    Looked for in ``$TRT_RAZOR_RECIPES``, in the source tree's ``engines/recipes``, and where a wheel
    put the same files.

    Raises:
        UsageError: a recipe that cannot be read (its own folder's fault, not the model's).
    """
    return recipe_of(spec.fingerprint())


def recipe_of(fingerprint: str) -> tuple[Path, HeadMap] | None:
    """``recipe_heads`` by the model's fingerprint alone."""
    tree = Path(__file__).resolve().parent.parent / "engines" / "recipes"
    paths = [*sorted(tree.glob("*.heads.json")), *_installed_recipes()]
    if os.environ.get(RECIPES_ENV):
        paths = [*sorted(Path(os.environ[RECIPES_ENV]).glob("*.heads.json")), *paths]
    for path in paths:
        head_map = HeadMap.load(path)
        if head_map.fingerprint == fingerprint:
            return path, head_map
    return None


def _installed_recipes() -> list[Path]:
    """The recipes among the data files of an installed wheel, wherever its scheme puts them."""
    try:
        files = importlib.metadata.files("trt-razor") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = (Path(f.locate()) for f in files if f.match("share/trt_razor/recipes/*.heads.json"))
    return sorted(path for path in found if path.is_file())
