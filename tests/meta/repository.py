"""The repository's own files, as a fresh clone would have them."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def repository_files(*paths: str) -> list[str]:
    """Return the files under `paths` (all without any) that git tracks or would track, sorted."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *paths]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted({name for name in output.split("\0") if name and (ROOT / name).is_file()})


def copy_repository_files(target: Path, *paths: str) -> None:
    """Copy `repository_files(*paths)` into the folder `target`."""
    for name in repository_files(*paths):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
