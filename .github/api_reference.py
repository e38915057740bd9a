"""The API reference, built from the docstrings: HTML pages, one a public module.

    pip install -e ".[jax,dev]"
    KERAS_BACKEND=jax python .github/api_reference.py build/api

Public is what `keras_cc` and its faces offer: their own definitions and what they import under its
own name (`from ... import align as align`), what they import on use included.
"""

import ast
import inspect
import os
import pathlib
import sys
import types

# Libraries ask the machine what it is as they are imported, which pdoc would suppress and warn of.
os.environ.setdefault("PDOC_ALLOW_EXEC", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_cc


def public_names(module: types.ModuleType) -> list[str]:
    """The public names of a module, in the order of its source."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    names = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names if alias.name == alias.asname]
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    names += getattr(module, "_ON_USE", ())  # imported when they are first used
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]


def public_modules(module: types.ModuleType = keras_cc) -> list[types.ModuleType]:
    """`keras_cc`, and the modules among the public names from there on."""
    found = [module]
    for name in public_names(module):
        value = getattr(module, name)
        if inspect.ismodule(value) and value not in found:
            found += [one for one in public_modules(value) if one not in found]
    return found


def build(folder: pathlib.Path) -> None:
    """Write a page for each public module, and one for what the model has from its trainer."""
    from pdoc import doc, render

    modules = [*public_modules(), inspect.getmodule(keras_cc.CCCausalLM.fit)]
    for module in modules:
        module.__all__ = public_names(module)
        for name in module.__all__:  # pdoc shows what is there: what is imported on use must be
            value = getattr(module, name)
            setattr(module, name, value)
            if inspect.ismodule(value):
                value.__name__ = f"{module.__name__}.{name}"  # the name that a user knows
            elif inspect.isclass(value) and "__init__" in vars(value):
                told = value.__init__.__doc__  # else pdoc takes Keras' own, or the backend's
                value.__init__.__doc__ = told or "Its arguments are told above."

    render.configure(docformat="google", include_undocumented=False, show_source=False)
    pages = {module.__name__: doc.Module(module) for module in modules}
    for module in modules:
        parts = [getattr(module, name) for name in module.__all__]
        page = pages[module.__name__]
        page.submodules = [pages[part.__name__] for part in parts if inspect.ismodule(part)]
    for name, page in pages.items():
        _write(folder / f"{name.replace('.', '/')}.html", render.html_module(page, pages))
    _write(folder / "index.html", render.html_index(pages))
    _write(folder / "search.js", render.search_index(pages))


def _write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    build(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "build/api"))
