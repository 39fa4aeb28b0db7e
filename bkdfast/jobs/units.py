"""`run_units`: compute the units of a run that are not done, in one process or in many.

The processes are the ranks of `torch.distributed` (`torchrun`; see `join`), and the result is the same, bit for bit, as
that of one: what a unit computes does not depend on who computes it. A rank draws its next unit from a counter in the
c10d store. When the counter has run out, ranks watch the folder and take over units whose owner is gone: it ended, was
started again, or its heartbeat has stopped for `lease` seconds. There is no collective anywhere, so that nothing waits
for a dead rank.

What one lost rank costs:

- Its unit, where the other processes go on (`srun --kill-on-bad-exit=0`, processes started one by one).
- Under `torchrun`, whose agent ends all ranks when one dies, the units in flight that are not finished in the 30 s that
  it gives them (a rank asked to end finishes its unit first); with `--max-restarts=1` or more all ranks start again
  and go on from the folder.
- If it was the process that hosts the c10d store (rank 0, unless torchrun's agent hosts it, as it does by default: see
  TORCHELASTIC_USE_AGENT_STORE), the counter is gone too: the others go on with the folder alone, and may then
  compute a unit twice.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from bkdfast.errors import InvalidArgumentError, StoreError
from bkdfast.jobs.store import Store

LEASE = 20.0
"""Seconds without a heartbeat after which a rank counts as lost."""

Tensors = dict[str, torch.Tensor]

_UNITS = "{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
_BYTES = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Bar(tqdm):
    """A bar whose lock is its process's own: tqdm's is shared by forked ranks, which would wait for a killed one's."""

    _lock = threading.RLock()


def run_units(
    total: int,
    compute: Callable[[int, Callable[[float], None]], Tensors],
    store: Store | None = None,
    *,
    costs: Sequence[float] | None = None,
    progress: bool = True,
    description: str = "run",
    labels: Sequence[str] | None = None,
    lease: float = LEASE,
) -> Iterator[tuple[int, Tensors]]:
    """Yield every unit with its tensors, once each: those in the store as they are, the others computed and stored.

    Args:
        total: units are numbered 0 to total - 1.
        compute: a unit's number to its tensors, the same in every process. It is also given a function to call with
            the work done since the last call, in the measure of `costs`, which moves the progress bar.
        store: where finished units are kept, on storage that all ranks share; None: nowhere (one process only).
        costs: the work in each unit, in any measure, for the time left; None: all alike.
        progress: show a progress bar (of rank 0).
        description: what the bar calls it.
        labels: what each unit is called; the bar then shows the one in hand, and `costs` as bytes with their rate.
        lease: seconds without a heartbeat after which a rank counts as lost.

    Yields:
        (unit, tensors on the CPU): in one process in order, in several as units are finished anywhere.

    Raises:
        InvalidArgumentError: several processes without a store.
        StoreError: the store cannot be written, is in use by another run, or is not shared by the ranks.
    """
    rank, world = place()
    if world > 1 and store is None:
        raise InvalidArgumentError(
            f"{world} processes share this run, but it has nowhere to keep results; pass out= with a folder that all "
            "of them see"
        )
    costs = costs or [1.0] * total
    with contextlib.ExitStack() as stack:
        done: set[int] = set()
        if store is not None:
            stack.enter_context(store.lock(shared=world > 1))
            done = {unit for unit in store.done() if unit < total}
        bar = stack.enter_context(
            _Bar(
                total=sum(costs),
                initial=min(sum(costs[unit] for unit in done), sum(costs)),
                desc=description,
                bar_format=_BYTES if labels else _UNITS,
                unit="B",
                unit_scale=True,
                disable=not progress or rank > 0,
            )
        )
        told = dict.fromkeys(range(total), 0.0)

        def advance(unit: int, work: float) -> None:
            work = min(work, costs[unit] - told[unit])
            told[unit] += work
            bar.update(min(work, bar.total - bar.n))  # sums in another order: a bar beyond its end warns

        def computed(unit: int) -> Tensors:
            if labels:
                bar.set_postfix_str(labels[unit])
            return compute(unit, lambda work: advance(unit, work))

        if store is None or world == 1:
            units = _alone(total, computed, store, done)
        else:
            session = stack.enter_context(_Session(_c10d(store), rank, lease))
            units = _shared(total, computed, store, session)
        finished = len(done)
        if not labels:
            bar.set_postfix_str(f"{finished}/{total} units")
        for unit, tensors in units:
            if unit not in done:
                finished += 1
                if not labels:
                    bar.set_postfix_str(f"{finished}/{total} units", refresh=False)
                advance(unit, costs[unit])
            yield unit, tensors


_joined: tuple[Any, int, int] | None = None  # c10d store, rank, number of processes


def place() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without torch.distributed and `join`."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return _joined[1:] if _joined else (0, 1)


def join() -> tuple[int, int]:
    """As `place`, after joining the processes that a launcher such as `torchrun` started together with this one.

    Connects to their c10d store and makes no process group: there is nothing to set up among all ranks, which would
    need all of them alive. Where a process group is initialised already, its store serves.
    """
    global _joined
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ  # others set the first alone
    if launched and place() == (0, 1):
        _joined = next(dist.rendezvous("env://"))
    return place()


def _alone(
    total: int, compute: Callable[[int], Tensors], store: Store | None, done: set[int]
) -> Iterator[tuple[int, Tensors]]:
    for unit in range(total):
        if store is not None and unit in done:
            yield unit, store.get(unit)
            continue
        tensors = {name: tensor.detach().cpu() for name, tensor in compute(unit).items()}
        if store is not None:
            store.put(unit, tensors)
        yield unit, tensors


