"""Models by name: an HF folder, or one that the package carries, as "asset:NAME"."""

from __future__ import annotations

from pathlib import Path

from streamopd.errors import ConfigError

SHIPPED = Path(__file__).parent
PREFIX = "asset:"


def names() -> list[str]:
    """The models that the package carries."""
    return sorted(config.parent.name for config in SHIPPED.glob("*/config.json"))


def resolve(name: str) -> Path:
    """The folder of a model. ConfigError says what was looked for, what is there instead, and what to do."""
    if name.startswith(PREFIX):
        return _shipped(name.removeprefix(PREFIX))
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return folder
    raise ConfigError(
        f"The model {name!r} was looked for in {folder.absolute()}: {_what_is_there(folder)}. "
        f"Name a folder with config.json and model.safetensors, or one of: {_shipped_names()}."
    )


def _shipped(name: str) -> Path:
    if name not in names():
        raise ConfigError(f"The package carries no model {PREFIX}{name}. It has: {_shipped_names()}.")
    return SHIPPED / name


def _shipped_names() -> str:
    return ", ".join(PREFIX + name for name in names())


def _what_is_there(folder: Path) -> str:
    if folder.is_file():
        return "that is a file, not a folder"
    if not folder.is_dir():
        return "there is no such folder"
    found = sorted(path.name for path in folder.iterdir())
    listing = ", ".join(found[:8]) + (", …" if len(found) > 8 else "")
    missing = "no config.json" if "config.json" not in found else "no .safetensors file"
    return f"it has {missing}, only {listing}" if found else "it is empty"
