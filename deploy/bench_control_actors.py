"""Many rollout workers in one process for the control-plane benchmark: coroutines that sleep, write real groups and time their calls."""

import asyncio
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import ray

from common.logs import configure_logging
from common.policy.fake import FakePolicy
from common.store.faces import GroupFiles
from common.store.run_store import RunStore
from common.types import LoadReceipt, RolloutLease, Stop, Wait
from rollout_workers.build import WorkerSettings
from rollout_workers.fake import FakeStudio
from rollout_workers.media import decode_media

BEAT_S = 5.0
CALL_TIMEOUT_S = 120.0


class Crowd:
    """Fake rollout workers that share a process and an event loop; each asks, confirms, commits and beats like a worker of its own."""

    def __init__(self, settings: tuple[WorkerSettings, ...], coordinator: Any) -> None:
        """settings: of each worker, with a FakeSpec. coordinator: the handle whose calls are timed."""
        self._settings, self._coordinator = settings, coordinator
        self._seconds: dict[str, list[float]] = defaultdict(list)

    async def run(self) -> dict[str, list[float]]:
        """Work until the Coordinator says Stop. Returns method -> seconds of each call, as its caller saw them."""
        await asyncio.gather(*(self._live(settings) for settings in self._settings))
        return dict(self._seconds)

    async def _live(self, settings: WorkerSettings) -> None:
        held: set[str] = set()
        beats = asyncio.create_task(self._beat(settings.slot, held))
        try:
            await self._work(settings, held)
        finally:
            beats.cancel()

    async def _beat(self, slot: str, held: set[str]) -> None:
        while True:
            await self._call("beat", slot, tuple(held), {})
            await asyncio.sleep(BEAT_S)

    async def _work(self, settings: WorkerSettings, held: set[str]) -> None:
        assert settings.fake is not None, "a crowd is of fake workers"
        policy, files = FakePolicy(), GroupFiles(RunStore(settings.store_url))
        studio = FakeStudio(policy, settings.rollout, run=settings.run, run_seed=settings.run_seed, seconds=0.0, pause=lambda _: None)
        while True:
            lease: RolloutLease | Wait | Stop = await self._call("ask_rollout", settings.slot)
            if isinstance(lease, Stop):
                return
            if isinstance(lease, Wait):
                await asyncio.sleep(lease.seconds)
                continue
            held.add(lease.lease_id)
            expected = lease.publication.snapshots[lease.snapshot]
            receipt = LoadReceipt(
                adapter=lease.publication.adapter, snapshot=lease.snapshot, num_modules=expected.num_modules, canary=expected.canary
            )
            await self._call("confirm_weights", settings.slot, receipt)
            seconds = settings.fake.seconds_of(settings.slot)
            await asyncio.sleep(seconds)
            work = studio.sample(lease)
            assert work.group is not None, "the benchmark evaluates nothing"
            media = decode_media(policy, work.final_latents, settings.rollout.micro_batch)
            path = await asyncio.to_thread(files.write_group, replace(work.group, seconds=seconds), media)
            await self._call("commit_rollout", lease.lease_id, path, seconds)
            held.discard(lease.lease_id)

    async def _call(self, method: str, *arguments: Any) -> Any:
        started = time.perf_counter()
        answer = await asyncio.wait_for(self._coordinator.__getattr__(method).remote(*arguments), CALL_TIMEOUT_S)
        self._seconds[method].append(time.perf_counter() - started)
        return answer


@ray.remote
class CrowdActor:
    """A Crowd in a process of its own."""

    def __init__(self, settings: tuple[WorkerSettings, ...], coordinator: Any) -> None:
        configure_logging()
        self._crowd = Crowd(settings, coordinator)

    async def run(self) -> dict[str, list[float]]:
        """See Crowd.run."""
        return await self._crowd.run()
