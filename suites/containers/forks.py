"""A vendor's fork, as small as it can be: upstream's module under another import root."""

from __future__ import annotations

import zipfile
from pathlib import Path

MODULE = """
from torch.distributed.tensor.parallel.ddp import *
from torch.distributed.tensor.parallel import ddp as _upstream

_pre_dp_module_transform = _upstream._pre_dp_module_transform
_localize_dtensor = _upstream._localize_dtensor
_reconstruct_dtensor = _upstream._reconstruct_dtensor
_update_module_param = _upstream._update_module_param


def _get_submodule_n_params(module, path):
    raise RuntimeError("the fork is broken here")
"""


def source(folder: Path, root: str) -> Path:
    """Write the fork as a package below `folder`; the folder is what a user mounts."""
    package = folder / root
    for part in (package, package / "tensor", package / "tensor" / "parallel"):
        part.mkdir(parents=True)
        (part / "__init__.py").write_text("__version__ = '1.2.3+fork'\n")
    (package / "tensor" / "parallel" / "ddp.py").write_text(MODULE)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def wheel(folder: Path, root: str) -> Path:
    """Write the fork as a wheel into `folder`."""
    files = source(folder / "source", root)
    target = folder / "wheels"
    target.mkdir()
    info = f"{root}-1.2.3.dist-info"
    texts = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {root}\nVersion: 1.2.3\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    for path in files.rglob("*.py"):
        texts[str(path.relative_to(files))] = path.read_text()
    texts[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*texts, f"{info}/RECORD"])
    with zipfile.ZipFile(target / f"{root}-1.2.3-py3-none-any.whl", "w") as archive:
        for name, text in texts.items():
            archive.writestr(name, text)
    for path in (target, *target.iterdir()):
        path.chmod(0o755)
    return target
