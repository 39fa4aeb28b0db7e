"""The peers, and an environment for each: made by name from the package index, beside each other's requirements."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

ENVS = Path(__file__).resolve().parent / ".envs"


@dataclass(frozen=True)
class Peer:
    """One library at one version.

    Attributes:
        name: as tables show it.
        project: what it is a version of; two versions of one project are one peer.
        requirement: what pip installs.
        runners: modules of `benchmarks/peers/runners`, with what each one does.
    """

    name: str
    project: str
    requirement: str
    runners: dict[str, str]

    @property
    def folder(self) -> Path:
        """Its environment."""
        return ENVS / self.name.lower().replace(" ", "-")

    @property
    def wanted(self) -> tuple[str, str]:
        """What pip is asked for: the library, and the torch that runs here."""
        return self.requirement, f"torch=={torch.__version__}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


PEERS = (
    Peer("TransformerLens 4.3", "TransformerLens", "transformer-lens==4.3.*", {"transformer_lens_4": "run_with_hooks"}),
    Peer(
        "TransformerLens 3.9",
        "TransformerLens",
        "transformer-lens==3.9.*",
        {
            "transformer_lens_3": "start_at_layer",
            "transformer_lens_3_cache": "start_at_layer, prompt in a frozen cache",
        },
    ),
    Peer("nnsight 0.8", "nnsight", "nnsight==0.8.*", {"nnsight_trace": "trace", "nnsight_skip": "trace, skip"}),
    Peer("pyvene 0.1.8", "pyvene", "pyvene==0.1.8", {"pyvene_vanilla": "VanillaIntervention"}),
)


def why_not(peer: Peer) -> str | None:
    """Why a peer cannot run; None: it can."""
    mark = peer.folder / "installed"
    if mark.exists() and mark.read_text(encoding="utf-8") == " ".join(peer.wanted):
        return None
    failure = peer.folder / "failure"
    if failure.exists():
        return failure.read_text(encoding="utf-8")
    return "not installed: run `python -m benchmarks.peers install`"


def install(peer: Peer) -> str | None:
    """Make the peer's environment where it is missing; why that failed, or None.

    torch and transformers are held at the versions that run bkdfast here, so that all sweeps run the same kernels and
    pip never fetches a CUDA torch for a CPU one. A peer that does not admit this transformers gets the one it admits;
    results carry the versions.
    """
    if why_not(peer) is None:
        return None
    shutil.rmtree(peer.folder, ignore_errors=True)
    made = _run(sys.executable, "-m", "venv", str(peer.folder))
    if made is None:
        pip = [str(peer.python), "-m", "pip", "install", "-q", *peer.wanted]
        made = _run(*pip, f"transformers=={transformers.__version__}")
        if made is not None:
            made = _run(*pip)
    peer.folder.mkdir(parents=True, exist_ok=True)
    mark = peer.folder / ("installed" if made is None else "failure")
    mark.write_text(made or " ".join(peer.wanted), encoding="utf-8")
    return made


def _run(*command: str) -> str | None:
    """The last line that a failed command wrote; None where it did not fail."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line]
    return (errors or lines or [f"exit status {done.returncode}"])[-1].strip()
