"""CUDA graphs, and buffers that stay where they are for them. Neither knows a model.

A graph is a list of kernels that was recorded once: replaying it costs one launch instead of thousands,
and computes again with whatever stands in the buffers that it reads.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

_log = logging.getLogger(__name__)

_WARM_UP_RUNS = 2  # before a capture, so that libraries have chosen their kernels


class GraphPool:
    """CUDA graphs that share one pool of memory: they are replayed one after the other, never together."""

    def __init__(self, captures: bool, around: Callable[[], AbstractContextManager] = nullcontext):
        """around: what is open while something is computed and captured."""
        self._captures, self._around = captures, around
        self._pool = torch.cuda.graph_pool_handle() if captures else None
        self._graphs: list[torch.cuda.CUDAGraph] = []  # those that failed, too: the allocator still looks at them
        self.captured = self.uncaptured = 0

    def record(self, compute: Callable[[], Any]) -> Callable[[], Any]:
        """A function that does what `compute` does, in one launch where it can be captured.

        compute: reads and writes buffers that stay where they are; running it again changes nothing. Its
            result is overwritten by the next graph, so whoever needs it longer copies it.
        """

        def compute_inside() -> Any:
            with self._around():
                return compute()

        if not self._captures:
            return compute_inside
        try:
            return self._capture(compute_inside)
        except RuntimeError as error:  # out of memory is one, too
            _log.warning("a forward could not be captured as a CUDA graph and runs operation by operation: %s", error)
            torch.cuda.synchronize()
            self.uncaptured += 1
            self._pool = torch.cuda.graph_pool_handle()  # the allocator takes the old one for still being captured into
            return compute_inside

    def _capture(self, compute: Callable[[], Any]) -> Callable[[], Any]:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_RUNS):
                compute()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        # A capture that fails does not leave the stream that it took: the outer `with` does. Other threads of this
        # process may copy meanwhile: only this thread's calls belong to the graph.
        with torch.cuda.stream(current), torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
            output = compute()
        self.captured += 1

        def replay() -> Any:
            graph.replay()
            return output

        return replay


class StagedBuffer:
    """A buffer on the model's device and its image in the CPU's memory, pinned where there is a GPU.

    The image may be written again once the device has been waited for, as every step does in its end.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.device = torch.zeros(shape, dtype=dtype, device=device)
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(shape, dtype=dtype, pin_memory=True) if on_gpu else self.device

    @property
    def host(self) -> np.ndarray:
        """The image as a numpy array that shares its memory; for all dtypes that numpy has."""
        return self._host.numpy()

    def put(self, where: slice, values: torch.Tensor) -> None:
        """Write a tensor of the CPU, of any dtype."""
        self._host[where] = values

    def send(self) -> None:
        """Start the copy to the device, which does not wait for it."""
        if self._host is not self.device:
            self.device.copy_(self._host, non_blocking=True)
