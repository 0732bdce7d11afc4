"""Several learner processes as one: the few words that ranks exchange, alone or over torch.distributed."""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from common.errors import CorruptFile, FlowfleetError, GateError
from common.policy.adapters import adapter_digest
from common.policy.base import AdapterState
from common.store.manifests import decode_record, encode_record
from common.types import Manifest, Stop, Wait

ResultT = TypeVar("ResultT")
Answer = Manifest | Wait | Stop

_ANSWERS: dict[str, type[Manifest] | type[Wait] | type[Stop]] = {kind.__name__: kind for kind in (Manifest, Wait, Stop)}


class RankLost(FlowfleetError):
    """Another rank died, or did not answer in time: all ranks start again from the LearnerState."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlace:
    """Where one rank stands among the others."""

    rank: int
    size: int
    address: str  # where the ranks meet: tcp://host:port that rank 0 opens, or file:///path that all of them see
    timeout_s: float  # of every exchange: a rank that is silent for longer is lost


class Ranks(Protocol):
    """All ranks make the same calls in the same order; every call raises RankLost within the timeout."""

    @property
    def rank(self) -> int:
        """This process's number; 0 alone asks the desk and writes."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def broadcast(self, content: bytes) -> bytes:
        """Return rank 0's bytes on every rank; what the others give is not looked at."""
        ...

    def share(self, content: bytes) -> tuple[bytes, ...]:
        """Return every rank's bytes, in rank order."""
        ...

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Put the sum over ranks into every `.grad`, bit-equal on all of them; None counts as 0, and stays where all have None."""
        ...

    def barrier(self) -> None:
        """Return once every rank has called it."""
        ...

    def close(self) -> None:
        """Leave; the others then lose this rank if they still talk to it."""
        ...


class SoloRanks:
    """One process: nothing to exchange, and no torch.distributed."""

    rank = 0
    size = 1

    def broadcast(self, content: bytes) -> bytes:
        """See Ranks."""
        return content

    def share(self, content: bytes) -> tuple[bytes, ...]:
        """See Ranks."""
        return (content,)

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """See Ranks."""

    def barrier(self) -> None:
        """See Ranks."""

    def close(self) -> None:
        """See Ranks."""


class TorchRanks:
    """Ranks over torch.distributed: words over gloo, gradients over gloo on CPU and nccl on GPUs. One at a time in a process."""

    def __init__(self, place: RankPlace, device: torch.device) -> None:
        """Meet the other ranks.

        Args:
            place: this rank's; the address is new at every start.
            device: of the adapter.

        Raises:
            RankLost: not all ranks came within the timeout.
        """
        self._place = place
        self._guard("the other ranks at its start", lambda: self._meet(device))

    def _meet(self, device: torch.device) -> None:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", init_method=self._place.address, rank=self.rank,
            world_size=self.size, timeout=datetime.timedelta(seconds=self._place.timeout_s),
        )  # fmt: skip
        self._count()

    def _count(self) -> None:
        dist.all_reduce(torch.ones(1))  # on CPU, so over gloo

    @property
    def rank(self) -> int:
        """See Ranks."""
        return self._place.rank

    @property
    def size(self) -> int:
        """See Ranks."""
        return self._place.size

    def broadcast(self, content: bytes) -> bytes:
        """Length first, then the bytes, as tensors (broadcast_object_list pickles)."""
        length = torch.tensor([len(content)], dtype=torch.int64)
        self._guard("rank 0's next word", lambda: dist.broadcast(length, src=0))
        words = _tensor(content if self.rank == 0 else b"", int(length))
        self._guard("rank 0's next word", lambda: dist.broadcast(words, src=0))
        return words.numpy().tobytes()

    def share(self, content: bytes) -> tuple[bytes, ...]:
        """Lengths first, then the bytes, padded to the longest."""
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._guard("the other ranks' sums", lambda: dist.all_gather(lengths, torch.tensor([len(content)], dtype=torch.int64)))
        longest = max(int(length) for length in lengths)
        words = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        self._guard("the other ranks' sums", lambda: dist.all_gather(words, _tensor(content, longest)))
        return tuple(word[: int(length)].numpy().tobytes() for word, length in zip(words, lengths, strict=True))

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """One all-reduce of all gradients and, behind them, of a flag each: LoRA-sized, so buckets would gain nothing."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flags = parts[0].new_tensor([float(p.grad is not None) for p in parameters])
        total = torch.cat([*(part.flatten() for part in parts), flags])
        self._guard("the other ranks' gradients", lambda: dist.all_reduce(total))
        sums = total.split([*(part.numel() for part in parts), len(parts)])
        for parameter, grad, flag in zip(parameters, sums, sums[-1].tolist(), strict=False):
            parameter.grad = grad.view_as(parameter).to(parameter.dtype).clone() if flag else None

    def barrier(self) -> None:
        """See Ranks."""
        self._guard("the other ranks at the end", self._count)

    def close(self) -> None:
        """See Ranks."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _guard(self, awaited: str, exchange: Callable[[], ResultT]) -> ResultT:
        """Every failure of the transport is a lost rank; torch raises RuntimeError and its subclasses for all of them."""
        try:
            return exchange()
        except RuntimeError as error:
            raise RankLost(
                f"learner rank {self.rank} of {self.size}: waited for {awaited} ({str(error).splitlines()[0]}); a rank ended or was silent "
                f"for {self._place.timeout_s:.0f} s (learner.rank_timeout_s); all ranks start again from the newest LearnerState"
            ) from error


def _tensor(content: bytes, length: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(content.ljust(length, b"\0")), dtype=torch.uint8) if length else torch.zeros(0, dtype=torch.uint8)


def encode_answer(answer: Answer) -> bytes:
    """Return the desk's answer as the other ranks get it: its kind, then its JSON."""
    return type(answer).__name__.encode() + b"\n" + encode_record(answer)


def decode_answer(content: bytes) -> Answer:
    """Return what `encode_answer` was given. Raises CorruptFile."""
    kind, _, record = content.partition(b"\n")
    if kind.decode(errors="replace") not in _ANSWERS:
        raise CorruptFile(
            f"learner: rank 0 sent {kind[:40]!r}, which is no answer of the desk; run one version of the program on all nodes"
        )
    answer: Answer = decode_record(_ANSWERS[kind.decode()], "rank 0's answer", record)
    return answer


def check_agreement(ranks: Ranks, live: AdapterState, update: int) -> None:
    """Check that an update left the same adapter on every rank, bit for bit.

    Raises:
        GateError("ranks_differ").
    """
    if ranks.size == 1:
        return
    digests = [content.decode() for content in ranks.share(adapter_digest({"live": live}).encode())]
    if len(set(digests)) > 1:
        raise GateError(
            "ranks_differ",
            f"Learner: after update {update} the ranks hold adapters {[digest[:12] for digest in digests]}; they step on the same summed "
            "gradients, so they are equal bit for bit; run all ranks on the same kind of device with the same versions of torch and driver",
        )