def _shared(
    total: int, compute: Callable[[int], Tensors], store: Store, session: _Session
) -> Iterator[tuple[int, Tensors]]:
    given: set[int] = set()
    pause = 0.02
    while True:
        done = {unit for unit in store.done() if unit < total}
        for unit in sorted(done - given):
            yield unit, store.get(unit)
            pause = 0.02
        given |= done
        if len(given) == total:
            return
        mine = session.draw(total, done)
        if mine is None:
            time.sleep(pause)
            pause = min(1.5 * pause, 1.0)
            continue
        with _term_later():
            store.put(mine, compute(mine))
        session.finished(mine)


class _Session:
    """One rank's part in one run: its claims and its heartbeat in the c10d store.

    `next` is the counter, `owner/<unit>` the session that computes a unit, with a `+` once it is stored;
    `alive/<session>` changes for as long as that session goes on, and `rank/<rank>` is the rank's latest session. All
    of it may outlive a session: torchrun's agent keeps its store when it starts the ranks again.
    """

    def __init__(self, c10d: Any, rank: int, lease: float) -> None:
        self.c10d, self.rank, self.lease = c10d, rank, lease
        self.name = f"{rank}.{secrets.token_hex(8)}"
        self.counting = True
        self.looked = self.warned = False
        self.beats: dict[str, tuple[bytes, float]] = {}  # last heartbeat seen, and when it was new
        self.unseen: dict[int, float] = {}  # when a unit was first said to be stored but was not there
        self.random = random.Random(self.name)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> _Session:
        self._ask("set", f"alive/{self.name}", "0")
        self._ask("set", f"rank/{self.rank}", self.name)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join(timeout=self.lease)
        self._ask("set", f"alive/{self.name}", "gone")

    def draw(self, total: int, done: set[int]) -> int | None:
        """A unit that is this rank's to compute; None: look again later."""
        while self.counting and self.c10d is not None:
            count = self._ask("add", "next", 1)
            if count is None or count > total:
                self.counting = False
            elif count - 1 not in done and self._claim(count - 1, b"") == self.name.encode():
                return count - 1
        missing = [unit for unit in range(total) if unit not in done]
        if self.c10d is None:
            return self._draw_without(missing)
        for unit in missing:
            owner = self._claim(unit, b"")
            if owner is None:
                return None
            if owner == self.name.encode() or (self._lost(owner) and self._claim(unit, owner) == self.name.encode()):
                return unit
            if owner.endswith(b"+"):
                self._refuse_unshared(unit)
        return None

    def finished(self, unit: int) -> None:
        """Tell the others that a unit is in the folder."""
        self._ask("set", f"owner/{unit}", self.name + "+")

    def _claim(self, unit: int, owner: bytes) -> bytes | None:
        """The owner of a unit, which is this session if it was `owner`'s before."""
        return self._ask("compare_set", f"owner/{unit}", owner.decode(), self.name)

    def _lost(self, owner: bytes) -> bool:
        session = owner.decode().rstrip("+")
        if session == self.name:  # its file was damaged since
            return True
        latest, beat = self._ask("get", f"rank/{session.partition('.')[0]}"), self._ask("get", f"alive/{session}")
        if latest is None or beat is None:
            return False
        if latest != session.encode():  # its rank was started again
            return True
        now = time.monotonic()
        last, since = self.beats.setdefault(session, (beat, now))
        if beat != last:
            self.beats[session] = (beat, now)
            return False
        return beat == b"gone" or now - since > self.lease

    def _refuse_unshared(self, unit: int) -> None:
        since = self.unseen.setdefault(unit, time.monotonic())
        if time.monotonic() - since > self.lease:
            raise StoreError(
                f"another rank has stored unit {unit}, but its file is not here after {self.lease:.0f} s (or is "
                "damaged); out= must be one folder on storage that all ranks share"
            )

    def _draw_without(self, missing: list[int]) -> int | None:
        if not self.looked:  # look into the folder once more: the host of the c10d store may simply have finished
            self.looked = True
            return None
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"the c10d store is gone, with the process that hosted it; going on without it for {len(missing)} "
                "units, of which some may be computed twice",
                stacklevel=2,
            )
        return self.random.choice(missing)

    def _ask(self, method: str, *args: Any) -> Any:
        """Call the c10d store; None, and no store from then on, if it is gone."""
        c10d = self.c10d
        if c10d is None:
            return None
        try:
            return getattr(c10d, method)(*args)
        except RuntimeError:
            self.c10d = None
            return None

    def _beat(self) -> None:
        beat = 0
        while not self.stop.wait(self.lease / 8):
            beat += 1
            self._ask("set", f"alive/{self.name}", str(beat))


def _c10d(store: Store) -> Any:
    """The ranks' c10d store, with keys of this run only; None if the backend has none (MPI)."""
    default = _joined[0] if _joined else None
    if dist.is_available() and dist.is_initialized():
        try:
            default = dist.distributed_c10d._get_default_store()
        except (AttributeError, ValueError, RuntimeError):
            default = None
    return default and dist.PrefixStore(f"bkdfast/{store.key}", default)


@contextlib.contextmanager
def _term_later() -> Iterator[None]:
    """Let SIGTERM wait: torchrun sends it to all ranks when one has died, and 30 s later SIGKILL."""
    previous = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or previous is None:
        yield
        return
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
