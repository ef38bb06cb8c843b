"""Decoding without synchronization: a step, its sampling and all counters are on the device.

On a GPU a step of a small decoder is a hundred short kernels, which take longer to launch than to run.
Here it is captured once as a CUDA graph over static buffers
(https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) and replayed; random numbers are copied in advance,
and tokens are read `LATE` steps at a time, while the next ones are computed. If capturing fails, and on other
devices, the same step runs without a graph.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from threading import Lock

import torch
from torch import Tensor

from experiment.compat.torch import compiler_errors, maybe_mark_dynamic
from lm.decoding.compilation import CompilationError, compiled_step, one_token
from lm.decoding.sampling import choose
from lm.decoding.steps import cache_dtype, last_logits, pad
from lm.model.config import GenerationConfig
from lm.model.decoder import Decoder
from lm.model.kv_cache import KeyValueCache

DEVICES = {"cuda"}  # devices faster than the host
LATE = 4  # steps whose tokens are read together
SHORTEST = 128  # minimum slots that attention reads, doubled as needed: one graph per number


def _bucket(num_slots: int) -> int:
    visible = SHORTEST
    while visible < num_slots:
        visible *= 2
    return visible


def can_run_ahead(decoder: Decoder) -> bool:
    """Whether decoding can run ahead of the host: on a GPU, without autocast, which would cast weights at each step,
    and with a plain decoder: FSDP makes a sharded one an instance of a subclass."""
    device_type = decoder.embedding.weight.device.type
    return device_type in DEVICES and type(decoder) is Decoder and not torch.is_autocast_enabled(device_type)


class GraphSteps:
    """Static buffers of a batch of stories, and the graphs over them.

    Args:
        decoder: In eval mode; not kept.
        num_rows: Number of stories, B.
        capacity: Maximum tokens per story.
        config: How tokens are chosen, and whether the step is compiled.
    """

    def __init__(self, decoder: Decoder, num_rows: int, capacity: int, config: "GenerationConfig") -> None:
        device = decoder.embedding.weight.device
        self.config, self.capacity = config, capacity
        self.cache = KeyValueCache(decoder.config, num_rows, capacity, cache_dtype(decoder), device)
        self.input_ids = torch.zeros(num_rows, 1, dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(capacity, num_rows, dtype=torch.int64, device=device)  # of each step
        self.draws = self.held = None
        if config.temperature > 0:
            self.draws = torch.zeros(capacity, num_rows, device=device)
        if config.repetition_penalty != 1:
            self.held = torch.zeros(num_rows, decoder.config.vocab_size, dtype=torch.bool, device=device)
        self.one_token = compiled_step(device.type) if config.compile else one_token
        self.on_gpu = device.type == "cuda"
        self.slots: dict[int, Tensor] = {}  # by the number of slots that attention reads
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if self.on_gpu:
            self.stream = torch.cuda.Stream(device)
            self.fetched = torch.zeros(self.tokens.shape, dtype=torch.int64, pin_memory=True)

    def run(
        self, decoder: Decoder, windows: Sequence[Sequence[int]], count: int, draws: Tensor | None, held: Tensor | None
    ) -> Iterator[list[int]]:
        """The next `count` tokens of every row, up to the capacity; later steps are queued before a step's tokens
        are yielded.

        Args:
            decoder: The same decoder, with weights at the same addresses.
            windows: Token ids of each row.
            count: Steps.
            draws: (count, B) on the host; see `lm.decoding.sampling.choose`, as for held.
            held: (B, V) on the host.
        """
        for buffer, values in ((self.draws, draws), (self.held, held)):
            if buffer is not None:
                buffer[: len(values)].copy_(values)
        self.cache.clear()
        self.step.zero_()
        input_ids, lengths = pad(windows, decoder)
        hidden = decoder.hidden_states(input_ids, self.cache, lengths)
        self._choose(*last_logits(decoder, hidden, lengths))
        longest = max(map(len, windows))
        coming: deque[Callable[[], list[list[int]]]] = deque()
        for begin in range(0, count, LATE):
            end = min(begin + LATE, count)
            for step in range(max(begin, 1), end):
                self._advance(decoder, min(longest + step, self.capacity))
            coming.append(self._fetch(begin, end))
            if len(coming) == 2:
                yield from coming.popleft()()
        while coming:
            yield from coming.popleft()()

    def _advance(self, decoder: Decoder, held: int) -> None:
        """One more token per row; active rows then have at most `held`."""
        visible = min(_bucket(held), self.capacity)
        if visible in self.graphs:
            self.graphs[visible].replay()
        elif visible not in self.slots:
            self.slots[visible] = torch.arange(visible, device=self.step.device)
            self._warm_up(decoder, visible)
        elif self.on_gpu and self._capture(decoder, visible):
            self.graphs[visible].replay()
        else:
            self._plain(decoder, visible)

    def _warm_up(self, decoder: Decoder, visible: int) -> None:
        """The first step on the capturing stream: compiles, and initializes per-stream library state."""
        if not self.on_gpu:
            return self._plain(decoder, visible)
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self._plain(decoder, visible)
        current.wait_stream(self.stream)
        return None

    def _plain(self, decoder: Decoder, visible: int) -> None:
        if self.config.compile:
            self.cache.mark_dynamic()
            for tensor in (self.slots[visible], self.input_ids):
                maybe_mark_dynamic(tensor, 0)
        try:
            self._choose(*self.one_token(decoder, self.input_ids, self.cache, self.slots[visible]))
        except compiler_errors() as error:
            raise CompilationError from error

    def _capture(self, decoder: Decoder, visible: int) -> bool:
        """Capture the graph without running it; False if that is impossible, now and later."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # One capture at a time per process; other threads may keep working.
            with _capturing, torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self._plain(decoder, visible)
        except RuntimeError:
            torch.cuda.set_stream(current)
            self.on_gpu = False
            return False
        self.graphs[visible] = graph
        return True

    def _choose(self, logits: Tensor, argmax: Tensor) -> None:
        draws = None if self.draws is None else self.draws.index_select(0, self.step)[0]
        tokens = choose(logits, argmax, draws, self.held, self.config)
        self.tokens.index_copy_(0, self.step, tokens[None])
        known = tokens.clamp(min=0)[:, None]  # -1 cannot be embedded
        self.input_ids.copy_(known)
        if self.held is not None:
            self.held.scatter_(1, known, True)
        self.step += 1

    def _fetch(self, begin: int, end: int) -> Callable[[], list[list[int]]]:
        """Returns a function that waits for the tokens of these steps and reads them."""
        if not self.tokens.is_cuda:
            return self.tokens[begin:end].tolist
        self.fetched[begin:end].copy_(self.tokens[begin:end], non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def read() -> list[list[int]]:
            done.synchronize()
            return self.fetched[begin:end].tolist()

        return read


_kept: weakref.WeakKeyDictionary[Decoder, tuple[tuple, GraphSteps]] = weakref.WeakKeyDictionary()
_keeping, _capturing = Lock(), Lock()


@contextmanager
def steps_for(decoder: Decoder, num_rows: int, capacity: int, config: "GenerationConfig") -> Iterator[GraphSteps]:
    """Buffers and graphs for exclusive use, reused while the decoder lives and its weights stay in place."""
    capacity = min(_bucket(capacity), decoder.config.max_sequence_length)
    chosen = (config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty, config.compile)
    tensors = [*decoder.parameters(), *decoder.buffers()]
    key = (num_rows, capacity, chosen, *((tensor.data_ptr(), tensor.dtype) for tensor in tensors))
    with _keeping:
        kept, steps = _kept.pop(decoder, (None, None))
    device = tensors[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if kept != key:
            steps = None  # first, to free memory
            steps = GraphSteps(decoder, num_rows, capacity, config)
        yield steps
    with _keeping:
        _kept[decoder] = (key, steps)
