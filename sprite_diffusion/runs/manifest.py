"""The list of a checkpoint's files, with which damage to them is found."""

import hashlib
import json
from pathlib import Path

from sprite_diffusion.common.errors import DAMAGED_JSON
from sprite_diffusion.common.run_files import MANIFEST_FILE

STATE_FILE = "train_state.json"


def write_manifest(folder: Path) -> None:
    """Writes size and SHA-256 of every file of a folder, for `find_damage`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(listed, indent=2) + "\n")


def find_damage(checkpoint: Path) -> str:
    """Returns in a few words what is wrong with a checkpoint, '' if nothing is."""
    try:
        listed = json.loads((checkpoint / MANIFEST_FILE).read_text())
        for name, entry in listed.items():
            path = checkpoint / name
            if not path.resolve().is_relative_to(checkpoint.resolve()):
                return f"{MANIFEST_FILE} names {name}, outside of the folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes, not {entry['size']}"
            if _sha256(path) != entry["sha256"]:
                return f"{name} has another SHA-256"
        missing = {STATE_FILE, "model.safetensors", "optimizer.bin"} - listed.keys()
        return f"{MANIFEST_FILE} lacks {', '.join(sorted(missing))}" if missing else ""
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except OSError as error:
        return f"can't be read: {error.strerror}"
    except DAMAGED_JSON:
        return f"{MANIFEST_FILE} is no manifest"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
